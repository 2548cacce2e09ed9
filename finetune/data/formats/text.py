"""Plain text to go on training with: `{"text": ...}`, or a line of a text file."""

from dataclasses import dataclass
from typing import ClassVar

from ..base import Row
from ..checks import DataError
from ..kinds import Record
from .base import Format, text_of


@dataclass(frozen=True)
class Text(Format):
    column: str = "text"
    name: ClassVar[str] = "text"

    def row(self, record: Record) -> Row:
        text = text_of(record, self.column, required=True)
        if not text.strip():
            raise DataError("the text is empty.", "Write it, or remove the row.", place=record.place, path=self.column)
        return Row(place=record.place, text=text)
