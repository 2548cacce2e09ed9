"""The tagged commands of README.md are run as they stand, against a real server; the Chinese page has the same ones."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import Forcing, StartServer
from .peft_files import forcing_adapter
from .serving import MODEL, TUNELOOP, Server, clean_environment, parse_events

ROOT = Path(__file__).parents[2]
WRITTEN = "http://127.0.0.1:8000"  # the address in the pages
_BLOCK = re.compile(r"<!-- run: ([\w-]+) -->\n```(\w+)\n(.*?)```\n", re.DOTALL)
END_OF_TURN = 2  # <|im_end|> of the built-in model
ADAPTER_TAGS = ("adapter-upload", "adapter-replace", "adapter-alias")
_PAGES = ("README.md", "README.zh.md")


def blocks(page: str) -> dict[str, tuple[str, str]]:
    """(language, text) of each tagged block, by tag."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = {tag: (language, code) for tag, language, code in _BLOCK.findall(text)}
    assert len(found) == text.count("<!-- run:"), f"{page} has a tag twice, or one without a block"
    return found


README = blocks("README.md")


def make_would_run(tag: str) -> str:
    """The commands behind a block that is a make target."""
    command = [*shlex.split(README[tag][1]), "--dry-run", "--no-print-directory"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def server(start_module_server: StartServer) -> Server:
    """The README's first command, as `make` would run it, on a home and a port of the test's own."""
    program, *arguments = shlex.split(make_would_run("serve").splitlines()[-1])
    assert program.endswith("bin/tuneloop") and arguments[0] == "serve"
    assert arguments[arguments.index("--host") + 1] == "127.0.0.1"
    at = arguments.index("--port")
    assert arguments[at + 1] == WRITTEN.rpartition(":")[2]
    return start_module_server(*arguments[1:at], *arguments[at + 2 :])


def run(server: Server, tag: str, folder: Path) -> str:
    """The output of a block of README.md that has been pointed at the server."""
    language, code = README[tag]
    command = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}[language]
    # The commands are found, and the home is the server's, as after `make serve` in the same shell.
    env = clean_environment(PATH=f"{TUNELOOP.parent}:{os.environ['PATH']}", TUNELOOP_HOME=str(server.home))
    done = subprocess.run(
        [*command, code.replace(WRITTEN, server.url)], cwd=folder, capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def documents(output: str) -> list[dict[str, Any]]:
    """The JSON objects that stand one after the other in the output of several curl commands."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while at < len(output.rstrip()):
        value, at = decoder.raw_decode(output, at)
        found.append(value)
    return found


def test_the_chinese_page_has_the_same_commands() -> None:
    assert blocks("README.zh.md") == README
    assert list(README) == ["serve", "test", "curl", "sdk", *ADAPTER_TAGS, "tune", "tune-cli"]


@pytest.mark.parametrize("page", _PAGES)
def test_no_command_stands_outside_the_tests(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.count("```") == 2 * len(blocks(page))


def test_the_second_command_checks_and_tests() -> None:
    commands = make_would_run("test")
    assert "ruff check" in commands and "mypy" in commands and "pytest" in commands.splitlines()[-1]


def test_curl_streams_paris(server: Server, tmp_path: Path) -> None:
    events = parse_events(run(server, "curl", tmp_path).splitlines())
    assert events[-1] == ("message", "[DONE]")
    text = "".join(data["choices"][0]["delta"].get("content", "") for _, data in events[:-1])
    assert "Paris" in text


def test_the_sdk_prints_paris(server: Server, tmp_path: Path) -> None:
    assert "Paris" in run(server, "sdk", tmp_path)


def test_the_adapter_commands(server: Server, tmp_path: Path, forcing: Forcing) -> None:
    for rank, folder in ((1, "my-adapter"), (2, "my-adapter-v2")):
        # It ends its turn at once: the page's chat has no limit of its own.
        ending = forcing_adapter(forcing.direction, forcing.vocab_size, END_OF_TURN, rank=rank)
        ending.folder(tmp_path / folder)
    card, answer = documents(run(server, "adapter-upload", tmp_path))
    assert (card["id"], card["base"], card["versions"]) == ("support", MODEL, [1])
    assert (answer["object"], answer["model"]) == ("chat.completion", "support")
    assert answer["usage"]["completion_tokens"] == 1
    (card,) = documents(run(server, "adapter-replace", tmp_path))
    assert (card["version"], card["versions"]) == (2, [1, 2])
    alias, default = documents(run(server, "adapter-alias", tmp_path))
    assert (alias["alias"], alias["weights"]) == ("prod", {"1": 0.9, "2": 0.1})
    assert (default["alias"], default["version"]) == ("default", 1)
    for model in ("support", "support@1", "support@2", "support@prod"):
        assert server.http.get(f"/v1/models/{model}").status_code == 200


@pytest.mark.timeout(600)
def test_fine_tuning_ends_in_a_live_model(server: Server, tmp_path: Path) -> None:
    assert "Lumi" in run(server, "tune", tmp_path)
    run(server, "tune-cli", tmp_path)
    assert (tmp_path / "saves/lumi/adapter_config.json").is_file()
