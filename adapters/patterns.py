"""PEFT's rank_pattern and alpha_pattern: which value a module gets. It bounds the time that a pattern may take.

PEFT matches each key, in order, as `(.*\\.)?(key)$` from the start of the module's name; the first that matches wins
(`peft.utils.other.get_pattern_key`). Keys come from strangers, and Python's `re` backtracks while it holds the
interpreter, so only patterns with a bounded number of ways to match are evaluated, and all of them against a clock.
"""

import re
import time
from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar

from ..storage.errors import InvalidInput, TooLarge
from .files import shown

MAX_PATTERNS = 20_000
_MAX_LENGTH = 512
_MAX_WAYS = 2**21
_NAME_LENGTH = 128  # of a long module name: a quantifier can stop at any of its places
_MAX_SECONDS = 5.0
_LITERAL = re.compile(r"[\w.-]+", re.ASCII)
_OPENING = ("(", "(?:")
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?:|\{\d*,?\d*\}|.", re.DOTALL)

Value = TypeVar("Value", int, float)


class PatternTable(Generic[Value]):
    """Values by pattern, in PEFT's order. Raises InvalidInput for a pattern that isn't evaluated."""

    def __init__(self, field: str, patterns: Mapping[str, Value]) -> None:
        """`field` is the configuration's key, for messages."""
        if len(patterns) > MAX_PATTERNS:
            raise TooLarge(f"{field} has {len(patterns)} patterns; this server reads {MAX_PATTERNS}.", param="file")
        self.patterns: dict[str, Value] = dict(patterns)
        self._field = field
        self._matchers: list[tuple[str | re.Pattern[str], Value]] = [
            (_matcher(field, pattern), value) for pattern, value in patterns.items()
        ]

    def of(self, module: str) -> Value | None:
        """The value for a module's name (`model.layers.0.self_attn.q_proj`), None if no pattern matches it."""
        for matcher, value in self._matchers:
            if _literally(matcher, module) if isinstance(matcher, str) else matcher.match(module):
                return value
        return None

    def of_all(self, modules: Iterable[str]) -> dict[str, Value]:
        """The values of the modules that a pattern matches. Raises InvalidInput when that takes seconds."""
        if not self._matchers:
            return {}
        deadline = time.monotonic() + _MAX_SECONDS
        values = {}
        for module in modules:
            value = self.of(module)
            if value is not None:
                values[module] = value
            if time.monotonic() > deadline:
                raise InvalidInput(
                    f"The patterns of {self._field} take too long to match against the adapter's modules; use whole "
                    "module names, or fewer patterns with `*` and `+`.",
                    param="file",
                )
        return values


def _matcher(field: str, pattern: str) -> str | re.Pattern[str]:
    """The pattern itself where it is no more than a name (its dots match any character), else compiled."""
    if len(pattern) > _MAX_LENGTH:
        raise _refused(field, pattern, f"is longer than {_MAX_LENGTH} characters")
    if _LITERAL.fullmatch(pattern):
        return pattern
    reason = _unbounded(pattern)
    if reason is not None:
        raise _refused(field, pattern, reason)
    try:
        re.compile(pattern)  # alone: it must not close PEFT's own group
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise _refused(field, pattern, f"is not a valid regular expression ({error})") from error


def _literally(pattern: str, module: str) -> bool:
    start = len(module) - len(pattern)
    if start < 0 or (start > 0 and module[start - 1] != "."):
        return False
    if module.endswith(pattern):
        return True
    return "." in pattern and all(p in (".", c) for p, c in zip(pattern, module[start:], strict=True))


def _unbounded(pattern: str) -> str | None:
    """Why the number of ways to match cannot be bounded, or None.

    The bound is a product: every quantifier over single characters may stop anywhere, every group takes any branch.
    """
    ways, branches, previous = 1, [1], ""
    for part in _TOKEN.findall(pattern):
        if previous and part[0] in "*+?{":
            if previous == "repeat" and part in "?+":
                previous = "repeat?"  # lazy or possessive
                continue
            if previous in (")", "repeat", "repeat?"):
                return "repeats a group or a repetition, which can take exponential time"
            ways *= 2 if part == "?" else _NAME_LENGTH
            previous = "repeat"
            continue
        if part == "?" or (part[0] == "\\" and part[1:].isdigit()):
            return "uses lookarounds, flags or back-references"
        if part in _OPENING:
            branches.append(1)
        elif part == "|":
            branches[-1] += 1
        elif part == ")" and len(branches) > 1:
            ways *= branches.pop()
        previous = "" if part in (*_OPENING, "|") else part
    for count in branches:
        ways *= count
    return "has too many ways to match" if ways > _MAX_WAYS else None


def _refused(field: str, pattern: str, reason: str) -> InvalidInput:
    return InvalidInput(
        f"The pattern {shown(pattern)} of {field} {reason}, so it is not evaluated. Use whole module names, or simple "
        "patterns such as `layers\\.(0|1)\\..*q_proj`.",
        param="file",
        code="pattern_refused",
    )
