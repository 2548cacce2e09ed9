"""The messages of a chat request: which roles and parts exist, and what a text model cannot take. Wire types only."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

from ...storage.errors import InvalidInput

Role = Literal["system", "developer", "user", "assistant", "tool"]
_OTHER_PARTS = ("image_url", "input_image", "video_url", "audio_url", "input_audio", "file")


def _content(value: Any) -> str | list[dict[str, str]] | None:
    """Text, or a list of text parts, in the form that chat templates read."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("it must be a string or a list of text parts")
    return [_part(part) for part in value]


def _part(part: Any) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in _OTHER_PARTS:
        raise ValueError(f"parts of the type '{kind}' are not supported by this server, which takes text only")
    if not isinstance(part, Mapping) or kind not in ("text", "input_text", "output_text", "refusal"):
        raise ValueError("each part must be an object with the type 'text'")
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        raise ValueError(f"a part of the type '{kind}' must have its text as a string")
    return {"type": "text", "text": text}


Content = Annotated[
    str | list[dict[str, str]] | None,
    PlainValidator(_content, json_schema_input_type=str | list[dict[str, Any]] | None),
]


class FunctionCall(BaseModel):
    """`arguments` is a JSON text, as in OpenAI's API."""

    model_config = ConfigDict(extra="forbid")

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call that the assistant made earlier in the conversation."""

    model_config = ConfigDict(extra="forbid")

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None  # SDK users put streamed deltas back


class ChatMessage(BaseModel):
    """One message. An assistant message may come from an earlier answer, with all the nulls that SDKs put into it."""

    model_config = ConfigDict(extra="forbid")

    role: Role
    content: Content = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    annotations: Annotated[list[Any] | None, Field(max_length=0)] = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> "ChatMessage":
        assistant = self.role == "assistant"
        if not assistant and self.content is None:
            raise ValueError(f"a message of the role '{self.role}' must have content")
        if assistant and self.content is None and not (self.tool_calls or self.refusal is not None):
            raise ValueError("an assistant message must have content or tool_calls")
        if not assistant and (self.tool_calls or self.refusal or self.reasoning or self.reasoning_content):
            raise ValueError("only assistant messages may have tool_calls, refusal or reasoning")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("a tool message, and no other, must have a tool_call_id")
        return self

    def to_template(self) -> dict[str, Any]:
        """The message as chat templates read it: absent fields left out, arguments of calls as objects."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.content is None and self.refusal is not None:
            message["content"] = self.refusal
        reasoning = self.reasoning_content or self.reasoning
        if reasoning is not None:
            message["reasoning_content"] = reasoning
        if self.tool_calls:
            message["tool_calls"] = [_call_to_template(call) for call in self.tool_calls]
        for name in ("name", "tool_call_id"):
            if (value := getattr(self, name)) is not None:
                message[name] = value
        return message


def _call_to_template(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except ValueError as error:
        raise InvalidInput(
            f"The arguments of the call of '{call.function.name}' are not valid JSON: {error}.", param="messages"
        ) from error
    return {"id": call.id, "type": call.type, "function": {"name": call.function.name, "arguments": arguments}}
