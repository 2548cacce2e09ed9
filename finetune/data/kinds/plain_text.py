"""Plain text: every line that is not blank is a row with one field, `text`."""

from collections.abc import Iterator
from pathlib import Path

from ..base import Place
from ..checks import DataError
from .base import FileKind, Record
from .lines import lines


class PlainText(FileKind):
    name = "text"
    suffixes = (".txt", ".text")

    def records(self, path: Path, name: str) -> Iterator[Record | DataError]:
        for number, text in lines(path, name):
            if isinstance(text, DataError):
                yield text
            elif text.strip():
                yield Record(place=Place(name, number), fields={"text": text.rstrip("\r\n")})

    def count(self, path: Path, name: str) -> int:
        return sum(1 for _, text in lines(path, name) if isinstance(text, DataError) or text.strip())
