"""Chooses the files of one split among a data set repository's file names. It fetches and reads nothing but the card.

A repository says its splits in its card (`configs` in README.md's header), or by names such as
`data/train-00000.parquet` and `test.jsonl`; one without any such word is all training data. This is the
hub's own convention.
"""

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from ...storage.errors import InvalidInput, NotFound
from .kinds import SUFFIXES, is_data_file

_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_PREFERRED = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".text")


def choose_files(
    names: Sequence[str], card: Path | None, source: str, *, subset: str | None, split: str, folder: str | None
) -> list[str]:
    """Raises NotFound if there is nothing of that subset and split, InvalidInput if there are no data files at all."""
    if "[" in split:
        raise InvalidInput(f"split {split!r} of {source} is a slice; use max_samples instead.", param="dataset")
    data = sorted(name for name in names if is_data_file(name) and not _hidden(name))
    if not data:
        raise InvalidInput(_without_data(names, source), param="dataset")
    if folder is not None:
        data = [name for name in data if name.startswith(folder.strip("/") + "/")]
    declared = None if folder is not None else _declared(card, subset)
    if declared is not None:
        found = [name for pattern in declared.get(split, ()) for name in data if fnmatchcase(name, pattern)]
        splits = sorted(declared)
    else:
        if subset is not None:
            data = [name for name in data if name.startswith(f"{subset}/") or f"/{subset}/" in name]
        by_split = _by_words(_one_kind(data))
        found, splits = by_split.get(split, []), sorted(by_split)
    if not found:
        there = f"It has the splits {', '.join(splits)}" if splits else "It has no such folder or subset"
        what = f"{source} has no data files of split {split!r}" + (f" in subset {subset!r}" if subset else "")
        raise NotFound(f"{what}. {there}; name one by `split` and `subset` in dataset_info.json.", param="dataset")
    return list(dict.fromkeys(found))


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "__")) for part in name.split("/"))


def _without_data(names: Sequence[str], source: str) -> str:
    if any(name.endswith(".py") for name in names):
        return (
            f"{source} has a loading script instead of data files, and scripts are not run. The hub often keeps a copy "
            f"as Parquet: try {source.partition('@')[0]}@refs/convert/parquet."
        )
    return f"{source} has no data files ({', '.join(SUFFIXES)}). Name another repository, or a local file."


def _declared(card: Path | None, subset: str | None) -> dict[str, list[str]] | None:
    """Patterns by split of the wanted configuration of the card, None if the card declares none."""
    configs = [config for config in _configs(card) if isinstance(config, dict) and config.get("data_files")]
    if not configs:
        return None
    if subset is not None:
        configs = [config for config in configs if config.get("config_name") == subset]
    else:
        named = [config for config in configs if config.get("default") or config.get("config_name") == "default"]
        configs = named or (configs if len(configs) == 1 else [])
    patterns: dict[str, list[str]] = {}
    for split, pattern in _patterns(configs[0]["data_files"]) if configs else ():
        patterns.setdefault(split, []).append(pattern)
    return patterns


def _configs(card: Path | None) -> list[Any]:
    text = card.read_text(encoding="utf-8", errors="replace") if card is not None else ""
    header = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    if header is None:
        return []
    try:
        value = yaml.safe_load(header[1])
    except yaml.YAMLError:
        return []  # a card is prose first; its header may be anything
    configs = value.get("configs") if isinstance(value, dict) else None
    return configs if isinstance(configs, list) else []


def _patterns(data_files: Any) -> Iterator[tuple[str, str]]:
    if isinstance(data_files, str):
        yield "train", data_files
    elif isinstance(data_files, dict):
        yield str(data_files.get("split", "train")), str(data_files.get("path"))
    else:
        for entry in data_files:
            if isinstance(entry, str):
                yield "train", entry
            elif isinstance(entry, dict):
                paths = entry.get("path")
                for path in paths if isinstance(paths, list) else [paths]:
                    yield str(entry.get("split", "train")), str(path)


def _one_kind(names: list[str]) -> list[str]:
    """A repository may hold the same rows in several kinds of files; the first of our order is read."""
    for suffix in _PREFERRED:
        chosen = [name for name in names if name.lower().removesuffix(".gz").endswith(suffix)]
        if chosen:
            return chosen
    return names


def _by_words(names: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        parts = re.split(r"[^a-z]+", name.lower())
        for split, words in _WORDS.items():
            if any(word in parts for word in words):
                found.setdefault(split, []).append(name)
                break
        else:
            found.setdefault("", []).append(name)
    rest = found.pop("", [])
    return found or {"train": rest}
