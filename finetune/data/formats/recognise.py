"""Tells a record's format by its columns, where nobody says it."""

from collections.abc import Mapping
from typing import Any

from ..checks import DataError
from ..kinds import Record
from .alpaca import Alpaca
from .base import Columns, Format, names
from .openai_chat import OpenAIChat
from .sharegpt import ShareGPT
from .text import Text

_FORMS = (
    "Known are OpenAI's chat (messages), alpaca (instruction, input, output), sharegpt (conversations), prompt and "
    "completion, and text; describe other columns in a dataset_info.json."
)
_PAIRS = ({"chosen", "rejected"}, {"preferred_output", "non_preferred_output"})
_TAGS = ("kto_tag", "label")


def recognise(record: Record) -> Format:
    """Raises DataError for columns of no known format, and for preference data, which supervised tuning cannot use."""
    fields = {key for key, value in record.fields.items() if value is not None}
    for pair in _PAIRS:
        if pair <= fields:
            raise DataError(
                f"this is preference data ({' and '.join(sorted(pair))}), but the stage is sft.",
                "Supervised tuning needs one answer a row; keep the chosen one as an assistant message.",
                place=record.place,
            )
    found = _by_columns(fields, record.fields)
    if found is None:
        raise DataError(f"the columns {names(record.fields)} are those of no format.", _FORMS, place=record.place)
    for tag in _TAGS:
        if isinstance(record.fields.get(tag), bool) and not isinstance(found, Text):
            raise DataError(
                f"this is KTO data (a judgement in {tag}), but the stage is sft.",
                f"Keep the rows whose answer is good, and remove the column {tag}.",
                place=record.place,
            )
    return found


def _by_columns(present: set[str], fields: Mapping[str, Any]) -> Format | None:
    for column in ("messages", "conversations"):
        if column in fields:
            return _conversation(column, fields[column])
    if "output" in fields and present & {"instruction", "input"}:
        return Alpaca()
    if "instruction" in fields:
        response = "response" if "response" in fields else "output"
        return Alpaca(Columns(response=response))
    if {"prompt", "completion"} <= fields.keys():
        return Alpaca(Columns(prompt="prompt", query=None, response="completion"))
    return Text() if "text" in fields else None


def _conversation(column: str, value: Any) -> Format:
    """OpenAI's form and sharegpt's differ in the keys of a message, whatever the column is called."""
    if isinstance(value, str):
        sharegpt = '"from"' in value and '"role"' not in value
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        sharegpt = "from" in value[0] or ("value" in value[0] and "role" not in value[0])
        if not sharegpt and "role" not in value[0] and "content" not in value[0]:
            sharegpt = column == "conversations"
    else:
        sharegpt = column == "conversations"
    return ShareGPT(Columns(messages=column)) if sharegpt else OpenAIChat(Columns(messages=column))
