"""Objects in a bucket, through fsspec: files first, a manifest last. It knows no URL and no database.

A bucket has no rename, so a folder exists from the moment its manifest does: `.manifest.json`, which names every file
with its size and SHA-256. A fetch checks both.
"""

import hashlib
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from . import durable
from .errors import NotFound, TuneloopError, Unavailable
from .local_objects import remove, rename_unless_there

_MANIFEST = ".manifest.json"
_CHUNK_BYTES = 8 * 1024 * 1024


class RemoteObjects:
    """The blocking half of `ObjectStore` for an fsspec file system and a root path in it. Keys were checked."""

    def __init__(self, filesystem: Any, root: str) -> None:
        self._filesystem = filesystem
        self._root = root.rstrip("/")

    def put_folder(self, key: str, folder: Path) -> None:
        with self._translated():
            if self._has_manifest(key):
                return
            files = {
                name.as_posix(): self._upload(folder / name, f"{self._path(key)}/{name.as_posix()}")
                for name in durable.files_below(folder)
            }
            self._filesystem.pipe_file(f"{self._path(key)}/{_MANIFEST}", json.dumps({"files": files}).encode())

    def fetch_folder(self, key: str, dest: Path) -> None:
        if dest.is_dir():
            return
        partial = dest.with_name(f".{dest.name}.{secrets.token_hex(8)}.partial")
        with self._translated():
            try:
                manifest = json.loads(self._filesystem.cat_file(f"{self._path(key)}/{_MANIFEST}"))
            except FileNotFoundError as error:
                raise NotFound(f"The object store has no folder {key!r}.") from error
            durable.make_folder(dest.parent)
            try:
                for name, facts in manifest["files"].items():
                    self._download(key, name, facts, partial)
                durable.sync_folder(partial)
                rename_unless_there(partial, dest)
            except BaseException:
                if partial.exists():
                    remove(partial)
                raise

    def put_file(self, key: str, path: Path) -> None:
        with self._translated():
            self._upload(path, self._path(key))

    def open_file(self, key: str) -> BinaryIO:
        with self._translated():
            try:
                return cast(BinaryIO, self._filesystem.open(self._path(key), "rb"))
            except (FileNotFoundError, IsADirectoryError) as error:
                raise NotFound(f"The object store has no file {key!r}.") from error

    def exists(self, key: str) -> bool:
        with self._translated():
            return self._has_manifest(key) or self._filesystem.isfile(self._path(key))

    def delete(self, key: str) -> None:
        with self._translated():
            if self._has_manifest(key):  # first, so that a kill halfway leaves no folder that looks complete
                self._filesystem.rm_file(f"{self._path(key)}/{_MANIFEST}")
            if self._filesystem.exists(self._path(key)):
                self._filesystem.rm(self._path(key), recursive=True)

    def list(self, prefix: str) -> list[str]:
        base = self._path(prefix)
        keys = set()
        with self._translated():
            for path in self._filesystem.find(base):
                below = str(path).removeprefix(base).strip("/").split("/")
                if len(below) == 1 or (len(below) == 2 and below[1] == _MANIFEST):
                    keys.add(f"{prefix}/{below[0]}")
        return sorted(keys)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _has_manifest(self, key: str) -> bool:
        return bool(self._filesystem.exists(f"{self._path(key)}/{_MANIFEST}"))

    def _upload(self, source: Path, path: str) -> dict[str, Any]:
        digest, size = hashlib.sha256(), 0
        with source.open("rb") as reader, self._filesystem.open(path, "wb") as writer:
            while chunk := reader.read(_CHUNK_BYTES):
                writer.write(chunk)
                digest.update(chunk)
                size += len(chunk)
        return {"size": size, "sha256": digest.hexdigest()}

    def _download(self, key: str, name: str, facts: dict[str, Any], folder: Path) -> None:
        dest = folder / name
        dest.parent.mkdir(parents=True, exist_ok=True)
        digest, size = hashlib.sha256(), 0
        with dest.open("wb") as writer:
            while size < facts["size"]:
                end = min(size + _CHUNK_BYTES, facts["size"])
                chunk = self._filesystem.cat_file(f"{self._path(key)}/{name}", start=size, end=end)
                if not chunk:
                    break
                writer.write(chunk)
                digest.update(chunk)
                size += len(chunk)
        if size != facts["size"] or digest.hexdigest() != facts["sha256"]:
            raise Unavailable(
                f"The file {name!r} of {key!r} in the object store is not the one that was stored "
                f"({size} bytes, expected {facts['size']}). Store it again."
            )
        durable.sync_file(dest)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except TuneloopError:
            raise
        except Exception as error:  # each backend has a tree of errors of its own, not all of them OSErrors
            raise Unavailable(
                f"The object store at {self._root} failed: {error}. Check that it is reachable and that its "
                "credentials are right."
            ) from error
