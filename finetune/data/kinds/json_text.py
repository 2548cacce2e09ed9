"""Parses the JSON of one row strictly: no key twice, no NaN, no half of a character. It knows no file."""

import json
import re
from collections.abc import Mapping
from typing import Any

from ..base import Place
from ..checks import DataError, type_name

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class _Refused(ValueError):
    """What JSON's grammar allows and we do not; the message is a sentence, the remedy another one."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.remedy = remedy


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused(f"the key {key!r} stands twice in one object.", "Keep one of them.")
            seen.add(key)
    return fields


def _constant(text: str) -> Any:
    raise _Refused(f"{text} is not JSON.", "Write null or a number.")


DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant)


def parse_object(text: str, place: Place, remedy: str) -> Mapping[str, Any]:
    """The object that a whole line holds; raises DataError with the column."""
    try:
        value = DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise json_error(error, place, remedy) from error
    return checked_object(value, text, place)


def checked_object(value: Any, text: str, place: Place) -> Mapping[str, Any]:
    """`value` was parsed from `text`."""
    if not isinstance(value, dict):
        raise DataError(
            f"the row is {type_name(value)}, not an object.", 'Write {"field": value, ...}.', place=place, column=1
        )
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            match = _SURROGATE.search(text)
            raise DataError(
                "an escape \\ud800 to \\udfff stands alone; it is half of a character.",
                "Write the character itself, or both halves.",
                place=place,
                column=match.start() + 1 if match else None,
            ) from error
    return value


def json_error(error: ValueError | RecursionError, place: Place, remedy: str) -> DataError:
    if isinstance(error, json.JSONDecodeError):
        return DataError(f"this is not valid JSON: {error.msg}.", remedy, place=place, column=error.colno)
    if isinstance(error, _Refused):
        return DataError(str(error), error.remedy, place=place)
    if isinstance(error, RecursionError):
        return DataError("the JSON is nested too deeply.", "Flatten it.", place=place)
    return DataError(f"the JSON has a value that cannot be read ({error}).", "Shorten the number.", place=place)
