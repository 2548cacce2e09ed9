"""What a kind of file is: it turns bytes into records, one a row, and knows nothing of what their fields mean."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..base import Place
from ..checks import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One row as it stands in the file: named fields."""

    place: Place
    fields: Mapping[str, Any]


class FileKind(ABC):
    """One kind of file. Memory is bounded by the longest row, not by the file."""

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]

    @abstractmethod
    def records(self, path: Path, name: str) -> Iterator[Record | DataError]:
        """The rows in order; `name` is what people call the file.

        What is wrong with a row comes in its place, and where one can go on behind it, more rows follow.
        """

    @abstractmethod
    def count(self, path: Path, name: str) -> int:
        """How many items `records` gives, as cheaply as the kind allows."""
