"""The object store: immutable folders and files under keys. It knows nothing of what is inside them.

`LocalObjects` keeps them in a folder of this machine, `RemoteObjects` in anything that fsspec reaches (`s3://`,
`gs://`, `memory://`). All blocking work runs in threads.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

import fsspec
from fsspec.core import split_protocol, url_to_fs

from .errors import InvalidInput, Unavailable
from .local_objects import LocalObjects
from .remote_objects import RemoteObjects

_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_EXTRAS = {"s3": "s3", "s3a": "s3"}
_CHUNK_BYTES = 1024 * 1024


class ObjectStore:
    """Folders and files by key (`adapters/<hex>`), complete or absent: no reader ever sees half of one.

    `url` is a local path, `file:///path`, or an fsspec URL such as `s3://bucket/prefix`. All methods raise InvalidInput
    for a malformed key, StorageFull when the disk is full, and Unavailable when the store fails otherwise (no rights,
    bucket out of reach).
    """

    def __init__(self, url: str) -> None:
        self._backend = _open_backend(url)

    @property
    def is_local(self) -> bool:
        """Whether folders can be used where they lie."""
        return isinstance(self._backend, LocalObjects)

    def local_folder(self, key: str) -> Path | None:
        """Where the folder `key` lies (or would lie) on this machine; None when the store is remote."""
        return self._backend.path(_check(key)) if isinstance(self._backend, LocalObjects) else None

    async def put_folder(self, key: str, folder: Path) -> None:
        """Store a copy of all files below `folder`; when this returns they survive power loss.

        A key that exists is left as it is: keys are content-addressed. Safe from several callers at once. A call that
        was killed leaves nothing that readers can see; `delete` removes what it left.
        Raises InvalidInput if the folder holds anything but regular files and folders.
        """
        await asyncio.to_thread(self._backend.put_folder, _check(key), folder)

    async def fetch_folder(self, key: str, dest: Path) -> None:
        """Copy the folder to `dest`, which appears complete or not at all. An existing `dest` is left as it is.

        Raises NotFound if there is no such folder, Unavailable if its content is not what was stored.
        """
        await asyncio.to_thread(self._backend.fetch_folder, _check(key), dest)

    async def put_file(self, key: str, path: Path) -> None:
        """Store a copy of one file, in place of the one that is there. Readers get the old or the new, never a mix."""
        await asyncio.to_thread(self._backend.put_file, _check(key), path)

    async def open_file(self, key: str, *, offset: int = 0) -> AsyncIterator[bytes]:
        """Stream a stored file from byte `offset` in chunks of at most 1 MiB. Raises NotFound at the first chunk."""
        stream = await asyncio.to_thread(self._backend.open_file, _check(key))
        try:
            await asyncio.to_thread(stream.seek, offset)
            while chunk := await self._read(stream, key):
                yield chunk
        finally:
            stream.close()

    async def exists(self, key: str) -> bool:
        """Whether a complete folder or file has this key."""
        return await asyncio.to_thread(self._backend.exists, _check(key))

    async def delete(self, key: str) -> None:
        """Remove a folder or file, and whatever killed `put` calls left of it. Unknown keys are safe.

        Must not run while the same key is being stored.
        """
        await asyncio.to_thread(self._backend.delete, _check(key))

    async def _read(self, stream: BinaryIO, key: str) -> bytes:
        try:
            return await asyncio.to_thread(stream.read, _CHUNK_BYTES)
        except Exception as error:  # each backend has a tree of errors of its own
            raise Unavailable(f"The object store failed while {key!r} was read: {error}. Try again.") from error

    async def list(self, prefix: str) -> list[str]:
        """The keys of the complete folders and files directly below `prefix`, sorted."""
        return await asyncio.to_thread(self._backend.list, _check(prefix))


def _open_backend(url: str) -> LocalObjects | RemoteObjects:
    protocol, rest = split_protocol(url)
    if protocol in (None, "file", "local"):
        return LocalObjects(Path(rest).expanduser().absolute())
    try:
        # Another replica changes the same bucket: a cached listing would be wrong.
        filesystem, root = url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        fix = f'pip install "tuneloop[{extra}]"' if extra else "the package that the message names"
        raise InvalidInput(
            f"storage_url {url!r} needs a package that is not installed ({error}); install it with {fix}.",
            param="storage_url",
        ) from error
    except ValueError as error:
        known = ", ".join(sorted(fsspec.available_protocols()))
        raise InvalidInput(
            f"storage_url {url!r} cannot be opened ({error}); use a local path or one of the protocols {known}.",
            param="storage_url",
        ) from error
    return RemoteObjects(filesystem, root)


def _check(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise InvalidInput(
            f"The storage key {key!r} is malformed; use names of letters, digits, '.', '_' and '-' joined by '/', "
            "none of which begins with '.'."
        )
    return key
