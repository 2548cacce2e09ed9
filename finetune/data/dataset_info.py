"""Reads LLaMA-Factory's `dataset_info.json`: where each data set lies and what its columns mean. It fetches nothing.

Only the definition that is asked for is checked; what it needs and we do not have is refused by name.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from ...storage.errors import InvalidInput
from .formats import OPENAI_TAGS, Alpaca, Columns, Format, OpenAIChat, ShareGPT, Tags

FILE_NAME = "dataset_info.json"
_LOCATIONS = ("hf_hub_url", "ms_hub_url", "cloud_file_name", "file_name")
_KNOWN = (
    *_LOCATIONS, "script_url", "om_hub_url", "subset", "split", "folder", "num_samples", "revision", "formatting",
    "ranking", "columns", "tags",
)  # fmt: skip
_NOTES = frozenset({"file_sha1", "description", "license", "homepage", "citation"})  # for people; nothing follows
_COLUMNS = tuple(field.name for field in fields(Columns))
_MEDIA = ("images", "videos", "audios")
_PREFERENCES = ("chosen", "rejected", "kto_tag")


@dataclass(frozen=True, kw_only=True)
class Definition:
    """`location` is a path relative to the folder of dataset_info.json, a repository, or a URL, as `source` says."""

    source: Literal["file", "hf", "ms", "bucket"]
    location: str
    format: Format | None  # None: to be recognised, as nothing is said
    revision: str | None = None
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    num_samples: int | None = None


def read_definitions(folder: Path) -> Mapping[str, Any]:
    """All definitions of a folder, unchecked; none if it has no dataset_info.json."""
    path = folder / FILE_NAME
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path} cannot be read: {error}. Correct it.", param="dataset_dir") from error
    if not isinstance(value, dict):
        raise InvalidInput(f"{path} is not an object of data sets. Correct it.", param="dataset_dir")
    return value


def parse_definition(name: str, value: Any, *, stage: str, where: Path) -> Definition:
    """Raises InvalidInput (param `dataset`) for what is unknown, of the wrong type, or not to be had."""
    entry = _Entry(name, value, where / FILE_NAME)
    entry.check_keys()
    entry.refuse_other_stages(stage)
    location_key = next((key for key in _LOCATIONS if entry.text(key)), None)
    if location_key is None:
        raise entry.error("says nowhere where the data lie", "Add file_name, hf_hub_url, ms_hub_url or cloud_file_name")
    sources: dict[str, Literal["file", "hf", "ms", "bucket"]] = {
        "file_name": "file", "hf_hub_url": "hf", "ms_hub_url": "ms", "cloud_file_name": "bucket",
    }  # fmt: skip
    return Definition(
        source=sources[location_key],
        location=entry.text(location_key) or "",
        format=entry.format(),
        revision=entry.text("revision"),
        subset=entry.text("subset"),
        split=entry.text("split") or "train",
        folder=entry.text("folder"),
        num_samples=entry.number("num_samples"),
    )


class _Entry:
    """One definition, with errors that say where it stands."""

    def __init__(self, name: str, value: Any, path: Path) -> None:
        self._name = name
        self._path = path
        if not isinstance(value, dict):
            raise self.error("is not an object", 'Write {"file_name": ...}')
        self._value = value

    def error(self, what: str, remedy: str) -> InvalidInput:
        return InvalidInput(f"Data set {self._name!r} in {self._path} {what}. {remedy}.", param="dataset")

    def text(self, key: str) -> str | None:
        value = self._value.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(f"has a {key} that is no text", "Correct it")
        return value or None

    def number(self, key: str) -> int | None:
        value = self._value.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise self.error(f"has {key} {value!r}, which is no number of rows", "Write 1 or more")
        return value

    def check_keys(self) -> None:
        for key in self._value:
            if key not in _KNOWN and key not in _NOTES:
                raise self._unknown(key, _KNOWN)
        for key in ("script_url", "om_hub_url"):
            if self._value.get(key) and not any(self._value.get(other) for other in _LOCATIONS):
                raise self.error(
                    f"has {key} only" + (", a Python script that loads the data" if key == "script_url" else ""),
                    "Save its rows as JSONL and name that by file_name, or name a repository with data files by "
                    "hf_hub_url",
                )

    def refuse_other_stages(self, stage: str) -> None:
        columns = self._mapping("columns")
        if stage != "sft":
            return
        if columns.get("kto_tag"):
            raise self.error(
                "is KTO data (columns.kto_tag), but the stage is sft",
                "Keep its good answers as a set of their own without kto_tag",
            )
        if self._value.get("ranking") or columns.get("chosen") or columns.get("rejected"):
            raise self.error(
                "is preference data (ranking, chosen, rejected), but the stage is sft",
                "Choose a data set with one answer a row",
            )

    def format(self) -> Format | None:
        formatting = self._value.get("formatting", "alpaca")
        columns = self._columns("openai" if formatting == "openai" else "sharegpt")
        tags = self._tags(OPENAI_TAGS if formatting == "openai" else Tags())
        if formatting == "alpaca":
            says_something = any(self._value.get(key) for key in ("formatting", "columns", "tags"))
            return Alpaca(columns) if says_something else None
        if formatting == "sharegpt":
            # With OpenAI's own keys, messages may have all that OpenAI's have.
            chat = (tags.role_tag, tags.content_tag) == ("role", "content")
            return OpenAIChat(columns, tags) if chat else ShareGPT(columns, tags)
        if formatting == "openai":
            return OpenAIChat(columns, tags)
        raise self.error(f"has formatting {formatting!r}", "Known are alpaca, sharegpt and openai")

    def _columns(self, formatting: str) -> Columns:
        """As in LLaMA-Factory, a definition that names columns has no others; only messages keep their name."""
        named = self._mapping("columns")
        messages = "messages" if formatting == "openai" else "conversations"
        for key, value in named.items():
            if key not in (*_COLUMNS, *_MEDIA, *_PREFERENCES):
                raise self._unknown(f"columns.{key}", [f"columns.{name}" for name in _COLUMNS])
            if value is not None and not isinstance(value, str):
                raise self.error(f"has a columns.{key} that is no text", "Name a column")
            if key in _MEDIA and value:
                raise self.error(
                    f"has columns.{key}, and only models that read text can be trained",
                    f"Remove columns.{key} and the rows that need them",
                )
        if not named:
            return Columns(messages=messages)
        columns = Columns(**{name: named.get(name) for name in _COLUMNS})
        return replace(columns, messages=columns.messages or messages)

    def _tags(self, defaults: Tags) -> Tags:
        named = self._mapping("tags")
        known = [field.name for field in fields(Tags)]
        for key, value in named.items():
            if key not in known:
                raise self._unknown(f"tags.{key}", [f"tags.{name}" for name in known])
            if value is not None and not isinstance(value, str):
                raise self.error(f"has a tags.{key} that is no text", "Correct it")
        return replace(defaults, **{key: value for key, value in named.items() if value})

    def _mapping(self, key: str) -> Mapping[str, Any]:
        value = self._value.get(key) or {}
        if not isinstance(value, dict):
            raise self.error(f"has {key} that are no object", "Correct them")
        return value

    def _unknown(self, key: str, known: Any) -> InvalidInput:
        near = difflib.get_close_matches(key, known, n=1)
        return self.error(f"has the unknown key {key}", f"Did you mean {near[0]}?" if near else "Remove it")
