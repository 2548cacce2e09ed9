"""Checks lists of tools and the calls of tools in messages, and brings both into OpenAI's form. It knows no template.

Tools are `{"type": "function", "function": {"name", "description", "parameters"}}`; a bare function, as sharegpt data
has it, is wrapped. Calls carry their arguments as JSON text.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from .base import Place
from .checks import DataError, shown, type_name

_SCHEMA_TYPES = frozenset({"object", "array", "string", "number", "integer", "boolean", "null"})
_SCHEMA_MAPS = ("properties", "$defs", "definitions", "patternProperties")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMA_SINGLES = ("items", "additionalProperties", "not")
_TOOL_FORM = 'Write {"type": "function", "function": {"name": ..., "parameters": {...}}}.'


def parse_tools(value: Any, place: Place, path: str) -> tuple[Mapping[str, Any], ...]:
    """The tools of a row: a list, or the same as JSON text; nothing and an empty text are no tools."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    if isinstance(value, str):
        value = parse_json_text(value, place, path, "a list of tools")
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise DataError(f"tools are {type_name(value)}, not a list.", _TOOL_FORM, place=place, path=path)
    return tuple(_tool(tool, place, f"{path}[{index}]") for index, tool in enumerate(value))


def parse_json_text(text: str, place: Place, path: str, wanted: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"this text should be JSON ({wanted}) but is not: {error}.",
            "Correct it, or write the value itself instead of its text.",
            place=place,
            path=path,
        ) from error


