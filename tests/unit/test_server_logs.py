"""Log lines: one JSON object each, whoever writes them, with the request id."""

import json
import logging
from collections.abc import Iterator

import pytest
import structlog
from tuneloop.server.logs import configure_logs


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_json_lines_of_ours_and_of_others(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("json", "info")
    with structlog.contextvars.bound_contextvars(request_id="req_1"):
        structlog.get_logger("ours").info("loaded", model="tiny")
        structlog.get_logger("ours").debug("unseen")
        logging.getLogger("theirs").warning("%s of %d", "one", 2)
        logging.getLogger("httpx").info("unseen")
    ours, theirs = lines(capsys)
    assert ours["timestamp"]
    assert {key: ours[key] for key in ("event", "model", "logger", "level", "request_id")} == {
        "event": "loaded",
        "model": "tiny",
        "logger": "ours",
        "level": "info",
        "request_id": "req_1",
    }
    assert (theirs["event"], theirs["logger"], theirs["request_id"]) == ("one of 2", "theirs", "req_1")


def test_a_traceback_stays_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("json", "info")
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        structlog.get_logger("ours").exception("failed")
    (line,) = lines(capsys)
    assert "RuntimeError: broken" in str(line["exception"])


def test_console_lines_are_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("console", "debug")
    structlog.get_logger("ours").debug("loaded", model="tiny")
    text = capsys.readouterr().err
    assert "loaded" in text
    assert "model=tiny" in text
    configure_logs("auto", "info")  # captured, so no terminal
    structlog.get_logger("ours").info("loaded")
    assert lines(capsys)[0]["event"] == "loaded"
