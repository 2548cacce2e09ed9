"""Unpacks an uploaded archive (zip, tar, tar.gz, told by content) into the two files of a PEFT adapter.

It knows nothing of what the files mean. Nothing in the archive's headers is trusted: sizes are counted while bytes
stream, and no member's name is ever used as a path: the two files are found by name and written under fixed names.
"""

import gzip
import os
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from ..storage.errors import InvalidInput, TooLarge
from .base import AdapterLimits
from .files import (
    ADAPTER_FILES,
    CHUNK,
    CONFIG_NAME,
    WEIGHTS_NAME,
    Readable,
    refuse_harmful,
    shown,
    too_many_bytes,
    write_new,
)
from .tar_reader import broken, read_tar
from .zip_reader import ZipReader

MAX_MEMBERS = 1000
RATIO_FREE_BYTES = 1024**2  # so little is no bomb, and a tiny adapter of constants packs very well
_PEEK = 512
_DECOMPRESSION_ERRORS = (zlib.error, gzip.BadGzipFile, zipfile.BadZipFile)


class Member(Readable, Protocol):
    """A file or directory of an archive; `read` streams it."""

    @property
    def name(self) -> str: ...

    @property
    def is_directory(self) -> bool: ...


def unpack(archive: Path, dest: Path, limits: AdapterLimits) -> None:
    """Put `adapter_config.json` and `adapter_model.safetensors` of an archive into the existing, empty folder `dest`.

    They may lie at the top or in one folder. Harmless other files are skipped. Blocking. Raises InvalidInput for
    links, devices, absolute or climbing paths, duplicates, encryption, pickles, archives inside, several adapters and
    broken archives; TooLarge over the limits of members, bytes or ratio. After an error `dest` is as it was.
    """
    with archive.open("rb") as file:
        unpack_file(file, dest, limits)


def unpack_file(file: BinaryIO, dest: Path, limits: AdapterLimits) -> None:
    """`unpack` for a file that is open already, at its start."""
    packed = file.seek(0, os.SEEK_END)
    file.seek(0)
    budget = _Budget(packed, limits)
    with (
        tempfile.TemporaryDirectory(dir=dest, prefix=".unpack-") as aside,
        _readable(),
        _members(file, packed, budget) as members,
    ):
        found = _collect(members, Path(aside), budget)
        for name, path in _chosen(found).items():
            path.rename(dest / name)


class _Budget:
    """Counts the bytes that come out of an archive and stops at the limits."""

    def __init__(self, packed: int, limits: AdapterLimits) -> None:
        self.limits = limits
        self._spent = 0
        self._ratio_bytes = max(packed * limits.max_compressed_ratio, RATIO_FREE_BYTES)

    def spend(self, size: int) -> None:
        self._spent += size
        self.check(self._spent)

    def check(self, size: int) -> None:
        """Raise TooLarge if `size` bytes in all would be too many."""
        if size > self.limits.max_bytes:
            raise too_many_bytes("The archive's content", self.limits.max_bytes)
        if size > self._ratio_bytes:
            raise TooLarge(
                f"The archive unpacks to more than {self.limits.max_compressed_ratio} times its size, as a zip bomb "
                f"does. Send {CONFIG_NAME} and {WEIGHTS_NAME} without compression.",
                param="file",
                code="archive_bomb",
            )


def _collect(members: Iterator[Member], aside: Path, budget: _Budget) -> dict[tuple[str, ...], Path]:
    """Write each member that is one of the two files aside, under a number; refuse what must not be there."""
    found: dict[tuple[str, ...], Path] = {}
    seen: set[tuple[str, ...]] = set()
    for count, member in enumerate(members):
        if count >= MAX_MEMBERS:
            raise TooLarge(f"The archive has more than {MAX_MEMBERS} members; an adapter needs two.", param="file")
        parts = _safe_parts(member.name)
        if member.is_directory:
            continue
        if not parts or parts in seen:
            raise _unsafe(f"holds {shown(member.name)} twice" if parts else "holds a file without a name")
        seen.add(parts)
        if parts[-1] in ADAPTER_FILES:
            found[parts] = aside / str(count)
            write_new(found[parts], member, max_bytes=budget.limits.max_bytes)
        else:
            refuse_harmful(member.name, member.read(_PEEK))
    return found


