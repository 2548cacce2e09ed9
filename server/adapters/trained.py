"""Makes live what fine-tuning jobs have made: adapters and whole models. It knows no job and no HTTP.

The base of an adapter is loaded for it, as for an upload: what it cannot run is refused before anybody hears of it.
"""

import asyncio
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...adapters.base import AdapterVersion
from ...adapters.files import ADAPTER_FILES
from ...adapters.store import AdapterStore
from ...adapters.validate import check_against_base, inspect_folder
from ...engines.catalog import ModelCatalog
from ...engines.registry import ModelRegistry
from ...storage.errors import Conflict


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
        async with self._store.staging() as staged:
            await asyncio.to_thread(_copy, folder, staged)
            facts = await asyncio.to_thread(inspect_folder, staged, self._store.limits)
            modules = await self._registry.modules(base)
            await asyncio.to_thread(check_against_base, staged, facts, modules, base)
            version = await self._store.publish(
                staged,
                name=name,
                base=base,
                facts=facts,
                origin="job",
                source=source,
                metrics={**metrics, **{key: value for key, value in metadata.items() if value is not None}},
            )
        await self._registry.warm(version)
        return version

    async def publish_model(self, folder: Path, *, name: str, metadata: Mapping[str, Any]) -> None:
        """A checkpoint folder as a base model, which loads at its first request. Safe to repeat."""
        try:
            await self._catalog.add(name, str(folder))
        except Conflict:
            if self._catalog.get(name).source != str(folder):
                raise


def _copy(source: Path, target: Path) -> None:
    for name in ADAPTER_FILES:
        shutil.copyfile(source / name, target / name)
