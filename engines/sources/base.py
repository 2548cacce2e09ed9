"""What a source of base models is: it turns a location into a local folder. It knows no engine, no database.

A *checkpoint folder* holds `config.json`, safetensors weights and the tokenizer's files; every source ends in one.
Sources block: they run in the fetch worker (`worker.py`), a process of its own, so that whatever they import (a hub's
client, torch for a conversion) never stays in the server.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .cache import ModelCache


@dataclass(frozen=True, kw_only=True)
class FetchProgress:
    """How far a fetch is. `done_bytes` and `total_bytes` are None while a step has no measure (a conversion)."""

    message: str
    done_bytes: int | None = None
    total_bytes: int | None = None


ProgressCallback = Callable[[FetchProgress], None]


@dataclass(frozen=True, kw_only=True)
class FetchedModel:
    """A checkpoint folder on this machine and the canonical text of the source it came from."""

    path: Path
    source: str


@dataclass(frozen=True, kw_only=True)
class FetchContext:
    """What a source may use: the home's model cache, a place to report to, the hub's token."""

    cache: ModelCache
    progress: ProgressCallback
    hub_token: str | None = None


class ModelSource(ABC):
    """One kind of source."""

    @abstractmethod
    def fetch(self, location: str, context: FetchContext) -> Path:
        """Return the checkpoint folder of `location`, downloading and converting what is missing.

        Interrupting it at any moment is safe: what is already there is either complete or ignored, and the next call
        goes on from it. Raises InvalidInput when the location has nothing that can be served, NotFound when it does
        not exist, PermissionDenied when it wants a token, Unavailable when it cannot be reached.
        """
