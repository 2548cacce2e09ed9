"""`tuneloop data`: previews, statistics and checks of rows by a checkpoint's own template."""

import json
from pathlib import Path
from typing import Any

import pytest
from tuneloop.server.cli import main

from .conftest import write_checkpoint


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        main(list(arguments))
    return int(exit_info.value.code or 0)


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", "200")
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    return ["--home", str(tmp_path / "home"), "--model", str(checkpoint)]


def rows(tmp_path: Path, *answers: str) -> str:
    path = tmp_path / "rows.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]}
        for answer in answers
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_preview(tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    path = rows(tmp_path, "Hello", "Bye", "More")
    assert run("data", "preview", path, "-n", "2", "--json", *options) == 0
    shown: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [row["spans"][1] for row in shown] == [
        {"text": "Hello<|im_end|>\n", "supervised": True},
        {"text": "Bye<|im_end|>\n", "supervised": True},
    ]
    assert shown[0]["tokens"] > shown[0]["supervised_tokens"] > 0 and shown[0]["sequences"] == 1
    assert run("data", "preview", path, "cutoff_len=8", *options) == 0
    out = capsys.readouterr().out
    assert "rows.jsonl, line 1" in out and "longer than cutoff_len" in out and "<|im_start|>assistant\nHello" in out


def test_statistics(tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    path = rows(tmp_path, "Hello", "Bye " * 100)
    assert run("data", "stats", path, "cutoff_len=128", "--json", *options) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["sequences"], report["too_long"]) == (2, 1, 1)
    assert run("data", "stats", path, "cutoff_len=128", *options) == 0
    captured = capsys.readouterr()
    assert "<= 64" in captured.out and "Too long: " in captured.err and "line 2" in captured.err


def test_checks(tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("data", "check", rows(tmp_path, "Hello"), *options) == 0
    assert capsys.readouterr().out == "1 rows, and nothing is wrong with them.\n"
    assert run("data", "check", rows(tmp_path, "", "Hello", ""), *options) == 1
    out = capsys.readouterr().out
    assert "line 1" in out and "line 3" in out
    assert run("data", "check", rows(tmp_path, "Bye " * 100), "cutoff_len=64", "--json", *options) == 1
    assert "longer than cutoff_len" in json.loads(capsys.readouterr().out)["problems"][0]


def test_a_model_that_is_not_here(tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("data", "preview", rows(tmp_path, "x"), *options[:2], "--model", "smollm2-135m") == 1
    assert "tuneloop pull smollm2-135m" in capsys.readouterr().err
