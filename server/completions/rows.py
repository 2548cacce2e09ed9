"""Writes the choices of one row of a completion: echo, text, log-probabilities, token ids. It knows no transport."""

from collections.abc import Sequence
from typing import Any

from ...engines.base import Chunk, TokenLogprob
from ...engines.tokenizer import ChatTokenizer
from ..generation.logprobs import CompletionLogprobs
from ..generation.run import RowResult
from .protocol import CompletionRequest


class RowWriter:
    """Row `index` of the answer. Use either `whole` once, or `delta` for each chunk in order."""

    def __init__(
        self,
        body: CompletionRequest,
        tokenizer: ChatTokenizer,
        index: int,
        prompt: str | list[int],
        prompt_token_ids: Sequence[int],
    ) -> None:
        self._body = body
        self._tokenizer = tokenizer
        self._index = index
        self._prompt = prompt
        self._prompt_token_ids = prompt_token_ids
        self._begun = False
        skip = body.skip_special_tokens is not False
        context = () if body.echo else prompt_token_ids
        decoder = tokenizer.text_decoder(skip_special_tokens=skip, context=context)
        self._logprobs = CompletionLogprobs(tokenizer, decoder)

    def whole(self, row: RowResult) -> dict[str, Any]:
        chunk = Chunk(
            self._index,
            row.token_ids,
            "".join(row.text),
            row.logprobs,
            row.finish_reason,
            row.stop_reason,
            prompt_logprobs=row.prompt_logprobs,
        )
        return self._choice(chunk)

    def delta(self, chunk: Chunk) -> dict[str, Any] | None:
        """The choice of one streamed chunk; None if it has nothing to show yet."""
        told = self._body.logprobs is not None or self._body.return_token_ids
        shows = chunk.text or (told and chunk.token_ids) or (self._body.echo and not self._begun)
        if not shows and chunk.finish_reason is None:
            return None
        return self._choice(chunk)

    def _choice(self, chunk: Chunk) -> dict[str, Any]:
        body, first = self._body, not self._begun
        self._begun = True
        token_ids, text, logprobs = chunk.token_ids, chunk.text, list[TokenLogprob | None](chunk.logprobs or ())
        finish_reason, stop_reason = chunk.finish_reason, chunk.stop_reason
        if body.only_echoes:
            token_ids, text, logprobs, stop_reason = [], "", [], None
            finish_reason = None if finish_reason is None else "length"
        choice: dict[str, Any] = {"index": self._index, "text": text, "logprobs": None}
        if body.return_token_ids:
            choice["token_ids"] = token_ids
            if first:
                choice["prompt_token_ids"] = list(self._prompt_token_ids)
        if body.echo and first:
            choice["text"] = self._prompt_text() + text
            token_ids = [*self._prompt_token_ids, *token_ids]
            logprobs = [*self._prompt_logprobs(chunk), *logprobs]
        if body.logprobs is not None:
            choice["logprobs"] = self._logprobs.take(token_ids, logprobs)
        choice["finish_reason"] = finish_reason
        if finish_reason is not None:
            choice["stop_reason"] = stop_reason
        return choice

    def _prompt_text(self) -> str:
        if isinstance(self._prompt, str):
            return self._prompt
        return self._tokenizer.decode(self._prompt, skip_special_tokens=self._body.skip_special_tokens is not False)

    def _prompt_logprobs(self, chunk: Chunk) -> list[TokenLogprob | None]:
        """The prompt's entries with as many alternatives as `logprobs` asks for."""
        wanted = self._body.logprobs
        if wanted is None:
            return []
        return [
            entry and TokenLogprob(entry.token_id, entry.logprob, entry.rank, entry.top[:wanted])
            for entry in chunk.prompt_logprobs or ()
        ]
