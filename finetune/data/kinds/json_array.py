"""A JSON file with one array of objects, read piece by piece: memory is bounded by the longest object."""

import codecs
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..base import Place
from ..checks import DataError, RowPlace
from .base import FileKind, Record
from .json_text import DECODER, checked_object, json_error
from .lines import MAX_ROW_BYTES, broken_gzip, foreign_encoding, not_utf8, open_bytes

_READ_BYTES = 256 * 1024
_SPACE = " \t\r\n"
_REMEDY = "Write one array of objects, [{...}, {...}], or one object a line (JSONL)."


class JsonArray(FileKind):
    name = "JSON"
    suffixes = (".json",)

    def records(self, path: Path, name: str) -> Iterator[Record | DataError]:
        with open_bytes(path) as file:
            text = _Text(file, name)
            try:
                yield from _elements(text, name)
            except DataError as error:
                yield error
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                yield broken_gzip(error, Place(name, text.line))

    def count(self, path: Path, name: str) -> int:
        return sum(1 for _ in self.records(path, name))


def _elements(text: "_Text", name: str) -> Iterator[Record | DataError]:
    text.expect("[")
    number = 0
    if text.peek() == "]":
        text.expect("]")
    else:
        while True:
            number += 1
            text.peek()
            place = RowPlace(name, number, text.line)
            value, source = text.value()
            try:
                yield Record(place=place, fields=checked_object(value, source, place))
            except DataError as error:
                yield error
            if text.peek() == "]":
                break
            text.expect(",", "',' or ']'")
        text.expect("]")
    if text.peek():
        raise text.error(f"something follows the array's end: {text.peek()!r}.")


class _Text:
    """A window on the file's text that moves forward and grows only as far as one element needs."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._bytes = 0  # read so far
        self._buffer = ""
        self._position = 0
        self._ended = False
        self._lines_before = 0  # line ends that have left the buffer
        self._columns_before = 0  # characters of the current line that have left the buffer

    @property
    def line(self) -> int:
        return self._lines_before + self._buffer.count("\n", 0, self._position) + 1

    def error(self, what: str, at: int = 0) -> DataError:
        """`at` counts characters from the current position."""
        end = self._position + at
        line = self._lines_before + self._buffer.count("\n", 0, end) + 1
        newline = self._buffer.rfind("\n", 0, end)
        column = end - newline if newline >= 0 else self._columns_before + end + 1
        return DataError(what, _REMEDY, place=Place(self._name, line), column=column)

    def peek(self) -> str:
        """The next character that is no space, or nothing at the end; the position moves to it."""
        while True:
            while self._position < len(self._buffer) and self._buffer[self._position] in _SPACE:
                self._position += 1
            if self._position < len(self._buffer):
                return self._buffer[self._position]
            if not self._grow():
                return ""

    def expect(self, character: str, told: str | None = None) -> None:
        found = self.peek()
        if found != character:
            got = repr(found) if found else "the end"
            raise self.error(f"this is not valid JSON: {told or repr(character)} is expected, not {got}.")
        self._position += 1

    def value(self) -> tuple[object, str]:
        """The element at the position, and its text."""
        self.peek()
        self._drop()
        while True:
            try:
                value, end = DECODER.raw_decode(self._buffer, 0)
            except (ValueError, RecursionError) as error:
                # An element that is cut off and one that is broken look alike: only more text tells. The window
                # doubles each time, so the tries together cost twice the last one.
                longest = len(self._buffer)
                if longest <= MAX_ROW_BYTES and self._grow(longest):
                    continue
                if self._ended or longest <= MAX_ROW_BYTES:
                    at = getattr(error, "pos", 0)
                    told = json_error(error, Place(self._name, self.line), _REMEDY)
                    raise self.error(told.what, at) from error
                raise self.error(f"the element is longer than {MAX_ROW_BYTES // 2**20} MiB, or broken.") from error
            source = self._buffer[:end]
            self._position = end
            return value, source

    def _drop(self) -> None:
        """Forget what lies before the position."""
        passed = self._buffer[: self._position]
        newline = passed.rfind("\n")
        self._lines_before += passed.count("\n")
        self._columns_before = len(passed) - newline - 1 if newline >= 0 else self._columns_before + len(passed)
        self._buffer = self._buffer[self._position :]
        self._position = 0

    def _grow(self, characters: int = 0) -> bool:
        """Read on; False at the end of the file."""
        if self._ended:
            return False
        raw = self._file.read(max(_READ_BYTES, characters))
        self._ended = not raw
        if self._bytes == 0:
            foreign = foreign_encoding(raw, self._name)
            if foreign is not None:
                raise foreign
            raw = raw.removeprefix(codecs.BOM_UTF8)
        pending = self._decoder.getstate()[0]
        try:
            self._buffer += self._decoder.decode(raw, final=self._ended)
        except UnicodeDecodeError as error:
            before = error.object[: error.start].decode()
            self._buffer += before
            place = self.error("", len(self._buffer) - self._position)
            told = not_utf8(error, place.place, self._bytes - len(pending), error.object)
            raise DataError(told.what, told.remedy, place=place.place, column=place.column) from error
        self._bytes += len(raw)
        return not self._ended
