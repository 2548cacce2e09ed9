"""What a tracker is. It knows step numbers and metrics, not where they come from."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Status = Literal["finished", "stopped", "failed"]
Warn = Callable[[str], None]


class Options(BaseModel):
    """Where a tracker files the run. An empty `name` is the run's own name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    project: str | None = None
    entity: str | None = None
    name: str | None = None
    tags: tuple[str, ...] = ()


class Tracker(ABC):
    """One run in one tracker. Methods may raise anything; `Guarded` turns that into one warning.

    A tracker is made before its package is imported and does nothing until `start`. It writes below `folder` only,
    never asks anybody anything, and uses the network only where the user has logged in to its service.
    """

    def __init__(self, folder: Path, options: Options, warn: Warn) -> None:
        self.folder = folder
        self.options = options
        self.warn = warn

    @abstractmethod
    def start(self, run_name: str, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        """Begin the run, or go on with it where an earlier attempt in the same folder began it."""

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of one optimiser step, counted from 1. No metrics: the run resumes behind that step."""

    @abstractmethod
    def finish(self, status: Status) -> None:
        """Flush and close. Nothing is logged afterwards."""
