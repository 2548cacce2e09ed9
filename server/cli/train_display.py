"""Shows how a training run goes: a bar on a terminal, plain lines elsewhere, or one JSON object an event.

Everything for people goes to stderr. It knows neither trainer nor server; both ways to train feed it.
"""

import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from .console import console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_LINE_SECONDS = 5.0
_STYLES = {"warn": "yellow", "error": "red"}


class TrainDisplay(ABC):
    """Close it when the run ends, whichever way."""

    @abstractmethod
    def message(self, text: str, level: str = "info") -> None:
        """Something that a person should know."""

    @abstractmethod
    def total(self, steps: int) -> None:
        """How many steps there will be."""

    @abstractmethod
    def metrics(self, data: Mapping[str, Any]) -> None:
        """A point of the curves: `step` and what was measured, by the event log's names."""

    def raw(self, event: Mapping[str, Any]) -> None:
        """The event itself, for programs."""
        return

    def result(self, text: str) -> None:
        """What the run made, alone on stdout, for scripts."""
        self.close()
        console().print(text, soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal as it was. Safe to repeat."""
        return


def open_display(*, as_json: bool) -> TrainDisplay:
    if as_json:
        return JsonDisplay()
    err = console(stderr=True)
    return LiveDisplay(err) if err.is_terminal else LineDisplay(err)


class JsonDisplay(TrainDisplay):
    """Events on stdout as they come, one a line; remarks of the command itself are left out."""

    def message(self, text: str, level: str = "info") -> None:
        return

    def total(self, steps: int) -> None:
        return

    def metrics(self, data: Mapping[str, Any]) -> None:
        return

    def raw(self, event: Mapping[str, Any]) -> None:
        sys.stdout.write(json.dumps(event, ensure_ascii=False) + "\n")
        sys.stdout.flush()

    def result(self, text: str) -> None:
        return  # the events tell it


class LineDisplay(TrainDisplay):
    """For logs: messages, and a line of measures every few seconds, at validations and at the end."""

    def __init__(self, out: "Console") -> None:
        self._out = out
        self._total: int | None = None
        self._next = 0.0

    def message(self, text: str, level: str = "info") -> None:
        self._out.print(text, style=_STYLES.get(level), soft_wrap=True)

    def total(self, steps: int) -> None:
        self._total = steps

    def metrics(self, data: Mapping[str, Any]) -> None:
        step = data["step"]
        if time.monotonic() < self._next and step != self._total and "valid_loss" not in data:
            return
        self._next = time.monotonic() + _LINE_SECONDS
        of = "" if self._total is None else f"/{self._total}"
        self._out.print(f"step {step}{of}  {facts(data)}", soft_wrap=True)


class LiveDisplay(TrainDisplay):
    """A bar that stays at the bottom, with messages above it."""

    def __init__(self, out: "Console") -> None:
        self._out = out
        self._bar: Progress | None = None
        self._total: int | None = None
        self._known: dict[str, Any] = {}

    def message(self, text: str, level: str = "info") -> None:
        target = self._out if self._bar is None else self._bar.console
        target.print(text, style=_STYLES.get(level), soft_wrap=True)

    def total(self, steps: int) -> None:
        self._total = steps
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], total=steps)

    def metrics(self, data: Mapping[str, Any]) -> None:
        self._known |= data  # validation and training are measured at different steps
        if self._bar is None:
            self._bar = self._open_bar()
        self._bar.update(self._bar.task_ids[0], completed=data["step"], facts=facts(self._known))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _open_bar(self) -> "Progress":
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}", markup=False)
        bar = Progress(*columns, console=self._out)
        bar.add_task("training", total=self._total, facts="")
        bar.start()
        return bar


def facts(data: Mapping[str, Any]) -> str:
    """The measures that a person looks at, in one short line."""
    parts = [
        f"{label} {data[key]:{form}}"
        for key, label, form in (
            ("epoch", "epoch", ".2f"),
            ("train_loss", "loss", ".4f"),
            ("full_valid_loss", "valid", ".4f"),
            ("valid_loss", "valid", ".4f"),
            ("learning_rate", "lr", ".2e"),
        )
        if data.get(key) is not None and not (key == "valid_loss" and data.get("full_valid_loss") is not None)
    ]
    if data.get("tokens_per_second"):
        parts.append(f"{data['tokens_per_second']:,.0f} tokens/s")
    if data.get("eta_seconds") is not None:
        parts.append(f"{timedelta(seconds=round(data['eta_seconds']))} left")
    return "  ".join(parts)
