"""Makes live what fine-tuning jobs have made: adapters and whole models. It knows no job and no HTTP.

What the base model cannot run is refused before anybody hears of it, if that is loaded. It is never loaded for this:
the trainer made the adapter from that very checkpoint, and no training must fail for want of memory to serve it.
"""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

from ...adapters.base import AdapterVersion
from ...adapters.files import copy_adapter
from ...adapters.store import AdapterStore
from ...adapters.validate import check_against_base, inspect_folder
from ...engines.catalog import ModelCatalog
from ...engines.registry import ModelRegistry
from ...storage.errors import Conflict, InvalidInput, NotFound, Unavailable

log = structlog.get_logger(__name__)


class TrainedModels:
    """finetune's Publisher."""

    def __init__(self, *, store: AdapterStore, registry: ModelRegistry, catalog: ModelCatalog) -> None:
        self._store = store
        self._registry = registry
        self._catalog = catalog

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
        """The two PEFT files of a folder as the adapter `name`, resident when this returns. Safe to repeat."""
        new = not self._store.known(name)
        async with self._store.staging() as staged:
            await asyncio.to_thread(copy_adapter, folder, staged)
            facts = await asyncio.to_thread(inspect_folder, staged, self._store.limits)
            info = self._registry.status(base).info
            if info is not None:
                await asyncio.to_thread(check_against_base, staged, facts, info.modules, base)
            version = await self._store.publish(
                staged,
                name=name,
                base=base,
                facts=facts,
                origin="job",
                source=source,
                metrics={**metrics, **{key: value for key, value in metadata.items() if value is not None}},
            )
        if info is not None:
            await self._warm(version, new=new)
        return version

    async def _warm(self, version: AdapterVersion, *, new: bool) -> None:
        try:
            await self._registry.warm(version)
        except InvalidInput:
            if new:  # the name is to mean nothing again
                with suppress(NotFound):
                    await self._store.delete(version.name)
            raise
        except Unavailable as error:
            log.warning("a trained adapter loads at its first request", adapter=version.ref, reason=error.message)

    async def publish_model(self, folder: Path, *, name: str, metadata: Mapping[str, Any]) -> None:
        """A checkpoint folder as a base model, which loads at its first request. Safe to repeat."""
        try:
            await self._catalog.add(name, str(folder))
        except Conflict:
            if self._catalog.get(name).source != str(folder):
                raise

    async def withdraw_model(self, name: str) -> None:
        """Forget a base model whose folder is gone. One that is loaded stays in memory while requests use it."""
        if self._catalog.known(name):
            with suppress(Conflict):
                await self._registry.unload(name)
            await self._catalog.remove(name)
