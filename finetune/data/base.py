"""What data are on their way from a file to the trainer. It knows no format and no tokenizer.

    source (file, hub, bucket)  ->  Row (a conversation with its place)  ->  Sequence (token ids)  ->  TokenStore

`formats/` turn what is in files into rows, `render.py` turns a row into sequences by the checkpoint's own chat
template, and `token_store.py` keeps sequences where the trainer reads them.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row stands; `line` counts from 1, and is the row's number in formats without lines."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One example, in OpenAI's own form whatever file it came from.

    `messages` are those of chat completions (roles system, developer, user, assistant, tool; `tool_calls` with JSON
    text as arguments); an assistant message may carry `weight` 0 or 1. `text` is plain text to go on training with,
    and then there are no messages.
    """

    place: Place
    messages: Many[Mapping[str, Any]] = ()
    tools: Many[Mapping[str, Any]] = ()
    text: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSequence:
    """Token ids and, for each, whether the model is to learn to produce it (the first one never is)."""

    ids: Many[int]
    supervised: Many[bool]
    place: Place


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What became of the rows; the first places of each kind are named."""

    rows: int = 0
    sequences: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0
    too_long: int = 0
    truncated: int = 0
    dropped: int = 0
    too_long_places: tuple[str, ...] = ()
    split_conversations: int = 0  # trained turn by turn, because the template rewrites earlier turns
    lengths: Mapping[int, int] = field(default_factory=dict)  # histogram: upper bound of a bin -> sequences
    notices: tuple[str, ...] = ()
