"""Checks a conversation in OpenAI's form and completes what it leaves out (ids of calls). It knows no file format.

Roles may follow in any order, and several assistant or tool messages in a row are fine; but the last message is the
assistant's, so that every turn of the user is answered, and at least one assistant message is to be learned.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from .base import Place
from .checks import DataError, shown, type_name
from .tools import parse_calls, without_nulls

ROLES = ("system", "developer", "user", "assistant", "tool")
_KEYS = frozenset(
    {"role", "content", "name", "weight", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking"}
)
_REFUSED_KEYS = {
    "function_call": "Write the call as tool_calls, and its result as a message with role tool.",
    "refusal": "Put the refusal's text into content.",
    "audio": "Only text is trained; remove it.",
    "images": "Only text is trained; remove them.",
}


def check_conversation(value: Any, place: Place, path: str = "messages") -> tuple[dict[str, Any], ...]:
    """The messages in OpenAI's form. Raises DataError at the first thing that is wrong."""
    if not isinstance(value, list):
        raise DataError(
            f"messages are {type_name(value)}, not a list.",
            'Write [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}].',
            place=place,
            path=path,
        )
    if not value:
        raise DataError("the conversation is empty.", "Add messages, or remove the row.", place=place, path=path)
    messages: list[dict[str, Any]] = []
    calls = _Calls()
    for index, message in enumerate(value):
        messages.append(_message(message, place, f"{path}[{index}]", calls))
    _check_learnable(messages, place, path)
    return tuple(messages)


class _Calls:
    """Which calls were made so far, and which of them have no result yet."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.open: list[str] = []


def _message(value: Any, place: Place, path: str, calls: _Calls) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(
            f"a message is {type_name(value)}, not an object.", "Write role and content.", place=place, path=path
        )
    message = without_nulls(value)
    role = message.get("role")
    if role not in ROLES:
        raise _bad_role(role, place, path)
    _check_keys(message, place, path)
    _check_weight(message, place, path)
    if "tool_calls" in message and (role == "assistant" or message["tool_calls"]):
        if role != "assistant":
            raise DataError(
                f"a {role} message has tool_calls.", "Only the assistant calls tools.", place=place, path=path
            )
        if message["tool_calls"] == []:
            del message["tool_calls"]
        else:
            message["tool_calls"] = parse_calls(
                message["tool_calls"], place, f"{path}.tool_calls", new_id=len(calls.made)
            )
            calls.open = [call["id"] for call in message["tool_calls"]]
            calls.made += calls.open
    else:
        message.pop("tool_calls", None)
    if role == "tool":
        message["tool_call_id"] = _answered_call(message.get("tool_call_id"), place, path, calls)
    elif "tool_call_id" in message:
        raise DataError(
            f"a {role} message has a tool_call_id.", "Only tool messages answer calls.", place=place, path=path
        )
    _check_content(message, place, path)
    return message


def _bad_role(role: object, place: Place, path: str) -> DataError:
    known = f"Roles are {', '.join(ROLES)}."
    if role is None:
        return DataError("a message has no role.", known, place=place, path=f"{path}.role")
    if role == "function":
        return DataError(
            "the role function is the old form.", "Write role tool with a tool_call_id.", place=place, path=path
        )
    return DataError(f"the role {shown(role)} is unknown.", known, place=place, path=f"{path}.role")


def _check_keys(message: Mapping[str, Any], place: Place, path: str) -> None:
    for key, value in message.items():
        if key in _REFUSED_KEYS and value:
            raise DataError(f"{key} is not trained.", _REFUSED_KEYS[key], place=place, path=f"{path}.{key}")
        if key not in _KEYS and key not in _REFUSED_KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, n=1)
            raise DataError(
                f"a message has the unknown field {shown(key)}.",
                f"Did you mean {near[0]}?" if near else f"Known are {', '.join(sorted(_KEYS))}; remove it.",
                place=place,
                path=f"{path}.{key}",
            )
    for key in ("name", "reasoning_content", "reasoning", "thinking"):
        if key in message and not isinstance(message[key], str):
            raise DataError(f"{key} is {type_name(message[key])}.", "Write text.", place=place, path=f"{path}.{key}")


def _check_weight(message: dict[str, Any], place: Place, path: str) -> None:
    weight = message.get("weight")
    if weight is None:
        return
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight not in (0, 1):
        raise DataError(
            f"the weight {shown(weight)} is neither 0 nor 1.",
            "Write 1 for a message to learn and 0 for one to leave out.",
            place=place,
            path=f"{path}.weight",
        )
    if message["role"] != "assistant":
        raise DataError(
            f"a {message['role']} message has a weight.",
            "Only assistant messages are learned; remove it.",
            place=place,
            path=f"{path}.weight",
        )
    message["weight"] = int(weight)


def _answered_call(identity: Any, place: Place, path: str, calls: _Calls) -> str:
    """Which call a tool message answers; without an id it is the oldest one that has no answer yet."""
    remedy = "A tool message follows an assistant message with tool_calls and has the id of one of them."
    if identity is None:
        if not calls.open:
            raise DataError("a tool message answers no call.", remedy, place=place, path=path)
        return calls.open.pop(0)
    if not isinstance(identity, str) or identity not in calls.made:
        raise DataError(
            f"the tool_call_id {shown(identity)} is that of no earlier call.",
            remedy,
            place=place,
            path=f"{path}.tool_call_id",
        )
    if identity in calls.open:
        calls.open.remove(identity)
    return identity


def _check_content(message: dict[str, Any], place: Place, path: str) -> None:
    role, content, path = message["role"], message.get("content"), f"{path}.content"
    if content is None:
        if message.get("tool_calls"):
            message["content"] = None
            return
        raise DataError(f"the {role} message has no content.", "Write its text.", place=place, path=path)
    if isinstance(content, list):
        if not content:
            raise DataError("the list of content parts is empty.", "Write text.", place=place, path=path)
        message["content"] = [_part(part, place, f"{path}[{index}]") for index, part in enumerate(content)]
        text = "".join(part["text"] for part in message["content"])
    elif isinstance(content, str):
        text = content
    else:
        raise DataError(
            f"content is {type_name(content)}.", "Write text, or a list of text parts.", place=place, path=path
        )
    if role == "assistant" and not text.strip() and not message.get("tool_calls"):
        raise DataError(
            "the assistant's answer is empty.", "Write the answer, or remove the row.", place=place, path=path
        )


def _part(part: Any, place: Place, path: str) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise DataError(
            f"a content part is {type_name(part)}.", 'Write {"type": "text", "text": ...}.', place=place, path=path
        )
    kind = part.get("type")
    if kind != "text":
        raise DataError(
            f"the content part is of type {shown(kind)}, and this model reads text only.",
            "Remove the part, or describe what it shows in text.",
            place=place,
            path=path,
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise DataError(f"the part's text is {type_name(text)}.", "Write text.", place=place, path=f"{path}.text")
    return {"type": "text", "text": text}


def _check_learnable(messages: Sequence[Mapping[str, Any]], place: Place, path: str) -> None:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise DataError(
            "there is no assistant message.", "Add the answer that is to be learned.", place=place, path=path
        )
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"the last message is of role {messages[-1]['role']}, so it has no answer to learn.",
            "Add the assistant's answer, or remove the message.",
            place=place,
            path=f"{path}[{len(messages) - 1}]",
        )
    if all(message.get("weight") == 0 for message in answers):
        raise DataError(
            "every assistant message has weight 0, so nothing is learned.",
            "Give at least one weight 1, or remove the row.",
            place=place,
            path=path,
        )
