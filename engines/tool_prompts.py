"""Writes tools, calls and results into plain messages, for chat templates that know none of them.

The form is that of Nous Research's Hermes models (`<tools>`, `<tool_call>`, `<tool_response>`), which Qwen's templates
took over and most parsers of tool calls read. Serving and training use it alike; it knows no tokenizer.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..storage.errors import InvalidInput
from .chat_templates import call_form, reads_tool_calls, reads_tool_results, reads_tools, takes_system, to_json

Message = Mapping[str, Any]

_OFFER = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{tools}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML "
    'tags:\n<tool_call>\n{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
)


def fit_tools(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], source: str
) -> tuple[list[Message], list[Mapping[str, Any]]]:
    """Messages and tools in the form that the template `source` shows.

    A template that knows tools gets them as they are, with calls' arguments as objects or JSON text, whichever it
    reads. For others the tools become part of the system message, calls text of the assistant, and results turns of
    the user, or those of the three that the template does not know. Messages that are not changed are passed on, none
    is changed in place. Raises InvalidInput for arguments that are no JSON.
    """
    offers = bool(tools) and not reads_tools(source)
    # What is decided here may depend on the template and the tools only: a prompt begins as the shorter ones before it.
    writes_calls = offers or not reads_tool_calls(source)
    writes_results = writes_calls and (offers or not reads_tool_results(source))
    fitted = _written(messages, writes_calls=writes_calls, writes_results=writes_results)
    if not writes_calls and any(message.get("tool_calls") for message in fitted):
        as_text = call_form(source)[0]
        fitted = [_with_arguments(message, as_text) for message in fitted]
    if not offers:
        return fitted, list(tools)
    return _offered(fitted, tools, in_system=takes_system(source)), []


def _offered(messages: list[Message], tools: Sequence[Mapping[str, Any]], *, in_system: bool) -> list[Message]:
    """The tools in the system message, or in the user's first where the template refuses system messages."""
    offer = _OFFER.format(tools="\n".join(to_json(tool) for tool in tools))
    if messages and messages[0].get("role") in ("system", "developer"):
        text = content_text(messages[0].get("content"))
        return [{**messages[0], "content": f"{text}\n\n{offer}" if text else offer}, *messages[1:]]
    if in_system or not messages or messages[0].get("role") != "user":
        return [{"role": "system", "content": offer}, *messages]
    return [{**messages[0], "content": f"{offer}\n\n{content_text(messages[0].get('content'))}"}, *messages[1:]]


def _written(messages: Sequence[Message], *, writes_calls: bool, writes_results: bool) -> list[Message]:
    written: list[Message] = []
    follows_result = False
    for message in messages:
        if writes_results and message.get("role") == "tool":
            result = f"<tool_response>\n{content_text(message.get('content'))}\n</tool_response>"
            if follows_result:  # results of calls made together come back together
                written[-1] = {"role": "user", "content": f"{written[-1]['content']}\n{result}"}
            else:
                written.append({"role": "user", "content": result})
        elif writes_calls and message.get("tool_calls"):
            kept = {key: value for key, value in message.items() if key not in ("tool_calls", "content")}
            text = content_text(message.get("content"))
            parts = [*([text] if text else []), *(_call_text(call) for call in message["tool_calls"])]
            written.append({**kept, "content": "\n".join(parts)})
        else:
            written.append(message)
        follows_result = message.get("role") == "tool"
    return written


def content_text(content: Any) -> str:
    """A message's text, whether it is a string, a list of text parts, or absent."""
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content)
    return content or ""


def _call_text(call: Mapping[str, Any]) -> str:
    function = call["function"]
    said = {"name": function["name"], "arguments": _arguments(function)}
    return f"<tool_call>\n{to_json(said)}\n</tool_call>"


def _with_arguments(message: Message, as_text: bool) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        arguments = _arguments(function)
        if as_text:
            given = function.get("arguments")
            arguments = given if isinstance(given, str) and given else to_json(arguments)
        calls.append({**call, "function": {**function, "arguments": arguments}})
    return {**message, "tool_calls": calls}


def _arguments(function: Mapping[str, Any]) -> Any:
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    try:
        return json.loads(arguments or "{}")
    except ValueError as error:
        raise InvalidInput(
            f"The arguments of the call of '{function['name']}' are not valid JSON: {error}. Write an object.",
            param="messages",
        ) from error
