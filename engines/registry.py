"""Which base models are in memory: loads them at the first request, holds them while in use, unloads and restarts them.

It resolves what clients write (`model`, `adapter`, `adapter@3`, `adapter@alias`) to an engine and an adapter version.
It knows no tokens, no HTTP and no users.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import structlog

from ..adapters.base import AdapterVersion, ModuleShape
from ..adapters.events import AdapterEvent
from ..storage.errors import NotFound, TuneloopError, Unavailable
from .budget import MemoryBudget
from .catalog import ModelCatalog
from .lease import (
    Adapters,
    EngineFactory,
    LoadedModel,
    ModelLease,
    ModelState,
    ModelStatus,
    RegistryLimits,
    TokenizerLoader,
)
from .opener import ModelOpener
from .retirement import AdapterLeases
from .slot import ModelSlot
from .sources import parse_model_argument
from .supervisor import Supervisor
from .tokenizer import ChatTokenizer

log = structlog.get_logger(__name__)

__all__ = [
    "Adapters",
    "EngineFactory",
    "LoadedModel",
    "ModelLease",
    "ModelRegistry",
    "ModelState",
    "ModelStatus",
    "RegistryLimits",
]


class ModelRegistry:
    """All methods are for one event loop and safe to call concurrently. `check_integrity` holds at any time.

    Only names that the catalog knows are ever loaded: a request cannot make the server download something new.
    """

    def __init__(
        self,
        *,
        catalog: ModelCatalog,
        adapters: Adapters,
        engine_factory: EngineFactory,
        limits: RegistryLimits,
        load_tokenizer: TokenizerLoader = ChatTokenizer.load,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._catalog = catalog
        self._adapters = adapters
        self._limits = limits
        self._clock = clock
        self._slots: dict[str, ModelSlot] = {}
        self._budget = MemoryBudget(limits.memory_budget_bytes, self._slots, pinned=self._pinned)
        self._opener = ModelOpener(
            catalog=catalog, budget=self._budget, engine_factory=engine_factory, load_tokenizer=load_tokenizer
        )
        self._supervisor = Supervisor(
            slots=self._slots,
            budget=self._budget,
            pinned=self._pinned,
            idle_seconds=limits.idle_seconds,
            clock=clock,
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    async def start(self, preload: Sequence[str]) -> None:
        """Begin to load the given models (names, sources or `name=source`), in order, and to keep them loaded.

        Returns at once; `ready` tells how far they are. Raises InvalidInput, NotFound or Conflict for one that cannot
        be known by that name.
        """
        await self._catalog.start()
        self._adapters.subscribe(self._adapter_changed)
        names = []
        for argument in preload:
            name, source = (argument, None) if self._catalog.known(argument) else parse_model_argument(argument)
            if source is not None:
                await self._catalog.add(name, source)
            names.append(name)
        wanted = tuple(self._slot(name) for name in dict.fromkeys(names))
        self._supervisor.start(wanted, check_seconds=self._limits.check_seconds)

    async def close(self) -> None:
        """Unload everything for good; requests still in flight end with Unavailable. Safe to repeat."""
        self._closed = True
        await self._supervisor.close()
        await asyncio.gather(*(slot.close() for slot in self._slots.values()), *self._tasks)

    @asynccontextmanager
    async def lease(self, ref: str) -> AsyncIterator[ModelLease]:
        """What a request for `ref` works with, loaded first when it is not in memory.

        Raises NotFound for an unknown model, adapter, version or alias, Unavailable with the reason when the load
        fails or the memory budget is taken by models in use.
        """
        if self._catalog.known(ref):
            async with self._slot(ref).use() as model:
                yield _lease(ref, ref, model, None)
            return
        version = self._resolve(ref)
        async with self._using(version) as (model, held):
            yield _lease(ref, version.base, model, held)

    async def load(self, name: str, *, source: str | None = None, pinned: bool | None = None) -> ModelStatus:
        """Load a model and answer when it can serve; `source` makes a new one known under `name`.

        Raises NotFound, InvalidInput or Conflict for the name or the source, Unavailable when the load fails.
        """
        if not self._catalog.known(name):
            await self._catalog.refresh()
        if source is not None:
            await self._catalog.add(name, source)
        if pinned is not None:
            await self._catalog.set_pinned(name, pinned)
        await self._slot(name).load()
        return self.status(name)

    async def unload(self, name: str, *, wait_seconds: float = 0) -> ModelStatus:
        """End a model's engine; its memory is free when this returns. It stays known, and loads again when asked for.

        A load that nobody waits for is cancelled. Raises NotFound, or Conflict if requests still use the model after
        `wait_seconds`, during which new ones are refused.
        """
        await self._slot(name).unload(wait_seconds=wait_seconds)
        return self.status(name)

    async def pin(self, name: str, pinned: bool) -> ModelStatus:
        """A pinned model is never unloaded to make room or for being idle; an `unload` still does. Raises NotFound."""
        await self._catalog.set_pinned(name, pinned)
        return self.status(name)

    async def modules(self, base: str) -> Mapping[str, ModuleShape]:
        """The modules of a base model that adapters may target; the model is loaded for it. As `lease` raises."""
        async with self._slot(base).use() as model:
            return model.info.modules

    async def warm(self, version: AdapterVersion) -> None:
        """Make an adapter version resident ahead of its first request. Raises as `lease`, InvalidInput if unfit."""
        async with self._using(version) as (model, held):
            await model.engine.load_adapter(held)

    def status(self, name: str) -> ModelStatus:
        """Raises NotFound."""
        entry = self._catalog.get(name)
        slot = self._slots.get(name)
        state, reason = ("unloaded", None) if slot is None else slot.current_state
        model = slot.model if slot is not None and state == "ready" else None
        return ModelStatus(
            name=name,
            source=entry.source,
            state=state,
            reason=reason,
            info=None if model is None else model.info,
            stats=None if model is None else model.engine.stats(),
            pinned=entry.pinned,
            in_flight=0 if slot is None else slot.in_flight,
            last_used=None if slot is None else slot.last_used_at,
        )

    def statuses(self) -> list[ModelStatus]:
        """Of all known base models."""
        return [self.status(entry.name) for entry in self._catalog.list()]

    def ready(self) -> tuple[bool, list[str]]:
        """Whether every model named at start can answer, and a sentence for each that cannot."""
        return (False, ["The server is shutting down."]) if self._closed else self._supervisor.ready()

    async def check(self) -> None:
        """One round of supervision; it runs by itself every `check_seconds`."""
        await self._supervisor.check()

    def check_integrity(self) -> None:
        """Raises AssertionError if counts and states contradict each other: a bug of ours."""
        for slot in self._slots.values():
            consistent = slot.in_flight >= 0 and (slot.state == "ready") == (slot.model is not None)
            if not consistent:
                raise AssertionError(f"slot {slot.name}: {slot.state=} {slot.in_flight=} {slot.model=}")
            if slot.name in self._budget.reserved and slot.state != "loading":
                raise AssertionError(f"slot {slot.name} keeps memory reserved while it is {slot.state}")

    @asynccontextmanager
    async def _using(self, version: AdapterVersion) -> AsyncIterator[tuple[LoadedModel, AdapterVersion]]:
        """Hold a version from this moment on: an alias may leave it while the base model still loads."""
        slot = self._slot(version.base)
        slot.adapters.begin(version.digest)
        try:
            async with self._adapters.hold(version), slot.use() as model:
                yield model, replace(version, path=await self._adapters.materialise(version))
        finally:
            if slot.adapters.end(version.digest):
                self._retire(slot, version.digest)

    def _resolve(self, ref: str) -> AdapterVersion:
        if not self._adapters.known(ref.partition("@")[0]):
            raise NotFound(
                f"The model '{ref}' does not exist. GET /v1/models lists the models of this server.",
                param="model",
                code="model_not_found",
            )
        version = self._adapters.resolve(ref)
        if not self._catalog.known(version.base):
            raise NotFound(
                f"The adapter '{ref}' belongs to the base model '{version.base}', which this server does not know. "
                "Load it with POST /v1/models/load.",
                param="model",
                code="model_not_found",
            )
        return version

    def _slot(self, name: str) -> ModelSlot:
        if self._closed:
            raise Unavailable("The server is shutting down. Try again shortly, or at another replica.")
        self._catalog.get(name)
        if name not in self._slots:
            leases = AdapterLeases(self._adapters.referenced)
            self._slots[name] = ModelSlot(name, self._open, adapters=leases, clock=self._clock)
        return self._slots[name]

    def _pinned(self, name: str) -> bool:
        return self._catalog.known(name) and self._catalog.get(name).pinned

    async def _open(self, slot: ModelSlot) -> LoadedModel:
        model = await self._opener.open(slot)
        self._keep_pinned(slot.name, model)
        return model

    def _adapter_changed(self, event: AdapterEvent) -> None:
        for slot in self._slots.values():
            if slot.model is not None and self._pins_changed(event):
                self._keep_pinned(slot.name, slot.model)
            for digest in event.released:
                if slot.adapters.release(digest):
                    self._retire(slot, digest)

    def _pins_changed(self, event: AdapterEvent) -> bool:
        if event.kind in ("pinned", "deleted"):
            return True
        return self._adapters.known(event.adapter) and self._adapters.get(event.adapter).pinned

    def _keep_pinned(self, base: str, model: LoadedModel) -> None:
        """Tell the engine which versions the bare names of pinned adapters mean now."""
        pinned = [a for a in self._adapters.list(base=base) if a.pinned]
        versions = [v for a in pinned for v in a.versions if a.default_weights.get(v.version, 0) > 0]
        self._background(self._keep(model, versions))

    async def _keep(self, model: LoadedModel, versions: Sequence[AdapterVersion]) -> None:
        try:
            local = [replace(v, path=await self._adapters.materialise(v)) for v in versions]
            await model.engine.keep_adapters(local)
        except TuneloopError as error:  # the request that needs it will hear the reason again
            log.warning("pinned adapters are not loaded", reason=error.message)

    def _retire(self, slot: ModelSlot, digest: str) -> None:
        if slot.model is not None:
            self._background(_unload_adapter(slot.model, digest))

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _lease(ref: str, base: str, model: LoadedModel, adapter: AdapterVersion | None) -> ModelLease:
    return ModelLease(
        ref=ref, base=base, engine=model.engine, tokenizer=model.tokenizer, info=model.info, adapter=adapter
    )


async def _unload_adapter(model: LoadedModel, digest: str) -> None:
    try:
        await model.engine.unload_adapter(digest)
    except Unavailable:
        return  # the engine has died, and the adapter's weights with it
