"""What a format is: it turns the fields of a record into a row in OpenAI's form. It knows no file and no model.

Formats are values: two are equal if they read the same columns in the same way.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..base import Row
from ..checks import DataError, shown, type_name
from ..kinds import Record

MEDIA_COLUMNS = ("images", "image", "videos", "video", "audios", "audio")


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Which field holds what, under LLaMA-Factory's names; None: no field does."""

    prompt: str | None = "instruction"
    query: str | None = "input"
    response: str | None = "output"
    history: str | None = "history"
    messages: str | None = "conversations"
    system: str | None = "system"
    tools: str | None = "tools"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tags:
    """How messages are written: the keys of role and content, and the names of the roles."""

    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str = "human"
    assistant_tag: str = "gpt"
    observation_tag: str = "observation"
    function_tag: str = "function_call"
    system_tag: str = "system"


DEFAULT_COLUMNS = Columns()
SHAREGPT_TAGS = Tags()


class Format(ABC):
    """One format of rows."""

    name: ClassVar[str]

    @abstractmethod
    def row(self, record: Record) -> Row:
        """Raises DataError, naming place and field, if the record is not fit to be trained on."""


def field_of(record: Record, column: str | None) -> Any:
    """The value of an optional column, None if there is none."""
    return None if column is None else record.fields.get(column)


def text_of(record: Record, column: str | None, *, required: bool = False) -> str:
    """The text of a column; an absent or null one is empty unless it is required."""
    value = field_of(record, column)
    if value is None and required:
        raise DataError(
            f"the column {shown(column)} is missing; there are {names(record.fields)}.",
            "Add it, or name the right one under `columns` in dataset_info.json.",
            place=record.place,
        )
    if value is not None and not isinstance(value, str):
        raise DataError(f"{column} is {type_name(value)}.", "Write text.", place=record.place, path=column)
    return value or ""


def names(fields: Mapping[str, Any]) -> str:
    return ", ".join(map(str, list(fields)[:12])) or "none"


def refuse_media(record: Record) -> None:
    """Rows with pictures and sounds are for models that see and hear."""
    for column in MEDIA_COLUMNS:
        if record.fields.get(column):
            raise DataError(
                f"the row has {column}, and this model reads text only.",
                f"Remove the column {column}, or the rows that need it.",
                place=record.place,
                path=column,
            )
