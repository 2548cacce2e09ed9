"""Reads a file as lines of UTF-8 text, plain or gzipped, one after another. It knows nothing of what is in a line."""

import codecs
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from ..base import Place
from ..checks import DataError

MAX_ROW_BYTES = 64 * 1024 * 1024
_UTF8 = codecs.BOM_UTF8
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
_GZIP = b"\x1f\x8b"
SAVE_AS_UTF8 = "Save the file as UTF-8 (iconv -f ENCODING -t UTF-8)."


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes; those of a gzipped file are unpacked."""
    with path.open("rb") as file:
        packed = file.read(2) == _GZIP
        file.seek(0)
        if packed:
            with gzip.open(file) as unpacked:
                yield cast(BinaryIO, unpacked)
        else:
            yield file


def lines(path: Path, name: str) -> Iterator[tuple[int, str | DataError]]:
    """Number (from 1) and text of every line, its ending included. A byte order mark of UTF-8 is left out."""
    number, before = 0, 0
    try:
        with open_bytes(path) as file:
            while raw := file.readline(MAX_ROW_BYTES + 1):
                number += 1
                start, before = before, before + len(raw)
                if len(raw) > MAX_ROW_BYTES:
                    yield number, _too_long(name, number)
                    return
                if number == 1:
                    foreign = foreign_encoding(raw, name)
                    if foreign is not None:
                        yield number, foreign
                        return
                    if raw.startswith(_UTF8):
                        raw = raw[len(_UTF8) :]
                        start += len(_UTF8)
                try:
                    yield number, raw.decode()
                except UnicodeDecodeError as error:
                    yield number, not_utf8(error, Place(name, number), start, raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        yield number + 1, broken_gzip(error, Place(name, number + 1))


def foreign_encoding(head: bytes, name: str) -> DataError | None:
    """What to say about a file whose first bytes are the mark of another encoding."""
    for mark, encoding in _OTHER_MARKS.items():
        if head.startswith(mark):
            return DataError(f"the file is {encoding}, told by its byte 1.", SAVE_AS_UTF8, place=Place(name, 1))
    return None


def not_utf8(error: UnicodeDecodeError, place: Place, start: int, raw: bytes) -> DataError:
    """`raw` begins at byte `start` of the file, counted from 0."""
    column = len(raw[: error.start].decode()) + 1
    byte = start + error.start + 1
    return DataError(
        f"byte {byte} of the file (0x{raw[error.start]:02x}) is not UTF-8.", SAVE_AS_UTF8, place=place, column=column
    )


def broken_gzip(error: Exception, place: Place) -> DataError:
    return DataError(f"the gzip file is broken ({error}).", "Pack it again, or give it unpacked.", place=place)


def _too_long(name: str, number: int) -> DataError:
    return DataError(
        f"the line is longer than {MAX_ROW_BYTES // 2**20} MiB.",
        "Write one row a line.",
        place=Place(name, number),
    )
