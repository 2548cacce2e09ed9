"""The error that names a bad row by file, line and column, and how places in files are told. It knows no format."""

from dataclasses import dataclass

from ...storage.errors import InvalidInput
from .base import Place


@dataclass(frozen=True, slots=True)
class RowPlace(Place):
    """A place in a file where rows are counted, not lines: `line` is the row's number, `start` the line it begins in,
    if there are lines at all."""

    start: int | None = None

    def __str__(self) -> str:
        begins = f" (line {self.start})" if self.start is not None else ""
        return f"{self.file}, row {self.line}{begins}"


class DataError(InvalidInput):
    """A row, or a whole file, that nobody should train on.

    `place` is where, `column` the character within the line (counted from 1; None where a row has no text of its own),
    `path` the field within the row, as `messages[2].content`. `what` and `remedy` are whole sentences.
    """

    code = "invalid_data"

    def __init__(
        self, what: str, remedy: str, *, place: Place, column: int | None = None, path: str | None = None
    ) -> None:
        at = str(place) + (f", column {column}" if column is not None else "") + (f", {path}" if path else "")
        super().__init__(f"{at}: {what} {remedy}")
        self.place = place
        self.column = column
        self.path = path
        self.what = what
        self.remedy = remedy


def type_name(value: object) -> str:
    """What JSON calls the type of a value."""
    names: dict[type, str] = {
        type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list",
        dict: "an object", bytes: "bytes",
    }  # fmt: skip
    return names.get(type(value), type(value).__name__)


def shown(value: object, limit: int = 40) -> str:
    """A value for a message: quoted, on one line, and short."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
