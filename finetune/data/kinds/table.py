"""CSV and TSV: the first line names the columns. Cells are text; what they mean is the format's business."""

import csv
from collections.abc import Iterator
from pathlib import Path

from ..base import Place
from ..checks import DataError
from .base import FileKind, Record
from .lines import MAX_ROW_BYTES, lines

_QUOTES = 'Quote cells that hold commas, quotes or line ends: "a, ""b""".'


class Table(FileKind):
    name = "CSV"
    suffixes = (".csv", ".tsv")

    def records(self, path: Path, name: str) -> Iterator[Record | DataError]:
        reader = _reader(path, name)
        try:
            header = next(reader, None)
            if header is None:
                return
            columns = _columns(header[1], Place(name, header[0]))
            for line, cells in reader:
                place = Place(name, line)
                if len(cells) == len(columns):
                    yield Record(place=place, fields=dict(zip(columns, cells, strict=True)))
                else:
                    yield DataError(
                        f"the row has {len(cells)} cells, but the header has {len(columns)} columns"
                        f"{_first_missing(columns, cells)}.",
                        _QUOTES,
                        place=place,
                    )
        except DataError as error:
            yield error

    def count(self, path: Path, name: str) -> int:
        return sum(1 for _ in self.records(path, name))


def _reader(path: Path, name: str) -> Iterator[tuple[int, list[str]]]:
    """The line in which a row begins, and its cells; blank lines are skipped."""
    csv.field_size_limit(MAX_ROW_BYTES)
    delimiter = "\t" if ".tsv" in name.lower() else ","
    reader = csv.reader(_texts(path, name), delimiter=delimiter, strict=True)
    start = 1
    try:
        for cells in reader:
            if cells:
                yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"this is not valid CSV: {error}.", _QUOTES, place=Place(name, start)) from error


def _texts(path: Path, name: str) -> Iterator[str]:
    for _, text in lines(path, name):
        if isinstance(text, DataError):
            raise text
        yield text


def _columns(header: list[str], place: Place) -> list[str]:
    columns = [cell.strip() for cell in header]
    for index, column in enumerate(columns):
        if not column or column in columns[:index]:
            raise DataError(
                f"column {index + 1} of the header " + (f"is {column!r} again." if column else "has no name."),
                "Give every column a name of its own.",
                place=place,
            )
    return columns


def _first_missing(columns: list[str], cells: list[str]) -> str:
    return f" ({columns[len(cells)]} is the first that is missing)" if len(cells) < len(columns) else ""
