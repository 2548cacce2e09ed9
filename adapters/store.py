"""The adapter store: versions, aliases, history and files of all adapters. It knows no engine, no HTTP, no validation.

Reading (`resolve`, `get`, `list`, `known`, `referenced`) is synchronous, from memory. Changing is one database
transaction; then the memory follows, then subscribers are told. A change that has begun is finished even if its caller
is cancelled, so that memory and database never part.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession

from ..storage import Database, ObjectStore
from ..storage.errors import Unavailable
from ..storage.full_disk import full_disk_named
from ..storage.instances import Instance
from ..storage.local_objects import remove
from ..storage.uninterrupted import finish
from . import rows
from .base import DEFAULT_ALIAS, Adapter, AdapterFacts, AdapterLimits, AdapterVersion, Alias, Origin
from .blobs import AdapterBlobs
from .events import AdapterEvent, Callback, Kind, kind_of_change
from .index import AdapterIndex
from .publishing import Candidate, Expect, publish
from .refs import check_alias
from .weights import shares

T = TypeVar("T")


class AdapterStore:
    """All adapters of one database and one object store, with working folders below `home`.

    `start()` comes first, on a migrated database; `close()` last. Everything else may run at any time and concurrently.
    Several processes may share the database and the store; `refresh()` shows one what the others changed.
    Every change raises Unavailable if the database or the object store fails, and then has changed nothing.
    """

    def __init__(self, database: Database, objects: ObjectStore, *, home: Path, limits: AdapterLimits) -> None:
        self.limits = limits
        self._database = database
        self._objects = objects
        self._home = home / "adapters"
        self._index = AdapterIndex()
        self._callbacks: list[Callback] = []
        self._changing = asyncio.Lock()  # memory follows the database in the order of the commits
        self._opened: tuple[Instance, AdapterBlobs] | None = None

    async def start(self) -> None:
        """Load all adapters, and remove what killed processes left: staging folders, blobs that nobody refers to.

        Raises Unavailable if the database cannot be reached; call `close()` then, too.
        """
        instance = await asyncio.to_thread(Instance, self._home / "instances")
        blobs = AdapterBlobs(self._database, self._objects, cache=self._home / "cache", writer=instance.id)
        self._opened = instance, blobs
        dead = await asyncio.to_thread(instance.claim_dead)
        await asyncio.to_thread(instance.clear_dead)
        await blobs.take_over(dead)
        await blobs.collect_quietly()
        await self.refresh()
        if instance.alone:
            await blobs.clear_cache({version.digest for adapter in self.list() for version in adapter.versions})
        await asyncio.to_thread(instance.bury)

    async def close(self) -> None:
        """Remove this process's working folders. Safe to repeat, and after a `start` that failed."""
        if self._opened is not None:
            await asyncio.to_thread(self._opened[0].close)

    async def refresh(self) -> None:
        """Read all adapters anew, and tell subscribers what other processes changed."""
        async with self._changing:
            async with self._database.transaction(read_only=True) as session:
                adapters = await rows.load(session, self._blobs.folder)
            for name in {old.name for old in self.list()} - {new.name for new in adapters}:
                self._notify("deleted", name, self._index.remove(name))
            for new in adapters:
                old = self._index.get(new.name) if self._index.known(new.name) else None
                if new != old:
                    self._notify(kind_of_change(old, new), new.name, self._index.put(new))

    def list(self, *, base: str | None = None) -> list[Adapter]:
        """All adapters, or those of one base model, by name."""
        return self._index.list(base=base)

    def get(self, name: str) -> Adapter:
        """Raises NotFound."""
        return self._index.get(name)

    def known(self, name: str) -> bool:
        """Whether there is an adapter of this name (a bare one, without `@`)."""
        return self._index.known(name)

    def referenced(self, digest: str) -> bool:
        """Whether some alias still points to a version with these files."""
        return self._index.referenced(digest)

    def resolve(self, ref: str, *, draw: float | None = None) -> AdapterVersion:
        """The version that `name`, `name@3` or `name@alias` means now.

        An alias that splits traffic draws by weight; `draw` in [0, 1) decides instead of chance.
        With a remote store, `materialise` the version before its `path` is read.
        Raises InvalidInput for a malformed reference, NotFound for an unknown name, version or alias.
        """
        return self._index.resolve(ref, draw=draw)

    async def materialise(self, version: AdapterVersion) -> Path:
        """The version's folder, fetched first if it is not on this machine. Callers at once share one download.

        Raises NotFound if the version was deleted, Unavailable if the object store cannot be reached.
        """
        return await self._blobs.fetch(version.digest)

    @asynccontextmanager
    async def hold(self, version: AdapterVersion) -> AsyncIterator[None]:
        """Inside the block the version's files stay, even if it is deleted meanwhile; then they go after the block."""
        try:
            with self._blobs.held(version.digest):
                yield
        finally:
            if self._blobs.postponed(version.digest):
                await finish(self._blobs.collect_quietly())

    @asynccontextmanager
    async def staging(self) -> AsyncIterator[Path]:
        """An empty private folder on the file system of the home folder, removed however the block ends.

        A disk that becomes full inside the block is reported as StorageFull.
        """
        folder = self._instance.new_folder()
        try:
            with full_disk_named(self._home):
                yield folder
        finally:
            await finish(asyncio.to_thread(remove, folder))

    async def publish(
        self,
        folder: Path,
        *,
        name: str,
        base: str,
        facts: AdapterFacts,
        origin: Origin,
        source: str | None = None,
        metrics: Mapping[str, Any] | None = None,
        expect: Expect = "any",
        move_default: bool = True,
    ) -> AdapterVersion:
        """Store a validated folder as the next version of `name`, creating the adapter if it is new.

        When this returns, the version survives `kill -9` and `resolve` gives it out; with `move_default` the bare name
        means it. The first version is always the default. The same content as the current default version gives that
        version back and changes nothing. `folder` is copied.
        Raises Conflict with `expect="new"` if the adapter exists (whatever its content), or if its base model is
        another; NotFound with `expect="existing"` if it does not exist; TooLarge over the limits; InvalidInput for a
        malformed name or a folder with other files than the two of an adapter.
        """
        candidate = Candidate(
            name=name,
            base=base,
            facts=facts,
            origin=origin,
            source=source,
            metrics=metrics or {},
            expect=expect,
            move_default=move_default,
        )
        candidate.check(self.limits)
        return await finish(self._publish(candidate, folder))

    async def set_alias(self, name: str, alias: str, weights: Mapping[int, float]) -> Alias:
        """Point an alias to one version, or split its traffic by weight; weights are scaled to add up to 1.

        Raises NotFound for an unknown adapter or version, InvalidInput for a malformed alias or weights.
        """
        check_alias(alias)
        scaled = shares(weights)

        async def work(session: AsyncSession) -> None:
            await rows.lock(session, name)
            await rows.point(session, name, alias, scaled)

        await finish(self._change(name, "alias", work))
        return self._alias(name, alias)

    async def rollback(self, name: str, alias: str = DEFAULT_ALIAS) -> Alias:
        """Point an alias where it pointed before its last move; again, and it goes back one more.

        Versions deleted since are passed over. Raises NotFound for an unknown adapter or alias, Conflict if there is
        nothing to go back to.
        """

        async def work(session: AsyncSession) -> None:
            await rows.lock(session, name)
            await rows.roll_back(session, name, alias)

        await finish(self._change(name, "alias", work))
        return self._alias(name, alias)

    async def delete_alias(self, name: str, alias: str) -> None:
        """Raises NotFound for an unknown adapter or alias, Conflict for the default alias."""

        async def work(session: AsyncSession) -> None:
            await rows.lock(session, name)
            await rows.remove_alias(session, name, alias)

        await finish(self._change(name, "alias", work))

    async def pin(self, name: str, pinned: bool) -> Adapter:
        """Ask engines to keep the adapter in memory, or no longer. Raises NotFound."""

        async def work(session: AsyncSession) -> None:
            (await rows.lock(session, name)).pinned = pinned

        await finish(self._change(name, "pinned", work))
        return self.get(name)

    async def delete_version(self, name: str, number: int) -> None:
        """Remove one version and, if no other has the same, its files.

        Raises NotFound for an unknown adapter or version, Conflict while an alias points to it.
        """

        async def work(session: AsyncSession) -> None:
            await rows.lock(session, name)
            await rows.remove_version(session, name, number)

        await finish(self._delete(name, work))

    async def delete(self, name: str) -> None:
        """Remove an adapter with its versions, aliases and files. Raises NotFound."""
        await finish(self._delete(name, lambda session: rows.remove(session, name)))

    def subscribe(self, callback: Callback) -> Callable[[], None]:
        """Call `callback(event)` after each committed change, in order; returns a function that ends this.

        It runs on the event loop, right after the memory has changed: it must be quick and must not raise.
        """
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    def check_integrity(self) -> None:
        """Raises AssertionError if the store's memory contradicts itself (a bug); for tests and idle time."""
        self._index.check_integrity()

    @property
    def _instance(self) -> Instance:
        return self._started[0]

    @property
    def _blobs(self) -> AdapterBlobs:
        return self._started[1]

    @property
    def _started(self) -> tuple[Instance, AdapterBlobs]:
        if self._opened is None:
            raise Unavailable("The adapter store has not been started; wait until the server is ready.")
        return self._opened

    async def _publish(self, candidate: Candidate, folder: Path) -> AdapterVersion:
        version = await publish(candidate, folder, database=self._database, blobs=self._blobs, change=self._change)
        if not self.known(version.name) or version not in self.get(version.name).versions:
            await self.refresh()  # another process had published it, and this one did not know yet
        return version

    async def _delete(self, name: str, work: Callable[[AsyncSession], Awaitable[None]]) -> None:
        await self._change(name, "deleted", work)
        await self._blobs.collect_quietly()

    async def _change(self, name: str, kind: Kind, work: Callable[[AsyncSession], Awaitable[T]]) -> T:
        async with self._changing:
            async with self._database.transaction() as session:
                result = await work(session)
                adapters = await rows.load(session, self._blobs.folder, name)
            self._notify(kind, name, self._index.put(adapters[0]) if adapters else self._index.remove(name))
        return result

    def _notify(self, kind: Kind, name: str, released: tuple[str, ...]) -> None:
        event = AdapterEvent(kind=kind, adapter=name, released=released)
        for callback in tuple(self._callbacks):
            callback(event)

    def _alias(self, name: str, alias: str) -> Alias:
        return next(found for found in self.get(name).aliases if found.alias == alias)
