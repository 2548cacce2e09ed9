"""The documentation tells the truth: links lead somewhere, blocks are valid, what is named exists."""

import ast
import configparser
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from starlette.routing import Match
from tuneloop.server.app import create_app
from tuneloop.server.cli import build_app
from tuneloop.server.settings import Settings
from tuneloop.server.settings_sources import CONFIG_VARIABLE

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
READMES = (ROOT / "README.md", ROOT / "README.zh.md")
RUN_TAGS = ["serve", "test", "curl", "sdk", "adapter-upload", "adapter-replace", "adapter-alias", "tune", "tune-cli"]

BLOCK = re.compile(r"(?:<!-- run: ([\w-]+) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
TEST_VARIABLES = {"TUNELOOP_TEST_HOME"}  # read by tests/integration/conftest.py
VARIABLE = re.compile(r"\bTUNELOOP_[A-Z_]+\b")
BASE_URL = "http://127.0.0.1:8000"
# Tools that the pages may call beside our own, and variables that only the command line knows.
TOOLS = {"curl", "make", "tar", "venv/bin/pip", "python3.11"}
CLIENT_VARIABLES = {"TUNELOOP_URL", CONFIG_VARIABLE}

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def blocks(page: Path, language: str) -> list[str]:
    return [code for _, found, code in BLOCK.findall(page.read_text("utf-8")) if found == language]


def commands(page: Path) -> Iterator[list[str]]:
    for code in blocks(page, "sh"):
        lexer = shlex.shlex(code.replace("\\\n", " "), posix=True, punctuation_chars=";\n")
        lexer.whitespace = " \t\r"
        lexer.whitespace_split = True
        lexer.commenters = "#"
        words: list[str] = []
        for token in lexer:
            if set(token) <= {";", "\n"}:
                if words:
                    yield words
                words = []
            else:
                words.append(token)
        if words:
            yield words


def anchors(page: Path) -> set[str]:
    """GitHub's ids of a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@by_page
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(page.read_text("utf-8")):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@by_page
def test_python_compiles(page: Path) -> None:
    for code in blocks(page, "python"):
        ast.parse(code, filename=page.name)


@by_page
def test_commands_are_ones_that_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    variables = set(re.findall(r"^([A-Z_]+) \?=", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for words in commands(page):
        name = words[0].rpartition("/")[2] if words[0].endswith("/tuneloop") else words[0]
        assert name in TOOLS | {"tuneloop"}, words
        if name == "make":
            given = {word.partition("=")[0] for word in words[1:] if "=" in word}
            assert given <= variables | {"PYTEST_ARGS", "SERVE_ARGS", "BENCH_ARGS", "PIP_EXTRA_INDEX_URL"}, words
            assert {word for word in words[1:] if "=" not in word} <= targets, words
        elif name == "tuneloop":
            parse_command_line(words[1:])


def parse_command_line(arguments: list[str]) -> None:
    """Raises click's UsageError for an unknown command, option or argument. Nothing is run."""
    command: Any = typer.main.get_command(build_app())
    context = command.make_context("tuneloop", list(arguments))
    while hasattr(command, "resolve_command"):  # a group: what is left over names one of its commands
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)


@by_page
def test_curl_calls_an_endpoint_with_valid_json(page: Path) -> None:
    app = create_app(Settings())
    for words in commands(page):
        if words[0] != "curl":
            continue
        (url,) = (word for word in words if word.startswith("http"))
        assert url.startswith(BASE_URL), url
        after = dict(itertools.pairwise(words))
        has_body = "-d" in words or "-F" in words
        method = after.get("-X", "POST" if has_body else "GET")
        scope = {"type": "http", "method": method, "path": url.removeprefix(BASE_URL), "headers": []}
        assert any(route.matches(scope)[0] is Match.FULL for route in app.routes), f"{method} {url}"
        if "-d" in words:
            assert isinstance(json.loads(after["-d"]), dict)
            assert "Content-Type: application/json" in words, words


@by_page
def test_variables_are_settings(page: Path) -> None:
    known = {f"TUNELOOP_{name.upper()}" for name in Settings.model_fields} | CLIENT_VARIABLES | TEST_VARIABLES
    used = {name for name in VARIABLE.findall(page.read_text("utf-8")) if not name.endswith("_")}
    assert used - known == set()


@pytest.mark.parametrize(
    "arguments", [["no-such-command"], ["adapters", "add", "name"], ["serve", "--no-such-flag"]], ids=" ".join
)
def test_a_wrong_command_line_would_be_found(arguments: list[str]) -> None:
    with pytest.raises(typer.TyperException):
        parse_command_line(arguments)


@pytest.mark.parametrize("page", READMES, ids=lambda page: page.name)
def test_each_readme_block_says_how_it_is_run(page: Path) -> None:
    assert [tag for tag, _, _ in BLOCK.findall(page.read_text("utf-8"))] == RUN_TAGS
    text = page.read_text("utf-8")
    assert text.count("<!-- bench -->") == text.count("<!-- /bench -->") == 1


def test_both_readmes_run_the_same() -> None:
    english, chinese = (BLOCK.findall(page.read_text("utf-8")) for page in READMES)
    assert english == chinese


def test_both_readmes_link_to_the_same_pages() -> None:
    english, chinese = (set(LINK.findall(page.read_text("utf-8"))) - {"README.md", "README.zh.md"} for page in READMES)
    assert english == chinese


def test_the_architecture_covers_every_folder_and_names_real_files() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    packages = ("server", "finetune", "engines", "adapters", "storage")
    folders = {
        f"{path.parent.relative_to(ROOT).as_posix()}/" for top in packages for path in (ROOT / top).rglob("*.py")
    }
    table = set(re.findall(r"`([^`]+/)`", text.partition("## Folder by folder")[2]))
    assert folders - table == set()
    assert {name for name in table if not (ROOT / name).is_dir()} == set()
    files = {path.name for top in packages for path in (ROOT / top).rglob("*.py")}
    paths = {path.relative_to(ROOT).as_posix() for top in packages for path in (ROOT / top).rglob("*.py")}
    named = set(re.findall(r"`([\w/]+\.py)`", text))
    assert {name for name in named if name not in (paths if "/" in name else files)} == set()


def test_the_systemd_unit_starts_a_command_that_exists() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(ROOT / "deploy/tuneloop.service")
    program, *arguments = shlex.split(unit["Service"]["ExecStart"])
    assert program.endswith("/bin/tuneloop")
    parse_command_line(arguments)
    known = {f"TUNELOOP_{name.upper()}" for name in Settings.model_fields}
    assert set(VARIABLE.findall((ROOT / "deploy/tuneloop.service").read_text("utf-8"))) - {"TUNELOOP_"} <= known
