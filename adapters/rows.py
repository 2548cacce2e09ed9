"""Adapters in the database: every query and every rule that must hold there. It knows no files and no memory.

All functions work inside the caller's transaction. Those that change something lock the adapter's row first, so that
on PostgreSQL, too, changes of one adapter happen one after the other, in whichever replica.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from ..storage import tables
from ..storage.errors import Conflict, NotFound
from .base import DEFAULT_ALIAS, Adapter, AdapterFacts, AdapterVersion, Alias, Origin

FolderOf = Callable[[str], Path]


async def load(session: AsyncSession, folder_of: FolderOf, name: str | None = None) -> list[Adapter]:
    """All adapters as the transaction sees them, or the one of that name (none if there is none)."""
    adapters, versions, aliases = select(tables.Adapter), select(tables.AdapterVersion), select(tables.AdapterAlias)
    if name is not None:
        adapters = adapters.where(tables.Adapter.name == name)
        versions = versions.where(tables.AdapterVersion.adapter == name)
        aliases = aliases.where(tables.AdapterAlias.adapter == name)
    versions_of: dict[str, list[tables.AdapterVersion]] = {}
    for version in await session.scalars(versions.order_by(tables.AdapterVersion.version)):
        versions_of.setdefault(version.adapter, []).append(version)
    aliases_of: dict[str, list[Alias]] = {}
    for alias in await session.scalars(aliases.order_by(tables.AdapterAlias.alias)):
        aliases_of.setdefault(alias.adapter, []).append(_alias(alias))
    return [
        Adapter(
            name=row.name,
            base=row.base,
            pinned=row.pinned,
            created_at=row.created_at,
            versions=tuple(_version(version, row.base, folder_of) for version in versions_of[row.name]),
            aliases=tuple(aliases_of[row.name]),
        )
        for row in await session.scalars(adapters)
    ]


async def lock_if_there(session: AsyncSession, name: str) -> tables.Adapter | None:
    """The adapter's row, locked until the transaction ends; None if there is no such adapter."""
    return await session.get(tables.Adapter, name, with_for_update=True)


async def lock(session: AsyncSession, name: str) -> tables.Adapter:
    """The adapter's row, locked until the transaction ends. Raises NotFound."""
    row = await lock_if_there(session, name)
    if row is None:
        raise NotFound(
            f"There is no adapter {name!r}; GET /v1/adapters lists those that exist.",
            param="name",
            code="adapter_not_found",
        )
    return row


async def create(session: AsyncSession, name: str, base: str) -> tables.Adapter:
    """A new adapter's row, locked; it needs a version before the transaction ends.

    Raises IntegrityError if another transaction has just created it.
    """
    row = tables.Adapter(name=name, base=base, pinned=False, next_version=1, created_at=datetime.now(UTC))
    session.add(row)
    await session.flush()
    return row


async def add_version(
    session: AsyncSession,
    row: tables.Adapter,
    *,
    facts: AdapterFacts,
    origin: Origin,
    source: str | None,
    metrics: Mapping[str, Any],
    move_default: bool,
) -> int:
    """Add the next version to a locked adapter and move its default alias; returns the version's number."""
    number, row.next_version = row.next_version, row.next_version + 1
    session.add(
        tables.AdapterVersion(
            adapter=row.name,
            version=number,
            digest=facts.digest,
            rank=facts.rank,
            alpha=facts.alpha,
            targets=list(facts.targets),
            use_dora=facts.use_dora,
            use_rslora=facts.use_rslora,
            size_bytes=facts.size_bytes,
            origin=origin,
            source=source,
            metrics=dict(metrics),
            created_at=datetime.now(UTC),
        )
    )
    await session.flush()
    if move_default or number == 1:
        await point(session, row.name, DEFAULT_ALIAS, {number: 1.0})
    return number


async def point(session: AsyncSession, name: str, alias: str, weights: Mapping[int, float]) -> None:
    """Make an alias point there and remember where it pointed before. Raises NotFound for an unknown version."""
    missing = set(weights) - await _numbers(session, name)
    if missing:
        raise NotFound(
            f"The adapter {name!r} has no version {min(missing)} to point {alias!r} to.",
            param="version",
            code="version_not_found",
        )
    stored = {str(number): weight for number, weight in sorted(weights.items())}
    row = await session.get(tables.AdapterAlias, (name, alias))
    now = datetime.now(UTC)
    if row is None:
        session.add(tables.AdapterAlias(adapter=name, alias=alias, weights=stored, updated_at=now))
    elif row.weights != stored:
        session.add(
            tables.AdapterAliasHistory(adapter=name, alias=alias, weights=row.weights, updated_at=row.updated_at)
        )
        row.weights, row.updated_at = stored, now
    await session.flush()


