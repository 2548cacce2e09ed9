"""Publishes adapters: staged, unpacked, checked against their base, stored, and warm before the caller hears of it.

It knows no HTTP. Whatever goes wrong on the way, nothing is left behind: the staging folder always goes, and a version
that its engine refuses is taken back.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ...adapters.archive import unpack
from ...adapters.base import AdapterFacts, AdapterLimits, AdapterVersion, Origin
from ...adapters.refs import check_name
from ...adapters.sources import fetch
from ...adapters.store import AdapterStore
from ...adapters.validate import check_against_base, inspect_folder
from ...engines.catalog import ModelCatalog
from ...engines.registry import ModelRegistry
from ...storage.errors import Conflict, InvalidInput, NotFound
from .paths import check_name_fits_paths

Expect = Literal["new", "existing", "any"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a new version goes. `base` None: the existing adapter's, else what its configuration names."""

    name: str
    base: str | None = None
    expect: Expect = "any"


@dataclass(slots=True)
class _Lock:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


class AdapterService:
    """The one way by which versions come into the store from outside."""

    def __init__(
        self,
        *,
        store: AdapterStore,
        registry: ModelRegistry,
        catalog: ModelCatalog,
        limits: AdapterLimits,
        roots: Sequence[Path] = (),
        hub_token: str | None = None,
    ) -> None:
        self._store = store
        self._registry = registry
        self._catalog = catalog
        self._limits = limits
        self._roots = tuple(roots)
        self._hub_token = hub_token
        self._locks: dict[str, _Lock] = {}

    def staging(self) -> AbstractAsyncContextManager[Path]:
        """A private folder for an upload, on the store's own file system; it goes when the block ends."""
        return self._store.staging()

    async def add_archive(self, archive: Path, target: Target) -> AdapterVersion:
        """Publish a tar.gz, tar or zip that lies in a staging folder.

        Raises InvalidInput, TooLarge, Conflict, NotFound, and Unavailable if the base cannot be loaded.
        """
        self.check(target)
        async with self._locked(target.name), self._store.staging() as folder:
            await asyncio.to_thread(unpack, archive, folder, self._limits)
            return await self._publish(folder, target, "upload", None)

    async def add_folder(self, folder: Path, target: Target) -> AdapterVersion:
        """Publish the two PEFT files that lie in a staging folder. Raises what `add_archive` does."""
        self.check(target)
        async with self._locked(target.name):
            return await self._publish(folder, target, "upload", None)

    async def add_source(self, source: str, target: Target) -> AdapterVersion:
        """Publish from a path under the allowed roots (else PermissionDenied), a hub or a bucket."""
        self.check(target)
        async with self._locked(target.name), self._store.staging() as folder:
            origin, shown = await fetch(
                source, folder, roots=self._roots, limits=self._limits, hub_token=self._hub_token
            )
            return await self._publish(folder, target, origin, shown)

    def check(self, target: Target) -> None:
        """What can be refused before the files are here. Raises InvalidInput, Conflict, NotFound."""
        name = target.name
        if "@" in name:
            raise InvalidInput(f"The adapter name '{name}' holds an '@'. Versions are numbered by us.", param="name")
        check_name(name)
        check_name_fits_paths(name)
        if self._catalog.known(name):
            raise Conflict(f"'{name}' is the name of a base model. Choose another for the adapter.", param="name")
        known = self._store.known(name)
        if target.expect == "new" and known:
            raise Conflict(
                f"The adapter '{name}' exists already. PUT /v1/adapters/{name} adds a version.", param="name"
            )
        if target.expect == "existing" and not known:
            raise NotFound(
                f"There is no adapter '{name}'. POST /v1/adapters makes one.", param="name", code="model_not_found"
            )

    async def _publish(self, folder: Path, target: Target, origin: Origin, source: str | None) -> AdapterVersion:
        facts = await asyncio.to_thread(inspect_folder, folder, self._limits)
        base = self._choose_base(target, facts)
        modules = await self._registry.modules(base)
        await asyncio.to_thread(check_against_base, folder, facts, modules, base)
        before = self._numbers(target.name)
        version = await self._store.publish(
            folder, name=target.name, base=base, facts=facts, origin=origin, source=source, expect=target.expect
        )
        try:
            await self._registry.warm(version)
        except BaseException:
            if version.version not in before:  # an identical upload gives the version that is live already
                await asyncio.shield(self._take_back(version, is_first=not before))
            raise
        return version

    async def _take_back(self, version: AdapterVersion, *, is_first: bool) -> None:
        """The engine would not have it: the name means again what it meant before."""
        with suppress(NotFound, Conflict):  # somebody deleted it meanwhile, or gave it an alias and so wants it
            if is_first:
                await self._store.delete(version.name)
                return
            if version.version in self._store.get(version.name).default_weights:
                await self._store.rollback(version.name)
            await self._store.delete_version(version.name, version.version)

    def _numbers(self, name: str) -> set[int]:
        return {version.version for version in self._store.get(name).versions} if self._store.known(name) else set()

    def _choose_base(self, target: Target, facts: AdapterFacts) -> str:
        """The served name of the base model. Raises NotFound for an unknown one, InvalidInput if it must be said."""
        entries = self._catalog.list()
        names = [entry.name for entry in entries]
        if target.base is not None:
            if target.base not in names:
                raise NotFound(
                    f"There is no base model '{target.base}'. The known ones are {', '.join(names)}.",
                    param="base",
                    code="model_not_found",
                )
            return target.base
        if self._store.known(target.name):
            return self._store.get(target.name).base
        declared = facts.base_model_name
        for entry in entries:
            if declared is not None and declared in (entry.name, entry.source, entry.source.removeprefix("hf:")):
                return entry.name
        in_use = [status.name for status in self._registry.statuses() if status.state != "unloaded"]
        only = names if len(names) == 1 else in_use
        if len(only) == 1:
            return only[0]
        raise InvalidInput(
            f"The adapter was made for '{declared}', which is not the name of a base model here. "
            f"Give `base`, one of {', '.join(names)}.",
            param="base",
        )

    @asynccontextmanager
    async def _locked(self, name: str) -> AsyncIterator[None]:
        """One publication a name at a time, so that versions get numbers in the order of their uploads."""
        entry = self._locks.setdefault(name, _Lock())
        entry.users += 1
        try:
            async with entry.lock:
                yield
        finally:
            entry.users -= 1
            if entry.users == 0:
                del self._locks[name]
