"""Trains on this machine without a server: model, folder, both phases, and what Ctrl-C means."""

import asyncio
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .console import CliError
from .local import explained, read_settings, run
from .train_display import TrainDisplay
from .train_folder import open_run
from .train_spec import local_spec

if TYPE_CHECKING:
    from ...finetune.events import Event
    from ...finetune.recipe.recipe import Recipe
    from ...finetune.run_folder import Phase, RunFolder, RunSpec

STOPPED = 130  # what shells give for Ctrl-C
PREPARED = "prepared.json"  # in a run's data folder once its first phase has ended
_LOOK_SECONDS = 0.1
_ONE_WISH_SECONDS = 0.3


class LocalTraining:
    """One `tuneloop train` on this machine; `command` is what to type again to go on."""

    def __init__(self, display: TrainDisplay, *, command: str) -> None:
        self._display = display
        self._command = command
        self._stops = 0
        self._offset = 0
        self._last: Event | None = None

    def train(self, spec: "RunSpec", folder: "RunFolder") -> int:
        """Run what is left of both phases. Gives the command's exit status."""
        folder.create(spec)
        folder.want(None)
        self._offset = folder.events.stat().st_size if folder.events.exists() else 0
        with self._signals():
            return run(self._phases(spec, folder))

    async def _phases(self, spec: "RunSpec", folder: "RunFolder") -> int:
        if not (folder.data / PREPARED).is_file():
            self._display.message("Reading and checking the data ...")
            why = await self._phase(spec, folder, "prepare")
            if self._ended or self._stops or not (folder.data / PREPARED).is_file():
                return self._status(spec, folder, why)
        for left in range(spec.recipe.max_retries, -1, -1):
            why = await self._phase(spec, folder, "train")
            if self._ended or self._stops or not left:
                break
            steps = folder.steps()
            where = f"from its checkpoint at step {steps[-1]}" if steps else "from the beginning"
            self._display.message(f"{why} It is started again {where}.", "warn")
        return self._status(spec, folder, why)

    async def _phase(self, spec: "RunSpec", folder: "RunFolder", phase: "Phase") -> str:
        """Start a phase and show its events to its end. Gives the launcher's sentence on how it ended."""
        from ...finetune.launchers import LocalLauncher

        launcher = LocalLauncher()
        handle = await launcher.start(
            folder, phase, processes=spec.recipe.num_processes if phase == "train" else 1, threads=spec.threads
        )
        seen = self._stops
        while await launcher.alive(folder, handle):
            if self._stops > seen:
                seen = self._stops
                if phase == "train" and seen == 1:
                    self._display.message("Saving a checkpoint; press Ctrl-C again to end at once.", "warn")
                    folder.want("pause")
                else:
                    await launcher.stop(folder, handle, force=seen > 1)
            await asyncio.sleep(_LOOK_SECONDS)
            self._show_new(folder)
        self._show_new(folder)
        return await launcher.exit_reason(folder, handle)

    @property
    def _ended(self) -> bool:
        """Whether the run itself said that nothing is to be started again."""
        from ...finetune.events import FINAL

        return self._last is not None and self._last.kind in FINAL

    def _status(self, spec: "RunSpec", folder: "RunFolder", why: str) -> int:
        """The exit status, after telling how it ended. Raises CliError if it failed."""
        self._display.close()
        last = None if self._last is None else self._last.kind
        if last == "failed":
            raise CliError(self._last.message)  # type: ignore[union-attr]
        if last == "finished":
            return self._finished(spec)
        if last == "stopped" or self._stops:
            return self._stopped(folder)
        raise CliError(f"{why} All that it printed is in {folder.log}.")

    def _stopped(self, folder: "RunFolder") -> int:
        steps = folder.steps()
        saved = f"The last checkpoint is of step {steps[-1]}." if steps else "No checkpoint was saved."
        self._display.message(f"Stopped. {saved} Go on with: {self._command} resume_from_checkpoint=true")
        return STOPPED

    def _finished(self, spec: "RunSpec") -> int:
        self._display.message(f"The result is in {spec.result}. {_how_to_serve(spec)}")
        self._display.result(str(spec.result))
        return 0

    def _show_new(self, folder: "RunFolder") -> None:
        from ...finetune.events import read_events

        for event in read_events(folder.events, self._offset):
            self._offset, self._last = event.end, event
            self._show(event)

    def _show(self, event: "Event") -> None:
        self._display.raw(
            {
                "at": event.at, "kind": event.kind, "level": event.level, "message": event.message,
                "data": dict(event.data),
            }
        )  # fmt: skip
        data = event.data
        if data.get("total_steps") is not None:
            self._display.total(int(data["total_steps"]))
        if event.kind == "metrics":
            self._display.metrics(data)
        elif event.kind != "failed":
            text = describe(event)
            if text:
                self._display.message(text, event.level)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        last = 0.0

        def stop(*_: object) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last > _ONE_WISH_SECONDS:  # several signals at once, as of a service manager, are one wish
                self._stops += 1
            last = now

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def describe(event: "Event") -> str:
    """What a person is told of an event; its own message where there is nothing to add."""
    data = event.data
    if event.kind == "prepared" and data.get("total_steps"):
        chosen = ", ".join(f"{key} {value:g}" for key, value in (data.get("hyperparameters") or {}).items())
        parts = [f"{data.get('rows', 0):,} rows", f"{data.get('tokens', 0):,} tokens", f"{data['total_steps']:,} steps"]
        left_out = [f"{data[key]:,} {key}" for key in ("truncated", "dropped") if data.get(key)]
        return f"Data: {', '.join(parts + left_out)}." + (f" Chosen by the data: {chosen}." if chosen else "")
    if event.kind == "started" and data.get("parameters"):
        return (
            f"{event.message} {data.get('trainable_parameters', 0):,} of {data['parameters']:,} parameters, "
            f"{data.get('dtype', '')} on {', '.join(data.get('devices') or ())}."
        )
    return event.message


def _how_to_serve(spec: "RunSpec") -> str:
    is_model = spec.recipe.finetuning_type != "lora" or bool(spec.recipe.additional_target)
    if is_model:
        return f"Serve it with: tuneloop serve {spec.result}"
    return f"Serve it with: tuneloop adapters add NAME {spec.result} --base {spec.base_name}"


def train_here(
    recipe: "Recipe", auto: Sequence[str], *, display: TrainDisplay, home: Path | None, device: str | None, command: str
) -> int:
    """Train by a recipe on this machine. Raises CliError."""
    from ...finetune.recipe.checks import require_data

    with explained():
        require_data(recipe, train=bool(recipe.dataset), validation=bool(recipe.eval_dataset))
    if recipe.output_dir is None:
        raise CliError("The recipe does not say where the result goes; set output_dir.")
    settings = read_settings(home, None)
    output = Path(recipe.output_dir).expanduser().absolute()
    spec = run(local_spec(recipe, auto, settings, output=output, device=device))
    return LocalTraining(display, command=command).train(spec, open_run(output, spec))
