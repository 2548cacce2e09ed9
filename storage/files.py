"""The file store: what clients upload and what jobs write, by id. It knows no HTTP and not what is inside a file.

A file never changes. Its bytes are in the object store before its row is in the database, and go after it.
"""

import asyncio
import builtins
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import structlog
from sqlalchemy import ColumnElement, and_, delete, or_, select

from . import tables
from .database import Database
from .errors import NotFound, TuneloopError
from .file_blobs import FileBlobs, new_key
from .file_ids import created_at_of, new_id
from .full_disk import full_disk_named
from .instances import Instance
from .local_objects import remove
from .objects import ObjectStore
from .uninterrupted import finish

log = structlog.get_logger(__name__)

_SWEEP_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """One file; `digest` is `sha256:<hex>` of its bytes, `blob` their key in the object store."""

    id: str
    filename: str
    purpose: str
    size_bytes: int
    digest: str
    blob: str
    created_at: datetime
    expires_at: datetime | None


class FileStore:
    """All files of one database and one object store, with working folders below `home`.

    `start()` comes first, on a migrated database; `close()` last. Everything else may run at any time and concurrently;
    several processes may share the database, the store and the home. A file whose time is up is gone at once for
    callers, and removed within a minute. Every call raises Unavailable if the database or the object store fails.
    """

    def __init__(self, database: Database, objects: ObjectStore, *, home: Path) -> None:
        self._database = database
        self._objects = objects
        self._home = home / "files"
        self._opened: tuple[Instance, FileBlobs] | None = None
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Remove what killed processes left (staging folders, bytes without a file) and files whose time is up.

        Raises Unavailable if the home folder cannot be used; call `close()` then, too.
        """
        instance = await asyncio.to_thread(Instance, self._home / "instances")
        blobs = FileBlobs(self._database, self._objects, notes=self._home / "notes", writer=instance.id)
        self._opened = instance, blobs
        dead = await asyncio.to_thread(instance.claim_dead)
        await asyncio.to_thread(instance.clear_dead)
        await blobs.take_over(dead)
        await asyncio.to_thread(instance.bury)
        await self._sweep()
        self._sweeper = asyncio.create_task(self._sweep_again())

    async def close(self) -> None:
        """Remove this process's working folders. Safe to repeat, and after a `start` that failed."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._sweeper
            self._sweeper = None
        if self._opened is not None:
            await asyncio.to_thread(self._opened[0].close)

    @asynccontextmanager
    async def staging(self) -> AsyncIterator[Path]:
        """An empty private folder on the file system of the home folder, removed however the block ends.

        A disk that becomes full inside the block is reported as StorageFull.
        """
        folder = self._started[0].new_folder()
        try:
            with full_disk_named(self._home):
                yield folder
        finally:
            await finish(asyncio.to_thread(remove, folder))

    async def add(self, path: Path, *, filename: str, purpose: str, expires_at: datetime | None = None) -> StoredFile:
        """Store a copy of `path`. When this returns the file survives power loss; if it raises, nothing is kept.

        A call that has begun is finished even if its caller is cancelled.
        """
        return await finish(self._add(path, filename, purpose, expires_at))

    async def get(self, file_id: str) -> StoredFile:
        """Raises NotFound (param `file_id`)."""
        query = select(tables.File).where(tables.File.id == file_id, _alive())
        async with self._database.transaction(read_only=True) as session:
            row = await session.scalar(query)
        if row is None:
            raise no_file(file_id)
        return _stored(row)

    async def list(
        self,
        *,
        purpose: str | None = None,
        without: Collection[str] = (),
        after: str | None = None,
        limit: int = 10_000,
        order: Literal["asc", "desc"] = "desc",
    ) -> tuple[builtins.list[StoredFile], bool]:
        """At most `limit` files by creation, those that follow the id `after`, and whether there are more.

        Those of one `purpose`, and none whose purpose is in `without`.
        `after` may be the id of a file that was deleted meanwhile. Raises InvalidInput if it is no id of a file.
        """
        moment, name = tables.File.created_at, tables.File.id
        query = select(tables.File).where(_alive())
        if purpose is not None:
            query = query.where(tables.File.purpose == purpose)
        if without:
            query = query.where(tables.File.purpose.not_in(without))
        if after is not None:
            at = created_at_of(after)
            later = or_(moment > at, and_(moment == at, name > after))
            earlier = or_(moment < at, and_(moment == at, name < after))
            query = query.where(later if order == "asc" else earlier)
        query = query.order_by(moment, name) if order == "asc" else query.order_by(moment.desc(), name.desc())
        async with self._database.transaction(read_only=True) as session:
            rows = list(await session.scalars(query.limit(limit + 1)))
        return [_stored(row) for row in rows[:limit]], len(rows) > limit

    async def delete(self, file_id: str) -> None:
        """Delete a file; who reads it reads on. Raises NotFound."""
        file = await self.get(file_id)
        if not await finish(self._delete(file)):
            raise no_file(file_id)

    async def open(self, file: StoredFile, *, offset: int = 0) -> AsyncGenerator[bytes]:
        """Stream the bytes from `offset` in chunks of at most 1 MiB.

        Raises NotFound at the first chunk if the file was deleted before.
        """
        try:
            async for chunk in self._blobs.read(file.blob, offset=offset):
                yield chunk
        except NotFound as error:
            raise no_file(file.id) from error

    async def local_path(self, file: StoredFile, dest: Path) -> Path:
        """Put the bytes at `dest`, complete or not at all, in place of what is there. Returns `dest`.

        It may be a hard link to the stored bytes: read it, never write to it. It stays when the file is deleted.
        Raises NotFound if the file was deleted, Unavailable if the bytes are not those that were stored.
        """
        try:
            await self._blobs.fetch(file.blob, file.digest, dest)
        except NotFound as error:
            raise no_file(file.id) from error
        return dest

    async def _add(self, path: Path, filename: str, purpose: str, expires_at: datetime | None) -> StoredFile:
        size, digest = await asyncio.to_thread(_measure, path)
        blob = new_key()
        async with self._blobs.changing(blob):
            await self._objects.put_file(blob, path)
            created_at = datetime.now(UTC)
            row = tables.File(
                id=new_id(created_at),
                filename=filename,
                purpose=purpose,
                size_bytes=size,
                digest=digest,
                blob=blob,
                created_at=created_at,
                expires_at=expires_at,
            )
            file = _stored(row)
            async with self._database.transaction() as session:
                session.add(row)
        return file

    async def _delete(self, file: StoredFile) -> bool:
        """Whether there was a row, that is, whether no other caller was faster."""
        async with self._blobs.changing(file.blob), self._database.transaction() as session:
            gone = await session.execute(delete(tables.File).where(tables.File.id == file.id).returning(tables.File.id))
            return gone.scalar() is not None

    async def _sweep_again(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            await self._sweep()

    async def _sweep(self) -> None:
        """Remove expired files, and what earlier removals had to leave."""
        try:
            expired = select(tables.File).where(tables.File.expires_at <= datetime.now(UTC))
            async with self._database.transaction(read_only=True) as session:
                files = [_stored(row) for row in await session.scalars(expired)]
            for file in files:
                await finish(self._delete(file))
            await self._blobs.collect()
        except TuneloopError as error:
            log.warning("expired files were not removed; they will be later", reason=error.message)

    @property
    def _blobs(self) -> FileBlobs:
        return self._started[1]

    @property
    def _started(self) -> tuple[Instance, FileBlobs]:
        assert self._opened is not None, "start() comes first"
        return self._opened


def _alive() -> ColumnElement[bool]:
    return or_(tables.File.expires_at.is_(None), tables.File.expires_at > datetime.now(UTC))


def no_file(file_id: str) -> NotFound:
    """What is said of an id that has no file, or none that the caller may see."""
    return NotFound(
        f"There is no file '{file_id}': it was deleted, its time was up, or it never was. "
        "List the files to see their ids.",
        param="file_id",
    )


def _measure(path: Path) -> tuple[int, str]:
    with path.open("rb") as reader:
        digest = hashlib.file_digest(reader, "sha256")
        return reader.tell(), f"sha256:{digest.hexdigest()}"


def _stored(row: tables.File) -> StoredFile:
    return StoredFile(
        id=row.id,
        filename=row.filename,
        purpose=row.purpose,
        size_bytes=row.size_bytes,
        digest=row.digest,
        blob=row.blob,
        created_at=row.created_at,
        expires_at=row.expires_at,
    )
