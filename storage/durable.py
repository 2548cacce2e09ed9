"""File operations that survive power loss, for local folders. They know nothing of keys or stores."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import InvalidInput


def files_below(folder: Path) -> Iterator[Path]:
    """All regular files below `folder`, sorted, relative to it. Raises InvalidInput for links, devices and the like."""
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink() or not (entry.is_dir() or entry.is_file()):
            raise InvalidInput(f"{entry} is neither a regular file nor a folder; store only those.")
        if entry.is_dir():
            yield from (Path(entry.name) / inner for inner in files_below(entry))
        else:
            yield Path(entry.name)


def make_folder(folder: Path) -> None:
    """Like `mkdir -p`, and the new entries are on disk when it returns."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def copy_file(source: Path, dest: Path) -> None:
    """Copy the bytes and wait until they are on disk. The new name itself is not yet: sync its folder."""
    shutil.copyfile(source, dest)
    sync_file(dest)


def copy_folder(source: Path, dest: Path) -> None:
    """Copy all files below `source` into the new folder `dest`, bytes and names on disk when it returns."""
    dest.mkdir()
    folders = {dest}
    for name in files_below(source):
        for parent in reversed(name.parents[:-1]):
            (dest / parent).mkdir(exist_ok=True)
            folders.add(dest / parent)
        copy_file(source / name, dest / name)
    for folder in folders:
        sync_folder(folder)


def write_atomic(path: Path, text: str) -> None:
    """Write a small file: readers see the old or the new one, and the new one survives power loss on return."""
    aside = path.with_name(f".{path.name}.new")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Wait until a file's bytes are on disk."""
    _sync(path, os.O_RDONLY)


def sync_folder(path: Path) -> None:
    """Wait until a folder's entries (names, renames) are on disk."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
