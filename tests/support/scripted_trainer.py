"""A launcher whose processes are scripts of this test: they write events as they are told, and no model is loaded."""

import asyncio
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuneloop.finetune.events import EventWriter
from tuneloop.finetune.launchers import Handle, Launcher
from tuneloop.finetune.run_folder import Phase, RunFolder

PREPARED: dict[str, Any] = {"rows": 4, "tokens": 100, "total_steps": 4, "digest": "abc", "hyperparameters": {}}


@dataclass
class Process:
    """One started phase. `write` is the trainer speaking; `die` ends it."""

    run: RunFolder
    phase: Phase
    living: bool = True
    asked_to_stop: bool = False

    def write(self, kind: Any, message: str = "", /, **data: Any) -> None:
        writer = EventWriter(self.run.events)
        writer.write(kind, message, **data)
        writer.close()

    def die(self) -> None:
        self.living = False

    def step(self, number: int, loss: float = 1.0) -> None:
        self.write("metrics", step=number, train_loss=loss, tokens=number * 10, eta_seconds=4.0 - number)

    def checkpoint(self, step: int, adapter: Path) -> None:
        folder = self.run.checkpoint(step)
        shutil.copytree(adapter, folder)
        (folder / "state").mkdir()
        metrics = {"train_loss": 0.5}
        self.write("checkpoint", step=step, path=f"checkpoints/step-{step}", kind="adapter", metrics=metrics)

    def succeed(self, adapter: Path, step: int = 4) -> None:
        shutil.copytree(adapter, self.run.result)
        self.write(
            "result",
            kind="adapter",
            path="result",
            step=step,
            metrics={"train_loss": 0.1},
            trained_tokens=40,
            seconds=1.0,
        )
        self.write("finished")
        self.die()

    def stop(self, reason: str, step: int) -> None:
        self.write("stopped", reason=reason, step=step)
        self.die()


@dataclass
class ScriptedLauncher(Launcher):
    """Keeps its processes over restarts of the service, as a machine does. `prepares` says whether data are fine."""

    name = "scripted"
    prepares: bool = True
    processes: list[Process] = field(default_factory=list)
    started: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self, run: RunFolder, phase: Phase, *, processes: int = 1, threads: int | None = None) -> Handle:
        process = Process(run, phase)
        self.processes.append(process)
        if phase == "prepare" and self.prepares:
            process.write("prepared", **PREPARED)
            process.die()
        self.started.set()
        return {"number": len(self.processes) - 1}

    async def find(self, run: RunFolder) -> Handle | None:
        living = [n for n, process in enumerate(self.processes) if process.living and process.run.path == run.path]
        return {"number": living[-1]} if living else None

    async def alive(self, run: RunFolder, handle: Handle) -> bool:
        return self._of(handle).living

    async def exit_reason(self, run: RunFolder, handle: Handle) -> str:
        return "The trainer was killed (SIGKILL)."

    async def stop(self, run: RunFolder, handle: Handle, *, force: bool = False) -> None:
        self._of(handle).asked_to_stop = True
        if force:
            self._of(handle).die()

    @property
    def trainers(self) -> list[Process]:
        return [process for process in self.processes if process.phase == "train"]

    async def trainer(self, number: int = 0) -> Process:
        """The n-th trainer, once it has been started."""
        await until(lambda: len(self.trainers) > number)
        return self.trainers[number]

    def _of(self, handle: Mapping[str, Any]) -> Process:
        return self.processes[int(handle["number"])]


async def until(condition: Callable[[], Any], *, seconds: float = 10.0) -> None:
    """Wait until something holds. Fails after `seconds`."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def jsonl(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
