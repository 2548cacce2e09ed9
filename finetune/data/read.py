"""Reads the rows of a run: files are read, checked, mixed, and cut into training and validation. It knows no tokenizer.

Everything is lazy. Rows are counted beforehand only where their number decides something (a share for validation,
interleaving, num_samples), and then without being kept.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path

from ...storage.errors import InvalidInput
from ..run_folder import DataFile, RunSpec
from .base import Place, Row
from .checks import DataError
from .formats import Format, recognise, refuse_media
from .kinds import Record, file_kind, read_records
from .mix import interleave, sampled_rows, validation_rows
from .sources import DataSet, Split, data_sets

MAX_PROBLEMS = 20
_DECIDING = ("mix_strategy", "interleave_probs", "max_samples", "val_size", "seed", "stage")
_HASH_BYTES = 1024 * 1024


def read_rows(spec: RunSpec, split: Split, *, limit: int | None = None) -> Iterator[Row]:
    """The rows of a split in order. Validation has none if neither eval data nor val_size is given.

    Raises DataError at the first row that is not fit to be trained on, and what `data_sets` raises.
    """
    rows = _split_rows(spec, split)
    number = 0
    for row in rows if limit is None else islice(rows, limit):
        if isinstance(row, DataError):
            raise _addressed(row, spec, split)
        number += 1
        yield row
    if not number and limit != 0 and has_rows(spec, split):
        raise InvalidInput(
            f"There are no rows for {'training' if split == 'train' else 'validation'}: the data sets hold too few. "
            "Add rows, or lower val_size.",
            param=_param(spec, split),
        )


def check_rows(spec: RunSpec, split: Split) -> list[DataError]:
    """The first 20 problems of all rows that could be used; every row is checked once, in the order of the files."""
    own = data_sets(spec, split)
    problems = (row for data_set in own for row in _usable_rows(data_set, spec) if isinstance(row, DataError))
    return [_addressed(problem, spec, split) for problem in islice(problems, MAX_PROBLEMS)]


def has_rows(spec: RunSpec, split: Split) -> bool:
    """Whether the split is wanted at all."""
    recipe = spec.recipe
    if split == "train":
        return True
    return bool(recipe.val_size or _has_own_validation(spec))


def _has_own_validation(spec: RunSpec) -> bool:
    return bool(spec.eval_files or (spec.recipe.eval_dataset and not spec.train_files))


def content_digest(spec: RunSpec, split: Split) -> str:
    """Of all that decides `read_rows`: the bytes of the files, how they are read, and the recipe's keys."""
    recipe = spec.recipe.model_dump(mode="json")
    digest = hashlib.sha256(json.dumps([split, {key: recipe[key] for key in _DECIDING}]).encode())
    own = data_sets(spec, split)
    for data_set in own or (data_sets(spec, "train") if has_rows(spec, split) else []):
        digest.update(repr((data_set.format, data_set.num_samples)).encode())
        for file in data_set.files:
            digest.update(f"\0{_kind_name(file)} {Path(file.path).stat().st_size}\0".encode())
            with Path(file.path).open("rb") as opened:
                while block := opened.read(_HASH_BYTES):
                    digest.update(block)
    return digest.hexdigest()


def _kind_name(file: DataFile) -> str:
    """What decides how the bytes are read; the rest of the name does not."""
    try:
        return file_kind(Path(file.path), file.name).name + (" tabs" if ".tsv" in file.name.lower() else "")
    except DataError as error:
        return error.what


Rows = Iterator[Row | DataError]


def _split_rows(spec: RunSpec, split: Split) -> Rows:
    recipe = spec.recipe
    own = data_sets(spec, split)
    if not recipe.val_size:
        yield from _mixed(own, spec)
        return
    if own if split == "eval" else _has_own_validation(spec):
        raise InvalidInput(
            "val_size cuts validation rows off the training data, but validation data are given too; keep one of them.",
            param="val_size",
        )
    train = own if split == "train" else data_sets(spec, "train")
    count = sum(1 for _ in _order(train, _counts(train, spec), spec))
    kept = validation_rows(count, recipe.val_size, recipe.seed)
    if len(kept) >= count:
        raise InvalidInput(
            f"val_size {recipe.val_size:g} takes all {count} rows for validation; lower it.", param="val_size"
        )
    for number, row in enumerate(_mixed(train, spec)):
        if (number in kept) == (split == "eval"):
            yield row


