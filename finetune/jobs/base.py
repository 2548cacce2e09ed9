"""What a job is, and what jobs need of those around them. It knows no HTTP, no process and no query.

States, and OpenAI's word for each:

    validating  validating_files   `prepare` runs: the data are read, checked and tokenised
    queued      queued             waits for a device
    running     running            a trainer works on it
    pausing     running            asked to pause; the trainer saves and ends
    paused      queued             waits for a person (`paused: true` on the wire: the SDK knows no such status)
    publishing  running            the trainer is done, its result is being made live
    succeeded, failed, cancelled   the end
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from ...adapters.base import AdapterVersion
from ..run_folder import Phase, RunFolder

State = Literal[
    "validating", "queued", "running", "pausing", "paused", "publishing", "succeeded", "failed", "cancelled"
]  # fmt: skip
ENDED: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})
Handle = Mapping[str, Any]  # JSON: kept in the database, understood by the launcher that made it


class Launcher(ABC):
    """Starts the processes of a run, somewhere. The trainer is the same program wherever it runs.

    What it started goes on when the server ends, and is found again by its handle.
    """

    name: str

    @abstractmethod
    async def start(self, run: RunFolder, phase: Phase, *, processes: int = 1, threads: int | None = None) -> Handle:
        """Start one phase and return at once. Raises Unavailable if it cannot be started, Conflict if one runs."""

    @abstractmethod
    async def alive(self, run: RunFolder, handle: Handle) -> bool:
        """Whether any process of the phase still lives."""

    @abstractmethod
    async def exit_reason(self, run: RunFolder, handle: Handle) -> str:
        """One sentence on how a phase that is no longer alive ended, as far as the launcher can tell (exit status,
        signal, the kernel's out-of-memory killer, the last lines of its log)."""

    @abstractmethod
    async def stop(self, run: RunFolder, handle: Handle, *, force: bool = False) -> None:
        """Ask all processes to save and end (SIGTERM), or end them (`force`). Safe when nothing lives."""


class Publisher(Protocol):
    """Makes results live. The server implements it over its adapter and model services."""

    async def publish_adapter(
        self,
        folder: Path,
        *,
        name: str,
        base: str,
        source: str,
        metrics: Mapping[str, Any],
        metadata: Mapping[str, Any],
    ) -> AdapterVersion:
        """Publish a PEFT folder as the version of a new adapter `name` (the same content again gives the version that
        exists) and return when a request for it would be answered at once. Raises TuneloopError."""
        ...

    async def publish_model(self, folder: Path, *, name: str, metadata: Mapping[str, Any]) -> None:
        """Make a checkpoint folder, which stays where it is, a base model `name`. Raises TuneloopError."""
        ...
