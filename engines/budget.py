"""Keeps the memory of all models under a budget by unloading the least recently used ones. It loads nothing."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

import structlog

from ..storage.errors import Unavailable
from .slot import ModelSlot

log = structlog.get_logger(__name__)


class MemoryBudget:
    """A model that is held or pinned is never unloaded. `limit_bytes` None: no limit, and nothing ever is."""

    def __init__(
        self, limit_bytes: int | None, slots: Mapping[str, ModelSlot], *, pinned: Callable[[str], bool]
    ) -> None:
        self._limit = limit_bytes
        self._slots = slots
        self._pinned = pinned
        self._reserved: dict[str, int] = {}  # what loads under way will take
        self._making_room = asyncio.Lock()

    @property
    def reserved(self) -> Mapping[str, int]:
        """Bytes kept free for loads under way, by model."""
        return self._reserved

    def used(self) -> int:
        """Resident bytes of all loaded models, as their engines last measured them."""
        models = [slot.model for slot in self._slots.values() if slot.model is not None]
        return sum(model.engine.stats().rss_bytes for model in models if model.engine.alive)

    @asynccontextmanager
    async def room(self, name: str, needed: int) -> AsyncIterator[None]:
        """Keep `needed` bytes free inside the block, unloading other models first.

        Raises Unavailable if what is in use, loading or pinned leaves too little.
        """
        if self._limit is None:
            yield
            return
        async with self._making_room:  # one at a time, so that two loads do not count on the same memory
            await self._unload_until_fits(name, needed, self._limit)
            self._reserved[name] = needed
        try:
            yield
        finally:
            del self._reserved[name]

    async def shrink(self) -> None:
        """Models grow after their load: go back under the limit, but never unload the one that was used last."""
        loaded = [slot for slot in self._slots.values() if slot.model is not None]
        if self._limit is None or len(loaded) < 2 or self.used() <= self._limit:
            return
        newest = max(loaded, key=lambda slot: slot.last_used)
        victim = self._least_recently_used(but=newest)
        if victim is not None:
            log.info("unloading a model to stay within the memory budget", model=victim.name)
            await victim.unload()

    async def _unload_until_fits(self, name: str, needed: int, limit: int) -> None:
        while (used := self.used() + sum(self._reserved.values())) + needed > limit:
            victim = self._least_recently_used()
            if victim is None:
                raise Unavailable(
                    f"'{name}' needs at least {_readable(needed)}, but the memory budget is {_readable(limit)}, of "
                    f"which models that are in use, loading or pinned take {_readable(used)}. Try again when they are "
                    "idle, unpin one, or raise TUNELOOP_MEMORY_BUDGET_BYTES."
                )
            log.info("unloading a model to make room", model=victim.name, needed_by=name)
            await victim.unload()

    def _least_recently_used(self, *, but: ModelSlot | None = None) -> ModelSlot | None:
        slots = (slot for slot in self._slots.values() if slot.evictable and slot is not but)
        return min(
            (slot for slot in slots if not self._pinned(slot.name)), key=lambda slot: slot.last_used, default=None
        )


def _readable(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
