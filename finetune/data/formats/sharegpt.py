"""ShareGPT's format: `{"conversations": [{"from": "human", "value": ...}, ...], "system": ..., "tools": ...}`.

A `function_call` becomes an assistant message with tool_calls, an `observation` a tool message that answers the oldest
open call. Roles need not alternate.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..base import Place, Row
from ..checks import DataError, shown, type_name
from ..conversation import check_conversation
from ..kinds import Record
from ..tools import call_function, parse_json_text, parse_tools
from .base import DEFAULT_COLUMNS, SHAREGPT_TAGS, Columns, Format, Tags, field_of, text_of
from .openai_chat import messages_of

_THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)


@dataclass(frozen=True)
class ShareGPT(Format):
    columns: Columns = DEFAULT_COLUMNS
    tags: Tags = SHAREGPT_TAGS
    name: ClassVar[str] = "sharegpt"

    def row(self, record: Record) -> Row:
        path = self.columns.messages or "conversations"
        turns = messages_of(record, path)
        if not isinstance(turns, list):
            raise DataError(
                f"the conversation is {type_name(turns)}, not a list.",
                'Write [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}].',
                place=record.place,
                path=path,
            )
        messages = []
        calls = 0
        for index, turn in enumerate(turns):
            message = self._message(turn, record.place, f"{path}[{index}]", calls)
            calls += len(message.get("tool_calls", ()))
            messages.append(message)
        system = text_of(record, self.columns.system)
        if not system or (messages and messages[0]["role"] == "system"):
            checked = check_conversation(messages, record.place, path)
        else:
            checked = ({"role": "system", "content": system}, *check_conversation(messages, record.place, path))
        return Row(
            place=record.place,
            messages=checked,
            tools=parse_tools(field_of(record, self.columns.tools), record.place, self.columns.tools or "tools"),
        )

    def _message(self, turn: Any, place: Place, path: str, calls: int) -> dict[str, Any]:
        tags = self.tags
        if not isinstance(turn, Mapping):
            raise DataError(
                f"a turn is {type_name(turn)}, not an object.",
                f"Write {tags.role_tag} and {tags.content_tag}.",
                place=place,
                path=path,
            )
        role, content = turn.get(tags.role_tag), turn.get(tags.content_tag)
        roles = {
            tags.system_tag: "system",
            tags.user_tag: "user",
            tags.function_tag: "call",
            tags.assistant_tag: "assistant",
            tags.observation_tag: "tool",
        }
        kind = roles.get(role) if isinstance(role, str) else None
        if kind is None:
            what = "a turn has no role." if role is None else f"the role {shown(role)} is unknown."
            remedy = f"Roles are {', '.join(roles)}; name others under `tags` in dataset_info.json."
            raise DataError(what, remedy, place=place, path=f"{path}.{tags.role_tag}")
        if not isinstance(content, str):
            what = "a turn has no content." if content is None else f"a turn's content is {type_name(content)}."
            raise DataError(what, "Write text.", place=place, path=f"{path}.{tags.content_tag}")
        if kind == "call":
            return _call_message(content, place, f"{path}.{tags.content_tag}", calls)
        message: dict[str, Any] = {"role": kind, "content": content}
        if turn.get("weight") is not None:
            message["weight"] = turn["weight"]
        return message


def _call_message(text: str, place: Place, path: str, calls: int) -> dict[str, Any]:
    """`{"name": ..., "arguments": {...}}` or a list of those, behind a thought in <think> tags or not."""
    thought = _THOUGHT.match(text)
    value = parse_json_text(text[thought.end() :] if thought else text, place, path, "a function call")
    functions = value if isinstance(value, list) else [value]
    if not functions or not all(isinstance(function, Mapping) for function in functions):
        raise DataError(
            "the function call is neither an object nor a list of objects.",
            'Write {"name": ..., "arguments": {...}}.',
            place=place,
            path=path,
        )
    return {
        "role": "assistant",
        "content": thought[0].strip() if thought else None,
        "tool_calls": [
            {"id": f"call_{calls + index}", "type": "function", "function": call_function(function, place, path)}
            for index, function in enumerate(functions)
        ],
    }
