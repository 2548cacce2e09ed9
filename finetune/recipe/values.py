"""Brings one value, as YAML, JSON or a command line gives it, to the type of its recipe key. It knows no other key.

YAML 1.1 has traps of its own (`no` is false, `1e-4` a text), and pydantic would take `true` for 1 and "false" for
false; here each value is taken as what the person wrote, or refused with a sentence.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

import yaml

from ...storage.errors import InvalidInput
from .recipe import Recipe


def coerce(key: str, value: Any, *, shown: str) -> Any:
    """The value for the recipe's key; `shown` names the key in errors. Raises InvalidInput whose `param` is `key`."""
    kinds = tuple(_kinds(Recipe.model_fields[key].annotation))
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if isinstance(value, str) and value in words:
        return value
    if value is False and "no" in words:  # YAML 1.1 reads a bare `no` as false
        return "no"
    try:
        return _as_kind(kinds, words, value)
    except ValueError as error:
        raise InvalidInput(f"{shown} is {_shown(value)}; {error}.", param=key) from None


def _as_kind(kinds: tuple[Any, ...], words: list[str], value: Any) -> Any:
    if bool in kinds and str not in kinds:
        return _boolean(value, words)
    origins = [get_origin(kind) or kind for kind in kinds]
    if tuple in origins:
        return _list(value, float if float in get_args(kinds[origins.index(tuple)]) else str)
    if dict in origins:
        return _mapping(value)
    if int in kinds:
        return _integer(value)
    if float in kinds:
        return _number(value)
    if words:
        raise ValueError(f"it can be {' or '.join([', '.join(words[:-1]), words[-1]] if words[1:] else words)}")
    return value if bool in kinds and isinstance(value, bool) else _text(value)


def _kinds(annotation: Any) -> list[Any]:
    """The alternatives of an annotation, without None."""
    if get_origin(annotation) in (None, Literal, tuple, dict):
        return [] if annotation is type(None) else [annotation]
    return [kind for part in get_args(annotation) for kind in _kinds(part)]


def _boolean(value: Any, words: list[str]) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError(" or ".join(["write true", "false", *words]) + ", without quotes")


def _integer(value: Any) -> int:
    number = _number(value, "it must be a whole number")
    if number != int(number):
        share = ", not a share of all steps" if 0 < number < 1 else ""
        raise ValueError(f"it must be a whole number{share}")
    return int(number)


def _number(value: Any, wish: str = "it must be a number") -> float:
    if isinstance(value, bool):
        raise ValueError(wish)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(wish) from None
    if not math.isfinite(number):
        raise ValueError("it must be finite")
    return number


def _text(value: Any) -> str:
    if isinstance(value, (bool, list, dict)):
        raise ValueError("it must be a text")
    return str(value)


def _list(value: Any, kind: type) -> tuple[Any, ...]:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    parts = value if isinstance(value, (list, tuple)) else [value]
    return tuple(_number(part) if kind is float else _text(part) for part in parts)


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = yaml.safe_load(value)  # LLaMA-Factory takes JSON texts
    if not isinstance(value, Mapping):
        raise ValueError("it must be a mapping, as {name: value}")
    return {str(name): part for name, part in value.items()}


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
