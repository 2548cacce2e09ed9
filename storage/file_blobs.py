"""The bytes of files: objects under keys of their own. It knows which rows refer to them, but no name and no purpose.

Before a row that refers to an object is written or removed, a note with the object's key lies on disk; it goes when
object and row agree again. So a kill at any point leaves at worst a note that says what to look at.
"""

import asyncio
import errno
import hashlib
import os
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import structlog
from sqlalchemy import exists, select

from . import durable, tables
from .database import Database
from .errors import NotFound, TuneloopError, Unavailable
from .full_disk import full_disk_named
from .objects import ObjectStore

log = structlog.get_logger(__name__)

_NO_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP})  # then the bytes are copied


class FileBlobs:
    """Objects of one store whose notes lie in the folder `notes`; `writer` is this process's id."""

    def __init__(self, database: Database, objects: ObjectStore, *, notes: Path, writer: str) -> None:
        self._database = database
        self._objects = objects
        self._notes = notes
        self._writer = writer
        self._busy: Counter[str] = Counter()
        self._noting = asyncio.Lock()  # a note is not written while `collect` decides that it may go

    @asynccontextmanager
    async def changing(self, blob: str) -> AsyncIterator[None]:
        """Inside the block a row that refers to `blob` is written or removed.

        After it the object is removed if no row refers to it, be it that the row was removed or was never written.
        """
        try:
            with self.held(blob):
                async with self._noting:
                    await asyncio.to_thread(self._write_note, blob)
                yield
        finally:
            await self.collect_quietly()

    @contextmanager
    def held(self, blob: str) -> Iterator[None]:
        """Inside the block this process does not remove the object; `collect` does, some time after it."""
        self._busy[blob] += 1
        try:
            yield
        finally:
            self._busy[blob] -= 1
            if self._busy[blob] == 0:
                del self._busy[blob]

    async def take_over(self, writers: Sequence[str]) -> None:
        """Make the notes of processes that ended this one's."""
        await asyncio.to_thread(self._take_over, writers)

    async def collect(self) -> None:
        """Remove the objects that this process's notes name, that no row refers to and that nobody here reads."""
        for note in await asyncio.to_thread(self._notes_of, self._writer):
            async with self._noting:
                blob = f"files/{note.suffix[1:]}"
                if self._busy[blob] > 0:
                    continue
                if not await self._is_referenced(blob):
                    await self._objects.delete(blob)
                await asyncio.to_thread(note.unlink, missing_ok=True)

    async def collect_quietly(self) -> None:
        """`collect`, where a failure only leaves more for the next time and must not fail the caller's work."""
        try:
            await self.collect()
        except TuneloopError as error:
            log.warning("bytes of deleted files were not removed; they will be later", reason=error.message)

    async def read(self, blob: str, *, offset: int = 0) -> AsyncIterator[bytes]:
        """Stream the object; it stays until the end. Raises NotFound at the first chunk if there is none."""
        with self.held(blob):
            async for chunk in self._objects.open_file(blob, offset=offset):
                yield chunk

    async def fetch(self, blob: str, digest: str, dest: Path) -> None:
        """Put the object's bytes at `dest`, in place of what is there: a hard link where it can be, else a copy.

        Raises NotFound if there is no such object, Unavailable if a copy's digest is another.
        """
        partial = dest.with_name(f".{dest.name}.{secrets.token_hex(8)}.partial")
        with full_disk_named(dest.parent):
            await asyncio.to_thread(durable.make_folder, dest.parent)
            try:
                if not await asyncio.to_thread(self._link, blob, partial):
                    await self._copy(blob, digest, partial)
                await asyncio.to_thread(_put_into_place, partial, dest)
            finally:
                await asyncio.to_thread(partial.unlink, missing_ok=True)

    def _link(self, blob: str, dest: Path) -> bool:
        """Whether the object lies on this machine and on the file system of `dest`."""
        source = self._objects.local_folder(blob)
        if source is None:
            return False
        try:
            os.link(source, dest)
        except FileNotFoundError as error:
            raise NotFound(f"The object store has no file {blob!r}.") from error
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            return False
        return True

    async def _copy(self, blob: str, digest: str, dest: Path) -> None:
        copied = hashlib.sha256()

        def write(chunk: bytes) -> None:
            writer.write(chunk)
            copied.update(chunk)

        with await asyncio.to_thread(dest.open, "xb") as writer:
            async for chunk in self.read(blob):
                await asyncio.to_thread(write, chunk)
        if f"sha256:{copied.hexdigest()}" != digest:
            raise Unavailable(
                f"The bytes of {blob!r} in the object store are not those that were stored. "
                "Delete the file and upload it again."
            )
        await asyncio.to_thread(durable.sync_file, dest)

    async def _is_referenced(self, blob: str) -> bool:
        async with self._database.transaction(read_only=True) as session:
            return bool(await session.scalar(select(exists().where(tables.File.blob == blob))))

    def _write_note(self, blob: str) -> None:
        with full_disk_named(self._notes):
            durable.make_folder(self._notes)
            (self._notes / f"{self._writer}.{blob.removeprefix('files/')}").touch()
            durable.sync_folder(self._notes)

    def _take_over(self, writers: Sequence[str]) -> None:
        for writer in writers:
            for note in self._notes_of(writer):
                note.rename(note.with_stem(self._writer))

    def _notes_of(self, writer: str) -> list[Path]:
        return sorted(self._notes.glob(f"{writer}.*"))


def _put_into_place(partial: Path, dest: Path) -> None:
    partial.replace(dest)
    durable.sync_folder(dest.parent)


def new_key() -> str:
    """A key in the object store that nothing has had yet."""
    return f"files/{secrets.token_hex(16)}"
