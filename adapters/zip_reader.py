"""Reads a zip file member by member, strictly, in bounded memory. It extracts nothing itself.

The standard library decodes the format; what it trusts is checked here: the size of its table of contents, offsets,
encryption, methods, and the file types that Unix puts into the attributes.
"""

import stat
import zipfile
from collections.abc import Iterator
from typing import IO, BinaryIO

from ..storage.errors import InvalidInput
from .files import CHUNK, shown

_MAX_READ = 4 * CHUNK  # of the table of contents, which zipfile reads at once: about 50,000 members
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class ZipMember:
    """A directory or a plain file; `read` gives the file's bytes until the next member is asked for."""

    def __init__(self, name: str, stream: IO[bytes] | None) -> None:
        self.name = name
        self.is_directory = stream is None
        self._stream = stream

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, empty at the end, where the checksum is verified."""
        return b"" if self._stream is None else self._stream.read(min(size, CHUNK))


class ZipReader:
    """An open zip file. Raises zipfile.BadZipFile, NotImplementedError or ValueError for broken ones."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        """`size` is the file's, in bytes."""
        self._zip = zipfile.ZipFile(_Guarded(file, size))

    @property
    def claimed_bytes(self) -> int:
        """The size of all members by their own word: good enough to refuse, never to accept."""
        return sum(info.file_size for info in self._zip.infolist())

    def members(self) -> Iterator[ZipMember]:
        """The members in order. Raises InvalidInput for links, devices, encryption and unusual methods."""
        for info in self._zip.infolist():
            _refuse_unusual(info)
            if info.orig_filename.endswith("/"):  # is_dir() fails for an empty name
                yield ZipMember(info.orig_filename, None)
                continue
            with self._zip.open(info) as stream:
                yield ZipMember(info.orig_filename, stream)

    def close(self) -> None:
        """Forget the table of contents; the file stays open for whoever opened it."""
        self._zip.close()


class _OutsideError(zipfile.BadZipFile, OSError):
    """A seek outside the file. zipfile catches OSError where it looks for a record that need not be there."""


class _Guarded:
    """The file as zipfile sees it: no read so large that it fills the memory, no seek outside the file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size

    def read(self, size: int = -1) -> bytes:
        wanted = self._size - self._file.tell() if size is None or size < 0 else size
        if wanted > _MAX_READ:
            raise zipfile.BadZipFile(f"its table of contents has {wanted} bytes")
        return self._file.read(max(wanted, 0))

    def seek(self, offset: int, whence: int = 0) -> int:
        target = offset + (0, self._file.tell(), self._size)[whence]
        if not 0 <= target <= self._size:
            raise _OutsideError("an offset lies outside the file")
        return self._file.seek(target)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        """Nothing: the file belongs to whoever opened it."""


def _refuse_unusual(info: zipfile.ZipInfo) -> None:
    name = shown(info.orig_filename)
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        what = "a symbolic link" if kind == stat.S_IFLNK else "a device or pipe"
        raise InvalidInput(
            f"The archive holds {name}, {what}. Pack plain files only.", param="file", code="unsafe_archive"
        )
    if info.flag_bits & 0x2041:  # encrypted, strongly encrypted, or with an encrypted table of contents
        raise InvalidInput(f"The archive's {name} is encrypted; pack it without a password.", param="file")
    if info.compress_type not in _METHODS:
        raise InvalidInput(
            f"The archive's {name} is compressed by method {info.compress_type}, which is not read here; use plain "
            "zip (deflate) or tar.gz.",
            param="file",
        )
