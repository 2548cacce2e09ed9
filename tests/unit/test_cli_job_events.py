"""Following a job survives a server that goes away for a while, and misses and repeats nothing."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import pytest
from tuneloop.server.cli import job_events
from tuneloop.server.cli.client import Client, Disconnected
from tuneloop.server.cli.job_events import follow
from tuneloop.server.cli.train_display import JsonDisplay, LineDisplay, LiveDisplay, TrainDisplay, facts

EVENTS = [
    {"type": "message", "level": "info", "message": "one", "seq": 1, "data": {}},
    {"type": "metrics", "level": "info", "message": "", "seq": 2, "data": {"step": 1, "train_loss": 2.0}},
    {"type": "message", "level": "info", "message": "two", "seq": 3, "data": {}},
]


class Recorder(TrainDisplay):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.steps: list[int] = []
        self.totals: list[int] = []

    def message(self, text: str, level: str = "info") -> None:
        self.said.append(text)

    def total(self, steps: int) -> None:
        self.totals.append(steps)

    def metrics(self, data: Mapping[str, Any]) -> None:
        self.steps.append(data["step"])


class Flaky:
    """A client whose connection breaks after each event, and at first altogether."""

    def __init__(self, *, back: bool = True) -> None:
        self.asked: list[int] = []
        self._back = back

    def stream_events(self, path: str, *, params: dict[str, Any]) -> Iterator[dict[str, Any]]:
        after = params["after_seq"]
        self.asked.append(after)
        if len(self.asked) % 2 or not self._back:
            raise Disconnected("No server answers at http://here.")
        yield EVENTS[after]
        if after + 1 < len(EVENTS):
            raise Disconnected("The server ended the answer before it was complete.")

    def call(self, method: str, path: str) -> dict[str, Any]:
        return {"progress": {"total_steps": 9}}


def test_each_event_is_shown_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_events, "_PAUSE_SECONDS", 0)
    client, display = Flaky(), Recorder()
    follow(cast(Client, client), "ftjob-1", display)
    assert [text for text in display.said if "Trying again" not in text] == ["one", "two"]
    assert (display.steps, display.totals) == ([1], [9])
    assert client.asked == [0, 0, 1, 1, 2, 2]


def test_a_server_that_stays_away_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_events, "_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(job_events, "_RECONNECT_SECONDS", 0.1)
    display = Recorder()
    with pytest.raises(Disconnected):
        follow(cast(Client, Flaky(back=False)), "ftjob-1", display)
    assert display.said == ["No server answers at http://here. Trying again; the job goes on."]


def test_facts_are_one_short_line() -> None:
    assert facts({"step": 3}) == ""
    data = {
        "epoch": 0.5,
        "train_loss": 1.0,
        "valid_loss": 2,
        "learning_rate": 1e-4,
        "tokens_per_second": 1e4,
        "eta_seconds": 3661,
    }
    assert facts(data) == "epoch 0.50  loss 1.0000  valid 2.0000  lr 1.00e-04  10,000 tokens/s  1:01:01 left"


def test_a_terminal_gets_a_bar_with_messages_above(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    display = LiveDisplay(Console(stderr=True, force_terminal=True, width=120, highlight=False))
    display.message("Reading ...")
    display.total(10)
    display.metrics({"step": 1, "train_loss": 2.5})
    display.metrics({"step": 5, "valid_loss": 3.5})
    display.message("Checkpoint at step 5.")
    display.total(12)
    display.result("/the/result")
    display.close()
    out, err = capsys.readouterr()
    assert out == "/the/result\n"
    assert "loss 2.5000  valid 3.5000" in err
    assert "5/12" in err
    assert err.index("Reading") < err.index("Checkpoint at step 5.")


def test_a_log_gets_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    display = LineDisplay(Console(stderr=True, width=120))
    display.total(100)
    for step in range(1, 101):
        display.metrics({"step": step, "train_loss": 1.0} | ({"valid_loss": 2.0} if step == 50 else {}))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/100", "50/100", "100/100"]


def test_programs_get_events_only(capsys: pytest.CaptureFixture[str]) -> None:
    display = JsonDisplay()
    display.message("hello")
    display.total(3)
    display.metrics({"step": 1})
    display.raw({"kind": "x"})
    display.result("y")
    assert capsys.readouterr() == ('{"kind": "x"}\n', "")
