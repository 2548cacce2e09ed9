"""JSON Lines: one object a line. Blank lines are skipped."""

from collections.abc import Iterator
from pathlib import Path

from ..base import Place
from ..checks import DataError
from .base import FileKind, Record
from .json_text import parse_object
from .lines import lines

_REMEDY = "Write one whole JSON object a line."


class JsonLines(FileKind):
    name = "JSONL"
    suffixes = (".jsonl", ".ndjson")

    def records(self, path: Path, name: str) -> Iterator[Record | DataError]:
        for number, text in lines(path, name):
            if isinstance(text, DataError):
                yield text
            elif text.strip():
                place = Place(name, number)
                try:
                    fields = parse_object(text.rstrip("\r\n"), place, _REMEDY)
                except DataError as error:
                    yield error
                else:
                    yield Record(place=place, fields=fields)

    def count(self, path: Path, name: str) -> int:
        return sum(1 for _, text in lines(path, name) if isinstance(text, DataError) or text.strip())