def _safe_parts(name: str) -> tuple[str, ...]:
    """The components of a member's name. Raises InvalidInput if it could lead out of the archive."""
    if name.startswith("/") or "\\" in name or name[1:2] == ":":
        raise _unsafe(f"holds the absolute or foreign path {shown(name)}")
    if len(name) > 4096 or not name.isprintable():
        raise _unsafe(f"holds the name {shown(name)}, which is too long or not printable")
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in parts:
        raise _unsafe(f"holds the path {shown(name)}, which climbs out of the archive")
    return parts


def _chosen(found: dict[tuple[str, ...], Path]) -> dict[str, Path]:
    """The two files of the one adapter, by name."""
    folders = sorted({parts[:-1] for parts in found if parts[-1] == CONFIG_NAME})
    if not folders:
        raise _missing(CONFIG_NAME)
    if len(folders) > 1:
        names = ", ".join(shown("/".join(folder) or ".") for folder in folders[:3])
        raise InvalidInput(
            f"The archive holds {len(folders)} adapters (in {names}); pack the folder of one.", param="file"
        )
    (folder,) = folders
    if len(folder) > 1:
        raise InvalidInput(
            f"The archive holds the adapter in {shown('/'.join(folder))}, too deep; pack that folder itself.",
            param="file",
        )
    if (*folder, WEIGHTS_NAME) not in found:
        raise _missing(f"{WEIGHTS_NAME} beside {CONFIG_NAME}")
    return {name: found[*folder, name] for name in ADAPTER_FILES}


@contextmanager
def _readable() -> Iterator[None]:
    """Turn what the decompressors raise about the archive's bytes into InvalidInput."""
    try:
        yield
    except (EOFError, NotImplementedError, ValueError, struct.error, *_DECOMPRESSION_ERRORS) as error:
        raise broken(f"it cannot be decompressed ({shown(str(error))})") from error


@contextmanager
def _members(file: BinaryIO, packed: int, budget: _Budget) -> Iterator[Iterator[Member]]:
    """The members of an archive of `packed` bytes, whatever its format."""
    head = file.read(_PEEK)
    file.seek(0)
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        with closing(ZipReader(file, packed)) as archive:
            budget.check(archive.claimed_bytes)
            yield (_Counted(member, budget, member.name, member.is_directory) for member in archive.members())
    elif head[:2] == b"\x1f\x8b":
        with gzip.GzipFile(fileobj=file, mode="rb") as stream:
            yield _tar_members(_Counted(stream, budget))
    elif head[257:262] == b"ustar":
        yield _tar_members(_Counted(file, budget))
    else:
        raise InvalidInput("The file is not an archive that is read here: send zip, tar or tar.gz.", param="file")


def _tar_members(source: Readable) -> Iterator[Member]:
    yield from read_tar(source)
    while source.read(CHUNK):
        pass  # to the end, where gzip verifies its checksum


@dataclass
class _Counted:
    """A source whose bytes are counted as they come out."""

    _source: Readable
    _budget: _Budget
    name: str = ""
    is_directory: bool = False

    def read(self, size: int, /) -> bytes:
        data = self._source.read(size)
        self._budget.spend(len(data))
        return data


def _missing(what: str) -> InvalidInput:
    return InvalidInput(
        f"The archive has no {what}. Pack the folder that PEFT's `model.save_pretrained(folder)` wrote: it needs "
        f"{CONFIG_NAME} and {WEIGHTS_NAME}.",
        param="file",
        code="missing_file",
    )


def _unsafe(what: str) -> InvalidInput:
    return InvalidInput(
        f"The archive {what}. Pack {CONFIG_NAME} and {WEIGHTS_NAME} only, by relative names.",
        param="file",
        code="unsafe_archive",
    )