async def roll_back(session: AsyncSession, name: str, alias: str) -> None:
    """Make an alias point where it pointed before its last move, passing over what was deleted since.

    Raises NotFound for an unknown alias, Conflict if there is nothing before.
    """
    row = await _existing_alias(session, name, alias)
    history = select(tables.AdapterAliasHistory).where(
        tables.AdapterAliasHistory.adapter == name, tables.AdapterAliasHistory.alias == alias
    )
    existing = await _numbers(session, name)
    for before in await session.scalars(history.order_by(tables.AdapterAliasHistory.id.desc())):
        await session.delete(before)
        if set(_weights(before.weights)) <= existing and before.weights != row.weights:
            row.weights, row.updated_at = before.weights, datetime.now(UTC)
            await session.flush()
            return
    raise Conflict(
        f"The alias {alias!r} of {name!r} cannot be rolled back: it has no earlier version that still exists.",
        param="alias",
        code="no_earlier_version",
    )


async def remove_alias(session: AsyncSession, name: str, alias: str) -> None:
    """Raises NotFound for an unknown alias, Conflict for the default one."""
    row = await _existing_alias(session, name, alias)
    if alias == DEFAULT_ALIAS:
        raise Conflict(
            f"The alias {DEFAULT_ALIAS!r} is what the bare name {name!r} means and cannot be deleted; "
            "point it to another version, or delete the adapter.",
            param="alias",
        )
    await session.delete(row)


async def remove_version(session: AsyncSession, name: str, number: int) -> None:
    """Raises NotFound for an unknown version, Conflict while an alias points to it."""
    row = await session.get(tables.AdapterVersion, (name, number))
    if row is None:
        raise NotFound(
            f"The adapter {name!r} has no version {number}.",
            param="version",
            code="version_not_found",
        )
    aliases = await session.scalars(select(tables.AdapterAlias).where(tables.AdapterAlias.adapter == name))
    pointing = sorted(alias.alias for alias in aliases if number in _weights(alias.weights))
    if pointing:
        raise Conflict(
            f"Version {number} of {name!r} cannot be deleted while the alias {', '.join(map(repr, pointing))} points "
            "to it; point it elsewhere first, or delete the adapter.",
            param="version",
            code="version_in_use",
        )
    await session.delete(row)


async def remove(session: AsyncSession, name: str) -> None:
    """Remove the adapter with its versions, aliases and their history. Raises NotFound."""
    await lock(session, name)
    await session.execute(delete(tables.Adapter).where(tables.Adapter.name == name))


async def _existing_alias(session: AsyncSession, name: str, alias: str) -> tables.AdapterAlias:
    row = await session.get(tables.AdapterAlias, (name, alias))
    if row is None:
        raise NotFound(f"The adapter {name!r} has no alias {alias!r}.", param="alias", code="alias_not_found")
    return row


async def _numbers(session: AsyncSession, name: str) -> set[int]:
    query = select(tables.AdapterVersion.version).where(tables.AdapterVersion.adapter == name)
    return set(await session.scalars(query))


def _weights(stored: Mapping[str, float]) -> dict[int, float]:
    return {int(number): float(weight) for number, weight in stored.items()}


def _alias(row: tables.AdapterAlias) -> Alias:
    return Alias(adapter=row.adapter, alias=row.alias, weights=_weights(row.weights), updated_at=row.updated_at)


def _version(row: tables.AdapterVersion, base: str, folder_of: FolderOf) -> AdapterVersion:
    return AdapterVersion(
        name=row.adapter,
        version=row.version,
        base=base,
        digest=row.digest,
        path=folder_of(row.digest),
        rank=row.rank,
        alpha=row.alpha,
        targets=tuple(row.targets),
        use_dora=row.use_dora,
        use_rslora=row.use_rslora,
        size_bytes=row.size_bytes,
        origin=cast(Origin, row.origin),
        source=row.source,
        metrics=row.metrics,
        created_at=row.created_at,
    )
