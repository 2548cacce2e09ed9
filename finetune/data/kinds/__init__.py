"""Kinds of data files: JSONL, JSON, CSV, Parquet, text. A file's kind is told by its first bytes and its name."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from ..base import Place
from ..checks import DataError
from .base import FileKind, Record
from .json_array import JsonArray
from .jsonl import JsonLines
from .lines import foreign_encoding, open_bytes
from .parquet import Parquet
from .plain_text import PlainText
from .table import Table

__all__ = ["SUFFIXES", "FileKind", "Record", "file_kind", "is_data_file", "read_records"]

_KINDS: tuple[FileKind, ...] = (Parquet(), JsonLines(), JsonArray(), Table(), PlainText())
SUFFIXES = tuple(suffix for kind in _KINDS for suffix in kind.suffixes)
_HEAD_BYTES = 64 * 1024
_PACKED = {
    b"PK\x03\x04": "a zip archive", b"\x28\xb5\x2f\xfd": "zstd-compressed", b"\xfd7zXZ": "xz-compressed",
    b"BZh": "bzip2-compressed", b"ARROW1": "an Arrow file",
}  # fmt: skip


def is_data_file(name: str) -> bool:
    return name.lower().removesuffix(".gz").endswith(SUFFIXES)


def file_kind(path: Path, name: str) -> FileKind:
    """Raises DataError for a file that is empty, packed, or of no known kind."""
    place = Place(name, 1)
    try:
        head = _head(path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError("the gzip file is broken.", "Pack it again, or give it unpacked.", place=place) from error
    if head.startswith(b"PAR1"):
        return _KINDS[0]
    for mark, what in _PACKED.items():
        if head.startswith(mark):
            raise DataError(
                f"the file is {what}.", "Unpack it; JSONL, JSON, CSV, Parquet and text are read.", place=place
            )
    foreign = foreign_encoding(head, name)
    if foreign is not None:
        raise foreign
    if not path.stat().st_size:
        raise DataError("the file is empty (0 bytes).", "Give a file with rows.", place=place)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text and len(head) < _HEAD_BYTES:
        raise DataError("the file holds nothing but blanks.", "Give a file with rows.", place=place)
    return _by_name(name, text.partition(b"\n")[0].rstrip(), place)


def _by_name(name: str, first_line: bytes, place: Place) -> FileKind:
    first = first_line[:1]
    suffix = Path(name.lower().removesuffix(".gz")).suffix
    named = next((kind for kind in _KINDS if suffix in kind.suffixes), None)
    if isinstance(named, Parquet):
        raise DataError("the file is named .parquet but is none.", "Write or download it again.", place=place)
    if named is None or isinstance(named, JsonArray | JsonLines):
        if first == b"[":
            return JsonArray()
        if first_line == b"{":
            raise DataError(
                "the file is one JSON object over several lines.",
                "Write one array of objects, [{...}, {...}], or one object a line.",
                place=place,
            )
        if first == b"{" or named is not None:
            return JsonLines()
    if named is None:
        raise DataError(
            f"what kind of file this is can be told neither by its name nor by its first character {first!r}.",
            f"Name it with one of {', '.join(SUFFIXES)}.",
            place=place,
        )
    return named


def _head(path: Path) -> bytes:
    with open_bytes(path) as file:
        return file.read(_HEAD_BYTES)


def read_records(path: Path, name: str) -> Iterator[Record | DataError]:
    """All records of a file of any kind."""
    try:
        kind = file_kind(path, name)
    except DataError as error:
        yield error
        return
    yield from kind.records(path, name)
