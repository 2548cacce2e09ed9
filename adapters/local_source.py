"""Copies an adapter from a folder or archive of this machine, if it lies under an allowed root. Blocking."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from ..storage.errors import InvalidInput, NotFound, PermissionDenied
from .archive import unpack_file
from .base import AdapterLimits
from .files import ADAPTER_FILES, CONFIG_NAME, WEIGHTS_NAME, pickle_name, refuse_pickle, shown, write_new


def copy_local(path: Path, dest: Path, roots: Sequence[Path], limits: AdapterLimits) -> Path:
    """Copy the adapter at `path` into `dest` and return the path with its links followed.

    Links are allowed as long as what they lead to lies under a root (a hub's cache is made of them). Files are opened
    without following links any more, so swapping one in after the check gains nothing.
    """
    resolved = _allowed(path, roots)
    if not resolved.is_dir():
        with _open(resolved) as file:
            if resolved.name in ADAPTER_FILES:
                raise InvalidInput(f"source {shown(str(path))} is one file; give the adapter's folder.", param="source")
            unpack_file(file, dest, limits)
        return resolved
    for name in ADAPTER_FILES:
        try:
            file = _open(_allowed(resolved / name, roots))
        except NotFound:
            raise _missing(name, resolved) from None
        with file:
            write_new(dest / name, file, max_bytes=limits.max_bytes)
    return resolved


def _allowed(path: Path, roots: Sequence[Path]) -> Path:
    """The path with all links followed. Raises PermissionDenied unless that lies under a root, existing or not."""
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError):  # a loop of links, a name too long
        resolved = None
    if resolved is None or not any(resolved.is_relative_to(root.resolve()) for root in roots):
        allowed = ", ".join(map(str, roots)) if roots else "none are set"
        raise PermissionDenied(
            f"source {shown(str(path))} lies outside the folders that adapters may be loaded from ({allowed}). Set "
            "TUNELOOP_ADAPTER_ROOTS, or upload the files.",
            param="source",
        )
    return resolved


def _open(path: Path) -> BinaryIO:
    """Open a plain file by a path that holds no links, step by step, so that none can be swapped in."""
    step = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW  # O_PATH needs no right to list it
    directory = os.open("/", step)
    try:
        for part in path.parts[1:-1]:
            inner = os.open(part, step, dir_fd=directory)
            os.close(directory)
            directory = inner
        # O_NONBLOCK: opening a named pipe must not wait for its writer
        descriptor = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    except FileNotFoundError:
        raise NotFound(f"source {shown(str(path))} does not exist.", param="source") from None
    except OSError as error:
        raise InvalidInput(
            f"source {shown(str(path))} cannot be read: {os.strerror(error.errno or 0)}.", param="source"
        ) from error
    finally:
        os.close(directory)
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise InvalidInput(f"source {shown(str(path))} is not a plain file.", param="source")
    return file


def _missing(name: str, folder: Path) -> InvalidInput | NotFound:
    if name == WEIGHTS_NAME:
        pickles = sorted(entry.name for entry in folder.iterdir() if pickle_name(entry.name))
        if pickles:
            return refuse_pickle(pickles[0])
    return NotFound(
        f"source {shown(str(folder))} has no {name}; an adapter's folder holds {CONFIG_NAME} and {WEIGHTS_NAME}.",
        param="source",
    )
