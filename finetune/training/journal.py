"""What a run tells while it trains: its event log, trackers, the newest metrics, the curve and the lineage.

Only one process of a run speaks; the journals of the others take everything in and say nothing. It knows no model.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ...storage.durable import write_atomic
from ..data.prepare import Prepared
from ..events import EventWriter, metrics_by_step, read_events
from ..plots import write_loss_plot
from ..run_folder import RunFolder, RunSpec
from .trackers import Tracker, open_trackers
from .trackers.base import Status

_CURVES = ("train_loss", "valid_loss")


class Journal:
    """One attempt's. `metrics` holds the newest value of each measure, over all attempts."""

    def __init__(self, run: RunFolder, spec: RunSpec, prepared: Prepared, events: EventWriter, *, speaks: bool) -> None:
        self.metrics: dict[str, float] = {}
        self._run = run
        self._spec = spec
        self._prepared = prepared
        self._events = events
        self._speaks = speaks
        self._trackers: list[Tracker] = []

    def begin(self, resumed_behind: int | None, facts: Mapping[str, Any], *, packed: bool) -> None:
        """Open the trackers, and say that training starts or goes on. Raises InvalidInput for a missing tracker."""
        if not self._speaks:
            return
        self._open_trackers()
        if not packed:
            self._events.write(
                "message",
                "This architecture computes attention in its own way, so batches run sequence by sequence, which is "
                "slower and gives the same result.",
                level="warn",
            )
        if resumed_behind is not None:
            for tracker in self._trackers:
                tracker.log(resumed_behind, {})
        goes_on = f"Training goes on after step {resumed_behind}."
        self._events.write(
            "started",
            "Training starts." if resumed_behind is None else goes_on,
            step=resumed_behind or 0,
            total_steps=self._prepared.total_steps,
            **facts,
        )

    def measure(self, step: int, epoch: float | None, metrics: Mapping[str, float]) -> None:
        """A point of the curves; `epoch` is None where nobody knows it."""
        self.metrics |= metrics
        if not self._speaks:
            return
        known = dict(metrics) if epoch is None else {"epoch": epoch, **metrics}
        data: dict[str, Any] = {"step": step, **known}
        self._events.write("metrics", **data)
        for tracker in self._trackers:
            tracker.log(step, known)

    def checkpoint(self, step: int, path: Path, *, kind: str, gone: list[int]) -> None:
        """A checkpoint is complete; those of the steps `gone` made room for it."""
        self._events.write(
            "checkpoint",
            f"Checkpoint at step {step}.",
            step=step,
            path=str(path.relative_to(self._run.path)),
            kind=kind,
            metrics=dict(self.metrics),
            gone=gone,
        )

    def stopped(self, step: int, reason: str) -> None:
        """The run ends before its time, because somebody asked for that."""
        self.close_trackers("stopped")
        if self._speaks:
            self._events.write("stopped", f"Stopped after step {step}.", reason=reason, step=step)

    def result(self, step: int, folder: Path, *, kind: str, tokens: int, seconds: float) -> None:
        """The result is complete. Whoever waits for it hears of it first; the curve and the trackers come after."""
        inside = folder.is_relative_to(self._run.path)
        self._events.write(
            "result",
            f"The result is saved after step {step}.",
            kind=kind,
            path=str(folder.relative_to(self._run.path)) if inside else str(folder),
            step=step,
            metrics=dict(self.metrics),
            trained_tokens=tokens,
            seconds=seconds,
        )
        self._write_lineage(step, tokens, seconds)
        if self._prepared.recipe.plot_loss:
            self._plot()
        self.close_trackers("finished")
        self._events.write("finished", "The run is complete.")

    def close_trackers(self, status: Status) -> None:
        """Safe to repeat."""
        for tracker in self._trackers:
            tracker.finish(status)
        self._trackers = []

    def _open_trackers(self) -> None:
        recipe = self._prepared.recipe
        self._trackers = open_trackers(
            recipe.report_to,
            folder=Path(recipe.logging_dir) if recipe.logging_dir else self._run.path / "trackers",
            run_name=recipe.run_name or self._run.path.name,
            config=recipe.model_dump(mode="json"),
            options=dict(self._spec.metadata.get("trackers") or {}),
            warn=partial(self._events.write, "message", level="warn"),
            metadata={name: value for name, value in self._spec.metadata.items() if name != "trackers"},
        )

    def _plot(self) -> None:
        steps = metrics_by_step(read_events(self._run.events))
        curves = {name: [(step, found[name]) for step, found in steps.items() if name in found] for name in _CURVES}
        write_loss_plot(
            {name: points for name, points in curves.items() if points},
            (self._spec.result or self._run.path) / "training_loss.svg",
        )

    def _write_lineage(self, step: int, tokens: int, seconds: float) -> None:
        facts = {
            "base": self._spec.base_name,
            "data_digest": self._prepared.digest,
            "recipe": self._prepared.recipe.model_dump(mode="json"),
            "step": step,
            "trained_tokens": tokens,
            "seconds": seconds,
            "metrics": self.metrics,
        } | dict(self._spec.metadata)
        write_atomic(self._run.path / "lineage.json", json.dumps(facts, indent=1, default=str))
