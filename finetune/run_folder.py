"""A run's folder: where its spec, data, event log, checkpoints and result lie, and who is alive in it.

    spec.json       what to do (RunSpec); written once, by whoever starts the run
    events.jsonl    what happened (events.py); written by the run's own processes only
    control         "pause" or "cancel", read by the trainer between two steps
    devices.json    the devices that whoever started this attempt gave it; absent: the spec's
    lock            held by the run's process for as long as it lives; the kernel lets go of it even at kill -9
    log.txt         everything the processes print
    data/           the tokenised rows (data/token_store.py), made by the first phase, read by the second
    checkpoints/    step-N folders, each complete or absent: an adapter or model to serve, and `state/` to resume from
    result/         the adapter or model of a run that succeeded, complete or absent

A run has two phases, each one process: `prepare` reads, checks and tokenises the data and imports no torch; `train`
does the rest. Both are `python -m tuneloop.finetune <folder> <phase>`. It knows no job, server or database.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..storage.durable import write_atomic
from ..storage.locks import lock_now
from .recipe.recipe import Recipe

Phase = Literal["prepare", "train"]
Wish = Literal["pause", "cancel"]


class DataFile(BaseModel):
    """One data file on this machine, and what a person calls it in messages."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    name: str


class RunSpec(BaseModel):
    """All that a run's processes are told. Paths are absolute; sources were fetched before.

    `train_files` and `eval_files` replace the recipe's `dataset` and `eval_dataset` when a job brings its files; a run
    from a recipe alone leaves them empty. `auto` lists recipe keys that `prepare` is to choose by the data.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    recipe: Recipe
    auto: tuple[str, ...] = ()
    learning_rate_multiplier: float = 1.0  # OpenAI's; applies where learning_rate is `auto`
    base_name: str  # what adapters call their base model
    model_path: Path  # checkpoint folder of the base
    adapter_path: Path | None = None  # PEFT folder to go on from
    train_files: tuple[DataFile, ...] = ()
    eval_files: tuple[DataFile, ...] = ()
    cache: Path | None = None  # where tokenised data is kept for later runs
    home: Path | None = None  # for data sources that are fetched
    result: Path | None = None  # where the result goes instead of result/
    device: str | None = None  # torch's name; None: whatever accelerator there is, else the CPU
    devices: tuple[str, ...] = ()  # of a run with several processes, one each
    threads: int | None = None
    nice: int = 0
    metadata: Mapping[str, Any] = Field(default_factory=dict)  # lineage, written beside the result


class RunFolder:
    """Paths and small atomic files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def result(self) -> Path:
        return self.path / "result"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    def create(self, spec: RunSpec) -> None:
        """Make the folder with its spec; a folder that has one already is left as it is."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "spec.json").exists():
            self._write("spec.json", spec.model_dump_json(indent=1))

    def spec(self) -> RunSpec:
        return RunSpec.model_validate_json((self.path / "spec.json").read_bytes())

    def want(self, wish: Wish | None) -> None:
        """Ask the trainer to stop between two steps, or take that back."""
        if wish is None:
            (self.path / "control").unlink(missing_ok=True)
        else:
            self._write("control", wish)

    def wanted(self) -> Wish | None:
        try:
            text = (self.path / "control").read_text()
        except FileNotFoundError:
            return None
        return "pause" if text == "pause" else "cancel"

    def place(self, devices: Sequence[str]) -> None:
        """Say on which devices the next attempt runs, one a process."""
        self._write("devices.json", json.dumps(list(devices)))

    def placement(self) -> tuple[str, ...]:
        """The devices of this attempt; empty if nobody has chosen any."""
        try:
            return tuple(json.loads((self.path / "devices.json").read_text()))
        except FileNotFoundError:
            return ()

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, in order."""
        if not self.checkpoints.is_dir():
            return []
        return sorted(int(p.name[5:]) for p in self.checkpoints.glob("step-*") if p.name[5:].isdigit())

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step}"

    def take_lock(self) -> int:
        """A file descriptor that holds the lock, to be handed to the run's process (`pass_fds`) and then closed.

        The lock lives as long as any process holds the descriptor. Raises BlockingIOError while a process lives.
        """
        return lock_now(self.lock, os.O_RDWR | os.O_CREAT)

    def alive(self) -> bool:
        """Whether a process of this run lives on this machine."""
        try:
            os.close(self.take_lock())
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        return False

    def _write(self, name: str, text: str) -> None:
        write_atomic(self.path / name, text)
