"""Shapes log-probabilities for the wire: OpenAI's chat form, its completions form, and vLLM's prompt form.

Logprobs are clamped at -9999, as in vLLM, because JSON knows no infinity.
"""

from collections.abc import Sequence
from typing import Any

from ...engines.base import TokenLogprob
from ...engines.detokenizer import TextDecoder
from ...engines.tokenizer import ChatTokenizer

_FLOOR = -9999.0


def chat_logprobs(tokenizer: ChatTokenizer, logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """The entries of `logprobs.content`; `bytes` are the token's own, which may be a part of a character."""
    return [
        {
            **_chat_entry(tokenizer, entry.token_id, entry.logprob),
            "top_logprobs": [_chat_entry(tokenizer, token_id, logprob) for token_id, logprob in entry.top],
        }
        for entry in logprobs
    ]


def _chat_entry(tokenizer: ChatTokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, _FLOOR), "bytes": list(raw)}


def prompt_logprobs(
    tokenizer: ChatTokenizer, logprobs: Sequence[TokenLogprob | None]
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's form: for every prompt token the ids with logprob, rank and text; null for the first token."""
    return [None if entry is None else _ranked(tokenizer, entry) for entry in logprobs]


def _ranked(tokenizer: ChatTokenizer, entry: TokenLogprob) -> dict[str, dict[str, Any]]:
    ranked = [(entry.token_id, entry.logprob, entry.rank)]
    ranked += [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top, start=1)]
    return {
        str(token_id): {
            "logprob": max(logprob, _FLOOR),
            "rank": rank,
            "decoded_token": tokenizer.token_text(token_id),
        }
        for token_id, logprob, rank in ranked
    }


class CompletionLogprobs:
    """OpenAI's completions form of one row, chunk by chunk: `text_offset` goes on from chunk to chunk.

    Bytes that are no whole character are written `bytes:\\xe2\\x82`, so that different tokens stay different keys.
    """

    def __init__(self, tokenizer: ChatTokenizer, decoder: TextDecoder) -> None:
        self._tokenizer = tokenizer
        self._decoder = decoder
        self._offset = 0  # characters of the text before the next token

    def take(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob | None]) -> dict[str, Any]:
        offsets = []
        for token_id in token_ids:
            offsets.append(self._offset)
            self._offset += len(self._decoder.push(token_id))
        return {
            "text_offset": offsets,
            "token_logprobs": [None if entry is None else max(entry.logprob, _FLOOR) for entry in logprobs],
            "tokens": [self._name(token_id) for token_id in token_ids],
            "top_logprobs": [None if entry is None else self._top(entry) for entry in logprobs],
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        top = {self._name(token_id): max(logprob, _FLOOR) for token_id, logprob in entry.top}
        top.setdefault(self._name(entry.token_id), max(entry.logprob, _FLOOR))
        return top

    def _name(self, token_id: int) -> str:
        raw = self._tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
