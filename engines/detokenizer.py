"""Token ids in, whole characters out, one token at a time. It knows no stop strings and no sampling.

Two decoders, chosen by what the tokenizer's own decoder is:

- `ByteDecoder` for byte-level BPE and for SentencePiece with byte fallback, where every token is a fixed run of bytes:
  one table look-up and one step of an incremental UTF-8 decoder a token;
- `WindowDecoder` for everything else (WordPiece and tokenizers with code of their own), where a token's text depends
  on its neighbours: a window of the last few tokens is decoded twice, and the difference is what the token added.
"""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

MAX_BYTES_OF_A_CHARACTER = 4


class TextDecoder(ABC):
    """The text of one growing row. What `push` returned never changes later and never ends inside a character."""

    @abstractmethod
    def push(self, token_id: int) -> str:
        """The text that is certain after this token; empty while a character is incomplete."""

    @abstractmethod
    def flush(self) -> str:
        """The rest at the row's end: an incomplete character comes out as U+FFFD."""


class ByteDecoder(TextDecoder):
    """`token_bytes(id)` gives the token's bytes, empty for a token that is skipped.

    `strip_space` drops one space in front of the very first text, as SentencePiece does at the start of a sequence.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], *, strip_space: bool = False) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = strip_space

    def push(self, token_id: int) -> str:
        text = self._utf8.decode(self._token_bytes(token_id))
        if self._strip_space and text:
            self._strip_space = False
            return text.removeprefix(" ")
        return text

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowDecoder(TextDecoder):
    """`decode(ids)` is the tokenizer's own full decode; `context` are the ids before the row (the prompt's end)."""

    CONTEXT_TOKENS = 8

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(context[-self.CONTEXT_TOKENS :])
        self._settled = len(self._ids)  # ids before this index have given their text

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        before, after = self._texts()
        # A replacement sign at the end may be the first bytes of a character: it waits, but never for more tokens
        # than a character has bytes, so that a token that really stands for U+FFFD is not held for ever.
        if after.endswith("�") and len(self._ids) - self._settled < MAX_BYTES_OF_A_CHARACTER:
            return ""
        return self._settle(before, after)

    def flush(self) -> str:
        return self._settle(*self._texts())

    def _texts(self) -> tuple[str, str]:
        return self._decode(self._ids[: self._settled]), self._decode(self._ids)

    def _settle(self, before: str, after: str) -> str:
        # The new ids alone become the context of the next ones, unless they are too few to show how a token joins on.
        self._ids = self._ids[-self.CONTEXT_TOKENS :]
        self._settled = len(self._ids)
        return after[len(before) :]
