"""What the registry hands out: leases of loaded models, and statuses of all of them. Plain data, no behaviour."""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from ..adapters.base import Adapter, AdapterVersion
from ..adapters.events import AdapterEvent
from .base import Engine, EngineInfo, EngineStats
from .tokenizer import ChatTokenizer

ModelState = Literal["unloaded", "loading", "ready", "failed"]

EngineFactory = Callable[[str, Path, ChatTokenizer], Engine]  # served name, checkpoint folder, its tokenizer
TokenizerLoader = Callable[[Path], ChatTokenizer]  # blocking


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A started engine with its tokenizer."""

    engine: Engine
    tokenizer: ChatTokenizer
    info: EngineInfo


@dataclass(frozen=True, kw_only=True)
class ModelLease:
    """What one request works with. While it is held, the model and the adapter version stay in memory.

    `ref` is what the client wrote, `base` the base model's name, `adapter` None for the base model alone.
    """

    ref: str
    base: str
    engine: Engine
    tokenizer: ChatTokenizer
    info: EngineInfo
    adapter: AdapterVersion | None


@dataclass(frozen=True, kw_only=True)
class ModelStatus:
    """How a known base model is doing.

    `reason` says what a loading model is at, or why a failed one failed. `info` and `stats` are there while it is
    ready. `last_used` is in seconds since the epoch.
    """

    name: str
    source: str
    state: ModelState
    reason: str | None
    info: EngineInfo | None
    stats: EngineStats | None
    pinned: bool
    in_flight: int
    last_used: float | None


@dataclass(frozen=True, kw_only=True)
class RegistryLimits:
    """`memory_budget_bytes` bounds the resident memory of all engines together; None: no bound.

    `idle_seconds` without a request unload a model; None: never. `check_seconds` is how often dead engines, idle
    models and the budget are looked at.
    """

    memory_budget_bytes: int | None = None
    idle_seconds: float | None = None
    check_seconds: float = 0.25


class Adapters(Protocol):
    """What the registry needs of the adapter store."""

    def known(self, name: str) -> bool: ...

    def get(self, name: str) -> Adapter: ...

    def list(self, *, base: str | None = None) -> Sequence[Adapter]: ...

    def resolve(self, ref: str, *, draw: float | None = None) -> AdapterVersion: ...

    async def materialise(self, version: AdapterVersion) -> Path: ...

    def hold(self, version: AdapterVersion) -> AbstractAsyncContextManager[None]: ...

    def referenced(self, digest: str) -> bool: ...

    def subscribe(self, callback: Callable[[AdapterEvent], None]) -> object: ...
