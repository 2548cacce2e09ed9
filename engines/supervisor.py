"""Watches the loaded models: restarts dead ones that must be up, unloads idle ones. It resolves no names."""

import asyncio
from collections.abc import Callable, Mapping

import structlog

from ..storage.errors import TuneloopError, Unavailable
from .budget import MemoryBudget
from .slot import ModelSlot

log = structlog.get_logger(__name__)


class Supervisor:
    """`wanted` are the models named at start: loaded at once, restarted when they fail. All others load on demand."""

    def __init__(
        self,
        *,
        slots: Mapping[str, ModelSlot],
        budget: MemoryBudget,
        pinned: Callable[[str], bool],
        idle_seconds: float | None,
        clock: Callable[[], float],
    ) -> None:
        self._slots = slots
        self._budget = budget
        self._pinned = pinned
        self._idle_seconds = idle_seconds
        self._clock = clock
        self._wanted: tuple[ModelSlot, ...] = ()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, wanted: tuple[ModelSlot, ...], *, check_seconds: float) -> None:
        """Begin to load the wanted models, in order, and look at all of them every `check_seconds`."""
        self._wanted = wanted
        for work in (self._preload(), self._run(check_seconds)):
            self._tasks.add(asyncio.create_task(work))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def ready(self) -> tuple[bool, list[str]]:
        """Whether every wanted model can answer, and a sentence for each that cannot.

        One that was unloaded after it had been ready can answer: the next request loads it.
        """
        reasons = []
        for slot in self._wanted:
            state, reason = slot.current_state
            if state == "ready" or (state == "unloaded" and slot.was_ready):
                continue
            what = {"failed": "has failed", "loading": "is loading"}.get(state, "is not loaded yet")
            reasons.append(f"The model '{slot.name}' {what}" + (f": {reason}" if reason else "."))
        return not reasons, reasons

    async def check(self) -> None:
        """One round: dead engines, restarts, idle models, the budget."""
        for slot in list(self._slots.values()):
            slot.check_alive()
            if slot in self._wanted and slot.state == "failed" and slot.backoff.over and not slot.hopeless:
                slot.begin_load()
            if self._is_idle(slot):
                log.info("unloading an idle model", model=slot.name)
                await slot.unload()
        await self._budget.shrink()

    def _is_idle(self, slot: ModelSlot) -> bool:
        if self._idle_seconds is None or not slot.evictable or self._pinned(slot.name):
            return False
        return self._clock() - slot.last_used >= self._idle_seconds

    async def _preload(self) -> None:
        for slot in self._wanted:
            try:
                await slot.load()
            except Unavailable:
                continue  # the slot keeps the reason, and `check` tries again

    async def _run(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.check()
            except TuneloopError as error:
                log.warning("supervision", reason=error.message)  # a model came into use meanwhile: the next round
