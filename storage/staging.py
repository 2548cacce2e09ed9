"""Makes folders that are complete or absent, and removes what killed processes left half made. It knows no content.

An unfinished folder lies beside its final place as `.<name>.<random>.partial`, and its maker holds a lock on it that
the kernel lets go of even at kill -9: that is how the leftovers of the dead are told from the work of the living.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .durable import make_folder, sync_folder
from .full_disk import full_disk_named
from .locks import lock_now

_SUFFIX = ".partial"


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A private folder that becomes `folder` when the block ends well, and is removed when it does not.

    The block syncs its files. If another process has made `folder` meanwhile, that one stays. Raises StorageFull.
    """
    make_folder(folder.parent)
    with full_disk_named(folder.parent):
        _remove_leftovers(folder.parent)
        aside, lock = _private_folder(folder)
        try:
            yield aside
            sync_folder(aside)
            try:
                aside.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
            sync_folder(folder.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            os.close(lock)


def _private_folder(folder: Path) -> tuple[Path, int]:
    while True:
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=_SUFFIX, dir=folder.parent))
        lock = _lock(aside)
        if lock is not None:
            if aside.is_dir():  # nobody took it for a leftover before it was locked
                return aside, lock
            os.close(lock)


def _remove_leftovers(parent: Path) -> None:
    for found in parent.glob(f".*{_SUFFIX}"):
        lock = _lock(found)
        if lock is not None:
            shutil.rmtree(found, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock, or None if it is gone or another process has it."""
    try:
        return lock_now(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, BlockingIOError):
        return None
