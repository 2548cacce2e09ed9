"""Parquet, by pyarrow, which is imported only when such a file is read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ....storage.errors import InvalidInput
from ..checks import DataError, RowPlace
from .base import FileKind, Record

_BATCH_ROWS = 256


class Parquet(FileKind):
    name = "Parquet"
    suffixes = (".parquet",)

    def records(self, path: Path, name: str) -> Iterator[Record | DataError]:
        number = 0
        try:
            with _opened(path, name) as file:
                for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                    for fields in batch.to_pylist():
                        number += 1
                        yield Record(place=RowPlace(name, number), fields=fields)
        except (OSError, ValueError) as error:
            yield _broken(error, name, number + 1)
        except DataError as error:
            yield error

    def count(self, path: Path, name: str) -> int:
        try:
            with _opened(path, name) as file:
                rows: int = file.metadata.num_rows
        except (OSError, ValueError, DataError):
            return 1
        return rows


@contextmanager
def _opened(path: Path, name: str) -> Iterator[Any]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InvalidInput(
            f"{name} is a Parquet file, which needs pyarrow: pip install 'tuneloop[finetune]'. Or give JSONL."
        ) from error
    with parquet.ParquetFile(path) as file:
        yield file


def _broken(error: Exception, name: str, number: int) -> DataError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(
        f"the Parquet file is broken ({reason.rstrip('.')}).",
        "Write or download it again.",
        place=RowPlace(name, number),
    )
