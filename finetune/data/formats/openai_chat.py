"""OpenAI's chat format: `{"messages": [{"role", "content", ...}], "tools": [...]}`.

A definition may give columns, keys and roles other names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..base import Row
from ..checks import DataError
from ..conversation import check_conversation
from ..kinds import Record
from ..tools import parse_json_text, parse_tools
from .base import Columns, Format, Tags, field_of, names, text_of

OPENAI_COLUMNS = Columns(messages="messages")
OPENAI_TAGS = Tags(
    role_tag="role",
    content_tag="content",
    user_tag="user",
    assistant_tag="assistant",
    observation_tag="tool",
    function_tag="assistant",
    system_tag="system",
)


@dataclass(frozen=True)
class OpenAIChat(Format):
    columns: Columns = OPENAI_COLUMNS
    tags: Tags = OPENAI_TAGS
    name: ClassVar[str] = "openai"

    def row(self, record: Record) -> Row:
        path = self.columns.messages or "messages"
        messages = messages_of(record, path)
        if record.fields.get("functions"):
            raise DataError("functions are the old form.", "Write them as tools.", place=record.place, path="functions")
        if self.tags != OPENAI_TAGS and isinstance(messages, list):
            messages = [self._renamed(message) for message in messages]
        system = text_of(record, self.columns.system)
        if system and isinstance(messages, list) and not _has_system(messages):
            messages = [{"role": "system", "content": system}, *messages]
        return Row(
            place=record.place,
            messages=check_conversation(messages, record.place, path),
            tools=parse_tools(field_of(record, self.columns.tools), record.place, self.columns.tools or "tools"),
        )

    def _renamed(self, message: Any) -> Any:
        if not isinstance(message, Mapping):
            return message
        tags = self.tags
        roles = {
            tags.system_tag: "system",
            tags.user_tag: "user",
            tags.function_tag: "assistant",
            tags.assistant_tag: "assistant",
            tags.observation_tag: "tool",
        }
        renamed = {key: value for key, value in message.items() if key not in (tags.role_tag, tags.content_tag)}
        role = message.get(tags.role_tag)
        return {
            "role": roles.get(role, role) if isinstance(role, str) else role,
            "content": message.get(tags.content_tag),
            **renamed,
        }


def messages_of(record: Record, column: str) -> Any:
    """The value of the messages' column; JSON text, as tables hold it, is parsed."""
    if column not in record.fields:
        raise DataError(
            f"the column {column!r} is missing; there are {names(record.fields)}.",
            "Add the conversation, or name its column under `columns` in dataset_info.json.",
            place=record.place,
        )
    value = record.fields[column]
    if isinstance(value, str):
        return parse_json_text(value, record.place, column, "a list of messages")
    return value


def _has_system(messages: list[Any]) -> bool:
    first = messages[0] if messages else None
    return isinstance(first, Mapping) and first.get("role") in ("system", "developer")
