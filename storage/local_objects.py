"""Objects in a local folder: written aside, synced, renamed. It knows no URL and no database.

A folder or file being written is called `.<name>.<random>.partial` beside its final place; names that begin with a dot
are never listed.
"""

import errno
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from . import durable
from .errors import NotFound, Unavailable
from .full_disk import full_disk_named


class LocalObjects:
    """The blocking half of `ObjectStore` for a folder `root`, which need not exist yet. Keys were checked."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, key: str) -> Path:
        return self._root / key

    def put_folder(self, key: str, folder: Path) -> None:
        with self._translated():
            durable.make_folder(self.path(key).parent)
            _copy_into_place(folder, self.path(key))

    def fetch_folder(self, key: str, dest: Path) -> None:
        if not self.path(key).is_dir():
            raise NotFound(f"The object store has no folder {key!r}.")
        with self._translated():
            durable.make_folder(dest.parent)
            _copy_into_place(self.path(key), dest)

    def put_file(self, key: str, path: Path) -> None:
        final = self.path(key)
        partial = _partial(final)
        with self._translated():
            durable.make_folder(final.parent)
            try:
                durable.copy_file(path, partial)
                partial.replace(final)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
            durable.sync_folder(final.parent)

    def open_file(self, key: str) -> BinaryIO:
        if not self.path(key).is_file():
            raise NotFound(f"The object store has no file {key!r}.")
        with self._translated():
            return self.path(key).open("rb")

    def exists(self, key: str) -> bool:
        return self.path(key).exists()

    def delete(self, key: str) -> None:
        final = self.path(key)
        if not final.parent.is_dir():
            return
        with self._translated():
            if final.is_dir():
                final.rename(_partial(final))  # gone for readers at once, though its removal takes a while
                durable.sync_folder(final.parent)
            else:
                final.unlink(missing_ok=True)
            for leftover in final.parent.glob(f".{final.name}.*.partial"):
                remove(leftover)
            durable.sync_folder(final.parent)

    def list(self, prefix: str) -> list[str]:
        folder = self.path(prefix)
        if not folder.is_dir():
            return []
        with self._translated():
            return sorted(f"{prefix}/{entry.name}" for entry in folder.iterdir() if not entry.name.startswith("."))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            with full_disk_named(self._root):
                yield
        except OSError as error:
            raise Unavailable(
                f"The object store in {self._root} failed: {error}. Check its free space and its rights."
            ) from error


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it; one that is gone already is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _partial(final: Path) -> Path:
    return final.with_name(f".{final.name}.{secrets.token_hex(8)}.partial")


def _copy_into_place(source: Path, final: Path) -> None:
    if final.is_dir():
        return
    partial = _partial(final)
    try:
        durable.copy_folder(source, partial)
        rename_unless_there(partial, final)
    except BaseException:
        if partial.exists():
            remove(partial)
        raise


def rename_unless_there(partial: Path, final: Path) -> None:
    """Give a complete folder its final name, on disk when it returns; if another was faster, keep that one."""
    try:
        partial.rename(final)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        remove(partial)
    durable.sync_folder(final.parent)
