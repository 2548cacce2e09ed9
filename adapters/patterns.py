"""PEFT's rank_pattern and alpha_pattern: which value a module gets. It bounds the time that a pattern may take.

PEFT matches each key, in order, as `(.*\\.)?(key)$` from the start of the module's name; the first that matches wins
(`peft.utils.other.get_pattern_key`). Keys come from strangers, and Python's `re` backtracks while it holds the
interpreter, so only patterns with a bounded number of ways to match are evaluated, and all of them against a clock.
"""

import itertools
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..storage.errors import InvalidInput, TooLarge
from .files import shown

MAX_PATTERNS = 20_000
MAX_REGEXES = 500  # of them: each has to be compiled
_MAX_LENGTH = 512
_MAX_WAYS = 2**21  # of one pattern to match one name: a tenth of a second at worst
_MAX_SECONDS = 2.0  # for all patterns and all modules of an adapter
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
        if sum(_LITERAL.fullmatch(pattern) is None for pattern in patterns) > MAX_REGEXES:
            raise TooLarge(f"{field} has over {MAX_REGEXES} regular expressions; use whole module names.", param="file")
        self._matchers: list[tuple[str | _Regex, Value]] = [
            (_matcher(field, pattern), value) for pattern, value in self.patterns.items()
        ]

    def of(self, module: str) -> Value | None:
        """The value for a module's name (`model.layers.0.self_attn.q_proj`), None if no pattern matches it."""
        return self.of_all([module]).get(module)

    def of_all(self, modules: Iterable[str]) -> dict[str, Value]:
        """The values of the modules that a pattern matches. Raises InvalidInput when that could take seconds."""
        deadline = time.monotonic() + _MAX_SECONDS
        return {
            module: value
            for module in modules
            for value in itertools.islice(self._matches(module, deadline), 1)  # the first pattern wins
        }

    def _matches(self, module: str, deadline: float) -> Iterator[Value]:
        for matcher, value in self._matchers:
            if isinstance(matcher, str):
                matched = _literally(matcher, module)
            elif matcher.ways(module) > _MAX_WAYS:
                raise _refused(self._field, matcher.pattern, f"has too many ways to match {shown(module)}")
            else:
                matched = matcher.regex.match(module) is not None
            if matched:
                yield value
            elif time.monotonic() > deadline:
                raise InvalidInput(
                    f"The patterns of {self._field} take too long to match against the adapter's modules; use whole "
                    "module names, or fewer patterns with `*` and `+`.",
                    param="file",
                    code="pattern_refused",
                )


@dataclass(frozen=True, slots=True)
class _Regex:
    """A pattern that is more than a name; every quantifier may stop anywhere, every group takes any of its branches."""

    pattern: str
    regex: re.Pattern[str]
    quantifiers: int
    branches: int

    def ways(self, module: str) -> int:
        """At most so many paths are tried for a name; PEFT's prefix may end at every dot."""
        return int(self.branches * (len(module) + 1) ** self.quantifiers * (module.count(".") + 1))


def _matcher(field: str, pattern: str) -> str | _Regex:
    """The pattern itself where it is no more than a name (its dots match any character), else compiled."""
    if len(pattern) > _MAX_LENGTH:
        raise _refused(field, pattern, f"is longer than {_MAX_LENGTH} characters")
    if _LITERAL.fullmatch(pattern):
        return pattern
    quantifiers, branches, reason = _choices(pattern)
    if reason is not None:
        raise _refused(field, pattern, reason)
    if branches > _MAX_WAYS:
        raise _refused(field, pattern, "has too many ways to match")
    try:
        regex = re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise _refused(field, pattern, f"is not a valid regular expression ({error})") from error
    return _Regex(pattern=pattern, regex=regex, quantifiers=quantifiers, branches=branches)


def _literally(pattern: str, module: str) -> bool:
    start = len(module) - len(pattern)
    if start < 0 or (start > 0 and module[start - 1] != "."):
        return False
    if module.endswith(pattern):
        return True
    return "." in pattern and all(p in (".", c) for p, c in zip(pattern, module[start:], strict=True))


def _choices(pattern: str) -> tuple[int, int, str | None]:
    """How many quantifiers and how many combinations of branches a pattern has, or why that is no bound."""
    quantifiers, product, branches, previous = 0, 1, [1], ""
    for part in _TOKEN.findall(pattern):
        if previous and part[0] in "*+?{":
            if previous == "repeat" and part in "?+":
                previous = "repeat?"  # lazy or possessive
                continue
            if previous in (")", "repeat", "repeat?"):
                return 0, 0, "repeats a group or a repetition, which can take exponential time"
            if part == "?":
                product *= 2
            elif part[0] != "{" or "," in part:  # {3} leaves no choice
                quantifiers += 1
            previous = "repeat"
            continue
        if part == "?" or (part[0] == "\\" and part[1:].isdigit()):
            return 0, 0, "uses lookarounds, flags or back-references"
        if part in _OPENING:
            branches.append(1)
        elif part == "|":
            branches[-1] += 1
        elif part == ")":
            if len(branches) == 1:
                return 0, 0, "closes a group that it did not open"  # it would close PEFT's own
            product *= branches.pop()
        previous = "" if part in (*_OPENING, "|") else part
    return quantifiers, product * math.prod(branches), None


def _refused(field: str, pattern: str, reason: str) -> InvalidInput:
    return InvalidInput(
        f"The pattern {shown(pattern)} of {field} {reason}, so it is not evaluated. Use whole module names, or simple "
        "patterns such as `layers\\.(0|1)\\..*q_proj`.",
        param="file",
        code="pattern_refused",
    )
