"""The base models that a server knows by name, and where each one's checkpoint folder is. It loads nothing.

The index is in memory, so that looking a name up costs nothing; the database keeps it over restarts.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import select

from ..storage.database import Database
from ..storage.errors import Conflict, InvalidInput, NotFound
from ..storage.tables import BaseModel
from .sources import (
    BUILTIN_MODELS,
    ProgressCallback,
    describe_checkpoint,
    fetch_model,
    find_model,
    is_model_name,
    parse_source,
)


@dataclass(frozen=True, kw_only=True)
class CatalogEntry:
    """One base model. `path` is None until it was fetched on this machine; `detail` is `describe_checkpoint`'s."""

    name: str
    source: str
    path: Path | None = None
    pinned: bool = False
    created_at: datetime
    detail: Mapping[str, Any] = field(default_factory=dict)


class ModelCatalog:
    """Safe for concurrent callers of one event loop. Several processes may share the database; see `refresh`."""

    def __init__(self, database: Database, home: Path, *, hub_token: str | None = None) -> None:
        self._database = database
        self._home = home
        self._hub_token = hub_token
        self._entries: dict[str, CatalogEntry] = {}
        self._started_at = datetime.now(UTC)

    async def start(self) -> None:
        """Read the index. Safe to repeat."""
        await self.refresh()

    async def refresh(self) -> None:
        """Read the index again: another process (`tuneloop pull`) may have added to it."""
        async with self._database.transaction(read_only=True) as session:
            rows = (await session.scalars(select(BaseModel).order_by(BaseModel.created_at))).all()
        entries = {
            name: CatalogEntry(name=name, source=source, created_at=self._started_at)
            for name, source in BUILTIN_MODELS.items()
        }
        self._entries = entries | {row.name: _entry(row) for row in rows}

    def known(self, name: str) -> bool:
        return name in self._entries

    def list(self) -> list[CatalogEntry]:
        """All entries: the built-in ones first, then by age."""
        return list(self._entries.values())

    def get(self, name: str) -> CatalogEntry:
        """Raises NotFound."""
        try:
            return self._entries[name]
        except KeyError:
            raise NotFound(
                f"There is no base model '{name}'. Give POST /v1/models/load its `source` to add it.",
                param="model",
                code="model_not_found",
            ) from None

    async def add(self, name: str, source: str) -> CatalogEntry:
        """Make a model known; nothing is fetched yet. Adding the same again changes nothing.

        Raises InvalidInput for an unusable name or source, NotFound for a path that does not exist, Conflict if the
        name stands for another source.
        """
        if not is_model_name(name):
            raise InvalidInput(
                f"{name!r} cannot be the name of a model: use at most 128 letters, digits and . _ : / -, "
                "a letter or digit first.",
                param="model",
            )
        text = parse_source(source).text
        known = self._entries.get(name)
        if known is not None:
            if known.source != text:
                raise Conflict(
                    f"The name '{name}' stands for {known.source} already. Serve {text} under another name "
                    f"(other-name={text}), or delete the model '{name}' first."
                )
            return known
        await asyncio.to_thread(find_model, text, self._home)  # refuses what is wrong with a local path
        entry = CatalogEntry(name=name, source=text, created_at=datetime.now(UTC))
        await self._write(entry)
        return entry

    async def remove(self, name: str) -> None:
        """Forget a model; its files stay. A built-in model is back to its first state. Raises NotFound."""
        self.get(name)
        async with self._database.transaction() as session:
            row = await session.get(BaseModel, name)
            if row is not None:
                await session.delete(row)
        del self._entries[name]
        if name in BUILTIN_MODELS:
            self._entries[name] = CatalogEntry(name=name, source=BUILTIN_MODELS[name], created_at=self._started_at)

    async def set_pinned(self, name: str, pinned: bool) -> None:
        """Remember whether a model is to stay in memory. Raises NotFound."""
        await self._write(replace(self.get(name), pinned=pinned))

    async def path(self, name: str, progress: ProgressCallback | None = None, *, refresh: bool = False) -> Path:
        """The checkpoint folder of a known model, fetched if it is missing here. Raises NotFound, and as fetch_model.

        `refresh` asks the source again even if the model is here.
        """
        entry = self.get(name)
        fetched = await fetch_model(entry.source, self._home, progress, hub_token=self._hub_token, refresh=refresh)
        entry = self._entries.get(name, entry)  # it may have been pinned during the fetch
        if entry.path != fetched.path or refresh:
            detail = await asyncio.to_thread(describe_checkpoint, fetched.path)
            await self._write(replace(entry, path=fetched.path, detail=detail))
        return fetched.path

    async def _write(self, entry: CatalogEntry) -> None:
        async with self._database.transaction() as session:
            await session.merge(
                BaseModel(
                    name=entry.name,
                    source=entry.source,
                    path=None if entry.path is None else str(entry.path),
                    pinned=entry.pinned,
                    created_at=entry.created_at,
                    detail=dict(entry.detail),
                )
            )
        self._entries[entry.name] = entry


def _entry(row: BaseModel) -> CatalogEntry:
    return CatalogEntry(
        name=row.name,
        source=row.source,
        path=None if row.path is None else Path(row.path),
        pinned=row.pinned,
        created_at=row.created_at,
        detail=row.detail,
    )
