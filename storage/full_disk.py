"""Tells a full disk from other failures of the file system. It knows no store and no database."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import StorageFull

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def full_disk_named(folder: Path | str) -> Iterator[None]:
    """Raise StorageFull in place of an OSError that says the disk or the quota is full; others pass as they are."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise full_disk(folder) from error
        raise


def full_disk(folder: Path | str) -> StorageFull:
    return StorageFull(
        f"The disk that holds {folder} is full. Nothing of this was kept; free some space and try again."
    )
