"""Commands that talk to a server, against a real one on a socket with scripted engines."""

import asyncio
import io
import json
import shutil
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from safetensors.numpy import save_file
from structlog.testing import capture_logs
from tuneloop.engines.base import Engine
from tuneloop.engines.fake import FakeEngine
from tuneloop.engines.fake_checkpoint import write_fake_checkpoint
from tuneloop.engines.tokenizer import ChatTokenizer
from tuneloop.server.app import create_app
from tuneloop.server.cli import main
from tuneloop.server.settings import Settings

MakeAdapter = Callable[..., Path]


class Shell:
    """Runs commands against the server and looks at what they print."""

    def __init__(self, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.url = url
        self._capsys = capsys

    def run(self, *arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_info:
            main([*arguments, "--url", self.url])
        captured = self._capsys.readouterr()
        return int(exit_info.value.code or 0), captured.out, captured.err

    def ok(self, *arguments: str) -> str:
        status, out, err = self.run(*arguments)
        assert status == 0, err
        return out

    def error(self, *arguments: str) -> str:
        status, out, err = self.run(*arguments)
        assert (status, out) == (1, "")
        assert err.startswith("Error: ")
        assert err.count("\n") == 1
        return err


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = write_fake_checkpoint(tmp_path / "checkpoint")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"weight": np.zeros(1, np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def shell(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Shell]:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.delenv("TUNELOOP_API_KEY", raising=False)

    def build(name: str, path: Path, tokenizer: ChatTokenizer) -> Engine:
        return FakeEngine(tokenizer)

    settings = Settings(home=tmp_path / "home", models=(f"tiny={checkpoint}",), adapter_roots=(tmp_path,))
    config = uvicorn.Config(create_app(settings, engine_factory=build), port=0, log_config=None, access_log=False)
    server = uvicorn.Server(config)
    listener = config.bind_socket()
    listener.listen()  # a command that comes before the server has started waits in the queue
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    with capture_logs():  # the server shares our stdout here, the commands' output must be alone on it
        thread.start()
        yield Shell(f"http://127.0.0.1:{listener.getsockname()[1]}", capsys)
        server.should_exit = True
        thread.join()


def test_models(shell: Shell, checkpoint: Path) -> None:
    assert shell.ok("models", "load", "tiny") == "tiny: ready\n"
    table = shell.ok("models", "list")
    assert [line.split()[:2] for line in table.splitlines()[1:]] == [["smollm2-135m", "unloaded"], ["tiny", "ready"]]
    assert shell.ok("models", "pin", "tiny") == "tiny: ready, pinned\n"
    assert shell.ok("models", "pin", "tiny", "--off") == "tiny: ready\n"
    assert shell.ok("models", "unload", "tiny") == "tiny: unloaded\n"
    assert shell.ok("models", "load", "second", "--source", str(checkpoint), "--pin") == "second: ready, pinned\n"
    cards = json.loads(shell.ok("models", "list", "--json"))["data"]
    assert {card["id"] for card in cards} == {"smollm2-135m", "tiny", "second"}
    assert shell.ok("models", "load", f"third={checkpoint}") == "third: ready\n"
    assert "There is no base model 'nobody'" in shell.error("models", "load", "nobody")


def test_the_life_of_an_adapter(shell: Shell, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    one, two, three = make_adapter(1), make_adapter(2), make_adapter(3)
    assert shell.ok("adapters", "add", "org/support", str(one), "--base", "tiny") == "org/support on tiny: version 1\n"
    assert "exists" in shell.error("adapters", "add", "org/support", str(two), "--base", "tiny")
    assert shell.ok("adapters", "add", "org/support", str(two), "--replace") == "org/support on tiny: version 2\n"
    archive = shutil.make_archive(str(tmp_path / "three"), "gztar", three)
    assert shell.ok("adapters", "add", "org/support", archive, "--replace") == "org/support on tiny: version 3\n"

    assert shell.ok("adapters", "alias", "org/support", "prod", "1") == "org/support@prod -> version 1\n"
    split = shell.ok("adapters", "alias", "org/support", "prod", "1=0.75,3=0.25")
    assert split == "org/support@prod -> 75% version 1 + 25% version 3\n"
    assert shell.ok("adapters", "alias", "org/support", "prod") == split
    assert shell.ok("adapters", "rollback", "org/support", "--alias", "prod") == "org/support@prod -> version 1\n"
    assert shell.ok("adapters", "rollback", "org/support") == "org/support@default -> version 2\n"
    assert shell.ok("adapters", "pin", "org/support") == "org/support on tiny: version 2, pinned\n"

    assert "org/support  tiny  version 2  3" in shell.ok("adapters", "list", "--base", "tiny")
    shown = shell.ok("adapters", "show", "org/support")
    assert shown.startswith("org/support on tiny, pinned\n  default -> version 2\n  prod -> version 1\nVERSION")
    assert len(json.loads(shell.ok("adapters", "show", "org/support", "--json"))["versions"]) == 3

    target = tmp_path / "out.tar.gz"
    assert shell.ok("adapters", "download", "org/support", "--version", "1", "-o", str(target)) == f"{target}\n"
    with tarfile.open(target) as tar:
        weights = tar.extractfile("adapter_model.safetensors")
        assert weights is not None
        assert weights.read() == (one / "adapter_model.safetensors").read_bytes()

    assert shell.ok("adapters", "alias", "org/support", "prod", "--delete") == "org/support@prod is deleted\n"
    assert shell.ok("adapters", "remove", "org/support@1") == "org/support@1 is removed\n"
    assert shell.ok("adapters", "remove", "org/support") == "org/support is removed\n"
    assert shell.run("adapters", "list") == (0, "", "The server has no adapters.\n")


def test_an_adapter_by_a_path_of_the_server(shell: Shell, make_adapter: MakeAdapter) -> None:
    folder = make_adapter(1)
    assert shell.ok("adapters", "add", "support", str(folder), "--on-server") == "support on tiny: version 1\n"
    assert json.loads(shell.ok("adapters", "show", "support", "--json"))["versions"][0]["origin"] == "path"


def test_adapters_that_cannot_be_added_or_changed(shell: Shell, tmp_path: Path) -> None:
    assert "does not exist here" in shell.error("adapters", "add", "a", "./nowhere")
    (tmp_path / "empty").mkdir()
    refusal = shell.error("adapters", "add", "a", str(tmp_path / "empty"))
    assert "has no adapter_config.json and no adapter_model" in refusal
    assert "'many' is no target" in shell.error("adapters", "alias", "a", "prod", "many")
    assert "not both" in shell.error("adapters", "alias", "a", "prod", "1", "--delete")
    for command in (["show", "a"], ["remove", "a"], ["rollback", "a"], ["pin", "a"], ["download", "a"]):
        assert "'a'" in shell.error("adapters", *command)
    assert not list(Path.cwd().glob("a.tar.gz*"))


def test_one_question_and_its_answer(shell: Shell, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shell.ok("chat", "Who are you?", "--model", "tiny") == "Hello from the base model.\n"
    shell.ok("adapters", "add", "support", str(make_adapter(1)), "--base", "tiny")
    answer = shell.ok("chat", "Who are you?", "-m", "support", "--system", "Be kind.", "--temperature", "0")
    assert answer == "Hello from support@1.\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("Who are you?\n"))
    assert shell.ok("chat", "--max-tokens", "5", "--model", "tiny").startswith("Hello")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9?"), encoding="utf-8"))
    assert "no UTF-8 text" in shell.error("chat", "--model", "tiny")
    assert "no UTF-8 text" in shell.error("chat", "caf\udce9?", "--model", "tiny")  # as Python reads it from arguments
    assert "The model 'nobody' does not exist" in shell.error("chat", "Hi", "-m", "nobody")


def test_a_conversation(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["Hi", "", "/clear", "Again", "/exit"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("rich.console.Console.input", lambda *_: next(lines))
    shell.ok("models", "load", "tiny")
    status, out, err = shell.run("chat")
    assert (status, out) == (0, "Hello from the base model.\n" * 2)
    assert "Chatting with tiny." in err


def test_a_key_is_sent(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["keys", "create", "ann", "--scope", "admin", "--home", str(tmp_path / "home")])
    secret = capsys.readouterr().out.strip()
    while shell.run("models", "list")[0] == 0:  # the server may hold "no keys yet" for CACHE_SECONDS
        time.sleep(0.1)
    assert "API key" in shell.error("models", "list", "--api-key", "tl-wrong")
    assert "MODEL" in shell.ok("models", "list", "--api-key", secret)
    monkeypatch.setenv("TUNELOOP_API_KEY", secret)
    assert "MODEL" in shell.ok("models", "list")
