"""The files of adapter versions: stored by digest, fetched once, removed when nobody needs them. It knows no names.

A row in `adapter_blobs` is written before a blob is and removed after it, so a kill at any point leaves at worst a
row that says what to remove. An unreferenced blob is removed by the process that wrote it (or that took over from it),
or by anybody once it is a day old: until then another replica may be about to refer to it.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import structlog
from sqlalchemy import delete, exists, or_, select, update
from sqlalchemy.exc import IntegrityError

from ..storage import Database, ObjectStore, tables
from ..storage.durable import make_folder
from ..storage.errors import InvalidInput, NotFound, TuneloopError, Unavailable
from ..storage.local_objects import remove
from .files import ADAPTER_FILES

log = structlog.get_logger(__name__)

_ABANDONED_AFTER = timedelta(days=1)
_ATTEMPTS = 10


class AdapterBlobs:
    """Blobs of one object store with a local `cache` for remote ones. `writer` is this process's id."""

    def __init__(self, database: Database, objects: ObjectStore, *, cache: Path, writer: str) -> None:
        self._database = database
        self._objects = objects
        self._cache = cache
        self._writer = writer
        self._in_use: Counter[str] = Counter()  # being stored, or held by somebody who reads the files
        self._postponed: set[str] = set()  # to be removed as soon as they are not in use
        self._present: set[str] = set()  # seen on this machine: requests need not look again
        self._fetches: dict[str, asyncio.Task[None]] = {}

    def folder(self, digest: str) -> Path:
        """Where the files of a digest lie on this machine, or will once they are fetched."""
        return self._objects.local_folder(_key(digest)) or self._cache / _hex(digest)

    @asynccontextmanager
    async def stored(self, digest: str, folder: Path) -> AsyncIterator[None]:
        """Store a copy of `folder`; inside the block the blob stays, even if nothing refers to it yet.

        Raises InvalidInput unless the folder holds just the two files of an adapter.
        """
        names = {entry.name for entry in await asyncio.to_thread(lambda: list(folder.iterdir()))}
        if names != set(ADAPTER_FILES):
            raise InvalidInput(
                f"An adapter's folder holds {' and '.join(ADAPTER_FILES)} and nothing else; this one holds "
                f"{', '.join(sorted(names)) or 'nothing'}.",
                param="file",
            )
        with self.held(digest):
            await self._announce(digest)
            await self._objects.put_folder(_key(digest), folder)
            if not self._objects.is_local:
                await self.fetch(digest)
            yield

    @contextmanager
    def held(self, digest: str) -> Iterator[None]:
        """Inside the block this process does not remove the files, whatever happens to the versions that had them."""
        self._in_use[digest] += 1
        try:
            yield
        finally:
            self._in_use[digest] -= 1
            if self._in_use[digest] == 0:
                del self._in_use[digest]

    def postponed(self, digest: str) -> bool:
        """Whether `collect` would have removed these files but for somebody who held them, and nobody does any more."""
        return digest in self._postponed and not self._in_use[digest]

    async def fetch(self, digest: str) -> Path:
        """The local folder with the files. Callers at the same time share one download.

        Raises NotFound if the blob is gone, Unavailable if the store cannot be reached.
        """
        folder = self.folder(digest)
        if digest in self._present:
            return folder
        if await asyncio.to_thread(folder.is_dir):
            self._present.add(digest)
            return folder
        if self._objects.is_local:
            raise NotFound(f"The files of the adapter version {digest} are gone: it was deleted.")
        task = self._fetches.get(digest)
        if task is None:
            task = asyncio.create_task(self._objects.fetch_folder(_key(digest), folder))
            self._fetches[digest] = task
            task.add_done_callback(lambda _: self._fetches.pop(digest, None))
        await asyncio.shield(task)
        self._present.add(digest)
        return folder

    async def take_over(self, writers: Sequence[str]) -> None:
        """Make the blobs of processes that ended this one's, so that it may remove them."""
        async with self._database.transaction() as session:
            await session.execute(
                update(tables.AdapterBlob).where(tables.AdapterBlob.writer.in_(writers)).values(writer=self._writer)
            )

    async def collect(self) -> None:
        """Remove all blobs that no version refers to and that this process may remove."""
        abandoned = datetime.now(UTC) - _ABANDONED_AFTER
        unreferenced = ~exists().where(tables.AdapterVersion.digest == tables.AdapterBlob.digest)
        mine = or_(tables.AdapterBlob.writer == self._writer, tables.AdapterBlob.touched_at < abandoned)
        query = select(tables.AdapterBlob.digest).where(unreferenced, mine)
        async with self._database.transaction(read_only=True) as session:
            candidates = list(await session.scalars(query))
        for digest in candidates:
            async with self._database.transaction() as session:
                # The row's lock keeps a writer of the same digest waiting until both row and blob are gone.
                locked = query.where(tables.AdapterBlob.digest == digest).with_for_update()
                if await session.scalar(locked) is None:
                    continue
                if self._in_use[digest]:
                    self._postponed.add(digest)
                    continue
                self._present.discard(digest)
                await self._objects.delete(_key(digest))
                if not self._objects.is_local:
                    await asyncio.to_thread(remove, self.folder(digest))
                await session.execute(delete(tables.AdapterBlob).where(tables.AdapterBlob.digest == digest))
            self._postponed.discard(digest)

    async def collect_quietly(self) -> None:
        """`collect`, where a failure only leaves more for the next time and must not fail the caller's work."""
        try:
            await self.collect()
        except TuneloopError as error:
            log.warning("unreferenced adapter files were not removed; the next start will", reason=error.message)

    async def clear_cache(self, keep: set[str]) -> None:
        """Remove cached folders of digests other than those to keep, and downloads that were killed."""
        await asyncio.to_thread(self._clear_cache, {_hex(digest) for digest in keep})

    def _clear_cache(self, keep: set[str]) -> None:
        make_folder(self._cache)
        for entry in self._cache.iterdir():
            if entry.name not in keep:
                remove(entry)

    async def _announce(self, digest: str) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                async with self._database.transaction() as session:
                    row = await session.get(tables.AdapterBlob, digest, with_for_update=True)
                    if row is None:
                        row = tables.AdapterBlob(digest=digest)
                        session.add(row)
                    row.writer, row.touched_at = self._writer, datetime.now(UTC)
                return
            except IntegrityError as error:  # another replica announced it between our look and our write
                if attempt == _ATTEMPTS:
                    raise Unavailable(f"The files {digest} are being stored by other servers; try again.") from error


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")


def _key(digest: str) -> str:
    return f"adapters/{_hex(digest)}"
