"""The event log of a run: one JSON object a line, appended by the trainer, read by whoever wants to know.

The log survives both sides: a line counts once its newline is there, and a reader keeps its own place in bytes. It
knows nothing of jobs, databases and what happens because of an event.

Kinds and their `data` (steps count optimiser steps from 1; times are seconds):

    prepared    rows, tokens, supervised_tokens, eval_rows, too_long, dropped, truncated, digest, total_steps,
                hyperparameters (what `auto` became)
    started     attempt, step (where it goes on from), total_steps, parameters, trainable_parameters, dtype, devices
    metrics     step, epoch, and any of: train_loss, train_mean_token_accuracy, learning_rate, grad_norm, valid_loss,
                valid_mean_token_accuracy, full_valid_loss, full_valid_mean_token_accuracy, tokens (trained so far),
                tokens_per_second, eta_seconds
    checkpoint  step, path (relative to the run's folder), kind ("adapter" or "model"), metrics, gone (steps whose
                checkpoints were removed for it)
    message     anything else a person should know
    result      kind, path (relative, or absolute where a recipe named it), step, metrics, trained_tokens, seconds
    finished    nothing is left to do; the last line of a run that succeeded
    stopped     reason ("pause", "cancel" or "interrupted"), step: everything is saved, the process ends
    failed      code, param, line; `message` says why and what to do
"""

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

Kind = Literal[
    "prepared", "started", "metrics", "checkpoint", "message", "result", "finished", "stopped", "failed"
]  # fmt: skip
Level = Literal["info", "warn", "error"]
FINAL: frozenset[str] = frozenset({"finished", "stopped", "failed"})
_READ_BYTES = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Event:
    """`at` is in seconds since the epoch; `end` is the place in the log, in bytes, behind this event."""

    kind: Kind
    message: str = ""
    level: Level = "info"
    data: Mapping[str, Any] = field(default_factory=dict)
    at: float = 0.0
    end: int = 0


class EventWriter:
    """The one writer of a log. A torn last line of a writer that was killed is cut off first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        _cut_torn_line(path)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def write(self, kind: Kind, message: str = "", /, *, level: Level = "info", **data: Any) -> None:
        """Append one event in one write; what changes a run's state (not mere metrics) is on the disk on return."""
        line = json.dumps({"at": time.time(), "kind": kind, "level": level, "message": message, "data": data})
        os.write(self._file, line.encode() + b"\n")
        if kind not in ("metrics", "message"):
            os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


def read_events(path: Path, offset: int = 0) -> Iterator[Event]:
    """The complete events from byte `offset` on. A log that does not exist yet has none."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                fields = json.loads(line)
                if fields["kind"] in get_args(Kind):
                    yield Event(**fields, end=offset)
    except FileNotFoundError:
        return


def metrics_by_step(events: Iterable[Event]) -> dict[int, dict[str, float]]:
    """All metrics of each step. A step that was done twice, before and after a crash, counts as it was last."""
    steps: dict[int, dict[str, float]] = {}
    for event in events:
        if event.kind == "metrics":
            steps.setdefault(int(event.data["step"]), {}).update(event.data)
    return dict(sorted(steps.items()))


def _cut_torn_line(path: Path) -> None:
    try:
        with path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            start = max(0, size - _READ_BYTES)
            file.seek(start)
            file.truncate(start + file.read().rfind(b"\n") + 1)
    except FileNotFoundError:
        return
