"""What a launcher is: it starts the processes of a run, somewhere. It knows no job and no database."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from ..run_folder import Phase, RunFolder

Handle = Mapping[str, Any]  # JSON: kept by the caller, understood by the launcher that made it


class Launcher(ABC):
    """The trainer is the same program wherever it runs. What was started goes on when the server ends, and is found
    again by its handle.
    """

    name: ClassVar[str]

    @abstractmethod
    async def start(self, run: RunFolder, phase: Phase, *, processes: int = 1, threads: int | None = None) -> Handle:
        """Start one phase and return at once. What is left of one that was killed is ended first.

        Raises Unavailable if it cannot be started, Conflict if one runs, NotFound if the run's folder is gone.
        """

    @abstractmethod
    async def find(self, run: RunFolder) -> Handle | None:
        """The handle of a phase that lives though nobody kept it: its starter was killed in that very moment."""

    @abstractmethod
    async def alive(self, run: RunFolder, handle: Handle) -> bool:
        """Whether any process of the phase still lives."""

    @abstractmethod
    async def exit_reason(self, run: RunFolder, handle: Handle) -> str:
        """One sentence on how a phase that is no longer alive ended, as far as can be told."""

    @abstractmethod
    async def stop(self, run: RunFolder, handle: Handle, *, force: bool = False) -> None:
        """Ask the phase to save and end, or end all of its processes (`force`). Safe when nothing lives."""
