"""Turns what a run names (a job's files, or names of data sets) into data files on this machine. It reads no rows.

alpaca_en              a name of dataset_info.json in the recipe's dataset_dir
/data/chat.jsonl       a file, or a folder of data files; relative to the working or the data folder
hf:org/name[@rev]      a data set repository of the Hugging Face hub; ms: of ModelScope
s3://bucket/chat.jsonl a file or folder of a bucket
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...storage.errors import InvalidInput, NotFound
from ..run_folder import DataFile, RunSpec
from .dataset_info import FILE_NAME, Definition, parse_definition, read_definitions
from .formats import Format
from .kinds import SUFFIXES, is_data_file
from .remote import BUCKETS, fetch_bucket, fetch_hub, fetch_modelscope

Split = Literal["train", "eval"]
_ONLINE = "ONLINE"  # LLaMA-Factory's word for "every name is a repository"
_REMOTE = "REMOTE:"


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Data files that belong together; without a `format` it is recognised in each file."""

    name: str
    files: tuple[DataFile, ...]
    format: Format | None = None
    num_samples: int | None = None


def data_sets(spec: RunSpec, split: Split) -> list[DataSet]:
    """The data sets of a split in order, fetched; none for validation rows that come from val_size, or not at all.

    Raises InvalidInput, NotFound, PermissionDenied or Unavailable for what cannot be had.
    """
    recipe = spec.recipe
    files = spec.train_files if split == "train" else spec.eval_files
    if files:
        return [DataSet(name=file.name, files=(file,)) for file in files]
    if spec.train_files:
        return []
    key = "dataset" if split == "train" else "eval_dataset"
    if split == "train" and not recipe.dataset:
        raise InvalidInput("No data set is named; set `dataset` to a name, a file or hf:org/name.", param=key)
    return [_by_name(name, spec, key) for name in (recipe.dataset if split == "train" else recipe.eval_dataset)]


def _by_name(name: str, spec: RunSpec, key: str) -> DataSet:
    prefix, _, rest = name.partition(":")
    cache = _cache(spec)
    if prefix in ("hf", "ms"):
        repository, _, revision = rest.partition("@")
        fetch = fetch_hub if prefix == "hf" else fetch_modelscope
        return DataSet(name=name, files=fetch(repository, revision or None))
    if "://" in name:
        if prefix not in BUCKETS:
            raise InvalidInput(
                f"{key} {name!r} has a protocol that data are not read from; use one of "
                f"{', '.join(f'{protocol}://' for protocol in BUCKETS)}, or download the file.",
                param=key,
            )
        return DataSet(name=name, files=fetch_bucket(name, cache))
    if spec.recipe.dataset_dir == _ONLINE:
        return DataSet(name=name, files=fetch_hub(name, None))
    if spec.recipe.dataset_dir.startswith(_REMOTE):
        raise InvalidInput(
            f"dataset_dir {spec.recipe.dataset_dir!r} is a repository of definitions, which are not fetched; name the "
            "data by hf:org/name, or download dataset_info.json into a folder.",
            param="dataset_dir",
        )
    folder = Path(spec.recipe.dataset_dir).expanduser()
    definitions = read_definitions(folder)
    if name in definitions:
        definition = parse_definition(name, definitions[name], stage=spec.recipe.stage, where=folder)
        return DataSet(
            name=name,
            files=_fetch(definition, folder, cache, key),
            format=definition.format,
            num_samples=definition.num_samples,
        )
    for path in (Path(name).expanduser(), folder / name):
        if path.exists():
            return DataSet(name=name, files=local_files(path, "train", key))
    raise _unknown(name, definitions, folder, key)


def _fetch(definition: Definition, folder: Path, cache: Path, key: str) -> tuple[DataFile, ...]:
    options = {"subset": definition.subset, "split": definition.split, "folder": definition.folder}
    if definition.source == "hf":
        return fetch_hub(definition.location, definition.revision, **options)
    if definition.source == "ms":
        return fetch_modelscope(definition.location, definition.revision, **options)
    if definition.source == "bucket":
        return fetch_bucket(definition.location, cache)
    path = folder / definition.location
    if not path.exists():
        raise NotFound(f"{key}: there is no {path}, which {folder / FILE_NAME} names. Put it there.", param=key)
    return local_files(path, definition.split, key)


def local_files(path: Path, split: str, key: str) -> tuple[DataFile, ...]:
    """A file, or all data files at the top of a folder, by name."""
    if split != "train":
        raise InvalidInput(
            f"{key}: {path} is local and so has no split {split!r}; name the file of that split, or remove `split`.",
            param=key,
        )
    if not path.is_dir():
        return (DataFile(path=str(path.resolve()), name=path.name),)
    found = sorted(entry for entry in path.iterdir() if _holds_rows(entry))
    if not found:
        raise NotFound(f"{key}: the folder {path} has no data files ({', '.join(SUFFIXES)}).", param=key)
    return tuple(DataFile(path=str(entry.resolve()), name=f"{path.name}/{entry.name}") for entry in found)


def _holds_rows(entry: Path) -> bool:
    name = entry.name
    return entry.is_file() and is_data_file(name) and name != FILE_NAME and not name.startswith(".")


def _cache(spec: RunSpec) -> Path:
    return (spec.home or Path.home() / ".cache" / "tuneloop") / "data"


def _unknown(name: str, definitions: object, folder: Path, key: str) -> NotFound:
    known = list(definitions) if isinstance(definitions, dict) else []
    near = difflib.get_close_matches(name, known, n=1)
    advice = f"Did you mean {near[0]!r}?" if near else "Give a name of it, a file, a folder, hf:org/name or a URL."
    has = f"is neither in {folder / FILE_NAME}" if known else f"is unknown: there is no {folder / FILE_NAME}"
    return NotFound(f"{key} {name!r} {has} nor a file or folder. {advice}", param=key)
