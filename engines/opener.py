"""Opens one model: fetches its folder, makes room, reads the tokenizer, starts the engine. It keeps nothing."""

import asyncio
from pathlib import Path

import structlog

from .budget import MemoryBudget
from .catalog import ModelCatalog
from .lease import EngineFactory, LoadedModel, TokenizerLoader
from .slot import ModelSlot
from .sources import FetchProgress, weight_bytes

log = structlog.get_logger(__name__)


class ModelOpener:
    """Cancelling `open` leaves no worker behind."""

    def __init__(
        self,
        *,
        catalog: ModelCatalog,
        budget: MemoryBudget,
        engine_factory: EngineFactory,
        load_tokenizer: TokenizerLoader,
    ) -> None:
        self._catalog = catalog
        self._budget = budget
        self._engine_factory = engine_factory
        self._load_tokenizer = load_tokenizer

    async def open(self, slot: ModelSlot) -> LoadedModel:
        """Raises what the fetch, the budget or the engine raises."""

        def report(progress: FetchProgress) -> None:
            share = ""
            if progress.done_bytes is not None and progress.total_bytes:
                share = f", {100 * progress.done_bytes // progress.total_bytes} %"
            slot.reason = progress.message + share

        path = await self._catalog.path(slot.name, report)
        slot.reason = None
        async with self._budget.room(slot.name, await asyncio.to_thread(weight_bytes, path)):
            return await self._start(slot.name, path)

    async def _start(self, name: str, path: Path) -> LoadedModel:
        tokenizer = await asyncio.to_thread(self._load_tokenizer, path)
        engine = self._engine_factory(name, path, tokenizer)
        try:
            info = await engine.start()
        except BaseException:
            await engine.close()
            raise
        log.info("model loaded", model=name, seconds=round(info.load_seconds, 3), kernel=info.kernel)
        return LoadedModel(engine=engine, tokenizer=tokenizer, info=info)