def _tool(tool: Any, place: Place, path: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise DataError(f"a tool is {type_name(tool)}, not an object.", _TOOL_FORM, place=place, path=path)
    tool = without_nulls(tool)
    if "function" in tool:
        kind = tool.get("type", "function")
        if kind != "function":
            raise DataError(
                f"a tool has type {shown(kind)}.", "Only tools of type function can be trained.", place=place, path=path
            )
        function, path = tool["function"], f"{path}.function"
    else:
        function = {key: value for key, value in tool.items() if key != "type"}
    if not isinstance(function, Mapping):
        raise DataError(f"a function is {type_name(function)}, not an object.", _TOOL_FORM, place=place, path=path)
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise DataError("a tool has no name.", _TOOL_FORM, place=place, path=f"{path}.name")
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        raise DataError(
            f"a tool's description is {type_name(description)}.", "Write text.", place=place, path=f"{path}.description"
        )
    function = dict(function)
    if isinstance(function.get("parameters"), str):
        function["parameters"] = parse_json_text(function["parameters"], place, f"{path}.parameters", "a JSON schema")
    parameters = function.get("parameters")
    if parameters is not None:
        _check_parameters(parameters, place, f"{path}.parameters")
    return {"type": "function", "function": function}


def _check_parameters(schema: Any, place: Place, path: str) -> None:
    if isinstance(schema, Mapping) and schema and schema.get("type", "object") != "object":
        raise DataError(
            f"a tool's parameters have type {shown(schema['type'])}.",
            'A call has named arguments; write a JSON schema of type "object".',
            place=place,
            path=f"{path}.type",
        )
    _check_schema(schema, place, path)


def _check_schema(schema: Any, place: Place, path: str) -> None:
    """What templates read of a JSON schema must have the right shape; other keywords are the author's business."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise _no_schema(f"a schema is {type_name(schema)}, not an object.", place, path)
    _check_keywords(schema, place, path)
    for inner, value in _inner_schemas(schema, place, path):
        _check_schema(value, place, inner)


def _check_keywords(schema: Mapping[str, Any], place: Place, path: str) -> None:
    kinds = schema.get("type")
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind is not None and (not isinstance(kind, str) or kind not in _SCHEMA_TYPES):
            raise _no_schema(f"{shown(kind)} is not a type of JSON schema.", place, f"{path}.type")
    required = schema.get("required")
    if required is not None and not (isinstance(required, list) and all(isinstance(name, str) for name in required)):
        raise _no_schema("`required` is not a list of names.", place, f"{path}.required")
    if not isinstance(schema.get("enum"), list | None):
        raise _no_schema("`enum` is not a list.", place, f"{path}.enum")


def _inner_schemas(schema: Mapping[str, Any], place: Place, path: str) -> Iterator[tuple[str, Any]]:
    for key in _SCHEMA_MAPS:
        inner = schema.get(key) or {}
        if not isinstance(inner, Mapping):
            raise _no_schema(f"`{key}` is {type_name(inner)}, not an object.", place, f"{path}.{key}")
        yield from ((f"{path}.{key}.{name}", value) for name, value in inner.items() if value is not None)
    for key in _SCHEMA_LISTS:
        choices = schema.get(key) or []
        if not isinstance(choices, list):
            raise _no_schema(f"`{key}` is {type_name(choices)}, not a list.", place, f"{path}.{key}")
        yield from ((f"{path}.{key}[{index}]", value) for index, value in enumerate(choices))
    for key in _SCHEMA_SINGLES:
        if schema.get(key) is not None and not isinstance(schema[key], list):  # a list is the old form of prefixItems
            yield f"{path}.{key}", schema[key]


def _no_schema(what: str, place: Place, path: str) -> DataError:
    return DataError(what, "A tool's parameters are a JSON schema; correct it.", place=place, path=path)


def parse_calls(value: Any, place: Place, path: str, *, new_id: int) -> list[dict[str, Any]]:
    """The calls of an assistant message, checked; calls without an id get `call_<n>`, counting from `new_id`."""
    if not isinstance(value, list) or not value:
        raise DataError(
            f"tool_calls are {type_name(value) if value else 'empty'}.",
            "Write a list with at least one call, or leave tool_calls out.",
            place=place,
            path=path,
        )
    calls = [_call(call, place, f"{path}[{index}]", new_id + index) for index, call in enumerate(value)]
    ids = [call["id"] for call in calls]
    if len(set(ids)) != len(ids):
        raise DataError("two calls have the same id.", "Give each its own.", place=place, path=path)
    return calls


def _call(call: Any, place: Place, path: str, number: int) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise DataError(f"a call is {type_name(call)}, not an object.", _CALL_FORM, place=place, path=path)
    call = without_nulls(call)
    if call.get("type", "function") != "function":
        raise DataError(f"a call has type {shown(call['type'])}.", _CALL_FORM, place=place, path=f"{path}.type")
    function = call.get("function")
    if not isinstance(function, Mapping):
        raise DataError("a call has no function.", _CALL_FORM, place=place, path=f"{path}.function")
    identity = call.get("id", f"call_{number}")
    if not isinstance(identity, str) or not identity:
        raise DataError(f"a call's id is {type_name(identity)}.", "Write text.", place=place, path=f"{path}.id")
    return {"id": identity, "type": "function", "function": call_function(function, place, f"{path}.function")}


_CALL_FORM = (
    'Write {"id": ..., "type": "function", "function": {"name": ..., "arguments": "{...}"}}, '
    "the arguments as JSON text."
)


def call_function(function: Mapping[str, Any], place: Place, path: str) -> dict[str, str]:
    """`name` and `arguments` of a call, the arguments as the text of a JSON object."""
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise DataError("a call has no name.", _CALL_FORM, place=place, path=f"{path}.name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        parsed = parse_json_text(arguments, place, f"{path}.arguments", "the arguments of a call")
    else:
        parsed = arguments
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(parsed, Mapping):
        raise DataError(
            f"a call's arguments are {type_name(parsed)}, not an object.",
            "Arguments have names; a call without any has {}.",
            place=place,
            path=f"{path}.arguments",
        )
    return {"name": name, "arguments": arguments}


def without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Parquet gives every object all keys that any of its siblings has, as null: those mean nothing."""
    return {key: value for key, value in fields.items() if value is not None}