def _mixed(sets: list[DataSet], spec: RunSpec) -> Rows:
    if spec.recipe.mix_strategy == "concat" or len(sets) < 2:
        yield from chain.from_iterable(_rows(data_set, spec) for data_set in sets)
        return
    readers = [_again(lambda data_set=data_set: _rows(data_set, spec)) for data_set in sets]  # type: ignore[misc]
    for index in _order(sets, _counts(sets, spec), spec):
        yield next(readers[index])


def _again(start: Callable[[], Rows]) -> Rows:
    while True:
        yield from start()


def _order(sets: list[DataSet], counts: list[int], spec: RunSpec) -> Iterator[int]:
    """The index of the data set of each row of the mixture."""
    recipe = spec.recipe
    if recipe.mix_strategy == "concat" or len(sets) < 2:
        return (index for index, count in enumerate(counts) for _ in range(count))
    shares = recipe.interleave_probs
    if shares and len(shares) != len(sets):
        raise InvalidInput(
            f"interleave_probs has {len(shares)} shares for {len(sets)} data sets; give one for each.",
            param="interleave_probs",
        )
    # A recipe refuses shares that do not add up to 1; what is left is rounding.
    return interleave(counts, recipe.mix_strategy, [share / sum(shares) for share in shares], recipe.seed)


def _counts(sets: list[DataSet], spec: RunSpec) -> list[int]:
    """How many items `_rows` gives for each data set."""
    limit = spec.recipe.max_samples
    counts = [data_set.num_samples or _count(data_set) for data_set in sets]
    return [count if limit is None else min(limit, count) for count in counts]


def _count(data_set: DataSet) -> int:
    total = 0
    for file in data_set.files:
        try:
            kind = file_kind(Path(file.path), file.name)
        except DataError:
            total += 1
        else:
            total += max(kind.count(Path(file.path), file.name), 1)  # a file without rows gives one error
    return total


def _usable_rows(data_set: DataSet, spec: RunSpec) -> Rows:
    """Every row that `_rows` may give, once."""
    limit = None if data_set.num_samples is not None else spec.recipe.max_samples
    return islice(_all_rows(data_set), limit)


def _rows(data_set: DataSet, spec: RunSpec) -> Rows:
    """A data set's rows: num_samples of it if so defined, and at most max_samples of those."""
    rows = _all_rows(data_set)
    if data_set.num_samples is not None:
        rows = _sampled(data_set, data_set.num_samples, spec.recipe.seed)
    return rows if spec.recipe.max_samples is None else islice(rows, spec.recipe.max_samples)


def _sampled(data_set: DataSet, wanted: int, seed: int) -> Rows:
    whole, once_more = sampled_rows(_count(data_set), wanted, seed)
    for _ in range(whole):
        yield from _all_rows(data_set)
    if once_more:
        yield from (row for number, row in enumerate(_all_rows(data_set)) if number in once_more)


def _all_rows(data_set: DataSet) -> Rows:
    for file in data_set.files:
        yield from _file_rows(file, data_set.format)


def _file_rows(file: DataFile, declared: Format | None) -> Rows:
    known = declared
    empty = True
    for record in read_records(Path(file.path), file.name):
        empty = False
        if isinstance(record, DataError):
            yield record
            continue
        try:
            if declared is None:
                refuse_media(record)
                known = _same(recognise(record), known, record)
            yield (known or recognise(record)).row(record)
        except DataError as error:
            yield error
    if empty:
        yield DataError("the file has no rows.", "Add rows, or leave the file out.", place=Place(file.name, 1))


def _same(found: Format, before: Format | None, record: Record) -> Format:
    """One file has one format: a row of another one is most likely a mistake."""
    if before is not None and found != before:
        raise DataError(
            f"the row is in {found.name} format with other columns, but the file began in {before.name} format.",
            "Write one file for each format.",
            place=record.place,
        )
    return found


def _addressed(error: DataError, spec: RunSpec, split: Split) -> DataError:
    """Name the field of the request or recipe that the file came by."""
    error.param = _param(spec, split)
    return error


def _param(spec: RunSpec, split: Split) -> str:
    if split == "eval" and not spec.recipe.val_size:
        return "validation_file" if spec.eval_files else "eval_dataset"
    return "training_file" if spec.train_files else "dataset"
