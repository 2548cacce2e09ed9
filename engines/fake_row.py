"""One scripted completion of the fake engine: which token comes next, and where it ends. It knows no queue."""

from collections.abc import Sequence

from .base import Chunk, EngineInfo, FinishReason, GenerateRequest, SamplingParams, TokenLogprob
from .output import OutputText
from .tokenizer import ChatTokenizer


class FakeRow:
    """One completion: the reply's tokens, then EOS; with ignore_eos or min_tokens the reply is said again."""

    def __init__(
        self, tokenizer: ChatTokenizer, info: EngineInfo, request: GenerateRequest, index: int, reply: str
    ) -> None:
        self.finished = False
        self._index = index
        self._info = info
        self._sampling: SamplingParams = request.sampling
        self._script = tokenizer.encode(reply, add_special_tokens=False) or [0]
        self._output = OutputText(tokenizer, request.sampling, request.prompt_token_ids)
        self._ids_given = 0

    def step(self) -> Chunk:
        place = self._ids_given
        ended = place >= len(self._script) and not self._sampling.ignore_eos and place >= self._sampling.min_tokens
        if ended and self._info.eos_token_ids:
            return self._end_at(min(self._info.eos_token_ids), stop_reason=None)
        token_id = self._script[place % len(self._script)]
        if token_id in self._sampling.stop_token_ids and place >= self._sampling.min_tokens:
            return self._end_at(token_id, stop_reason=token_id)
        text = self._output.push([token_id])
        chunk = self._chunk(token_id, text)
        if self._output.stopped is not None:
            self._finish(chunk, "stop", self._output.stopped)
        elif self._ids_given >= self._sampling.max_tokens:
            chunk.text += self._output.finish()
            self._finish(chunk, "length", None)
        return chunk

    def _end_at(self, token_id: int, *, stop_reason: int | None) -> Chunk:
        text = self._output.push([token_id]) if self._sampling.include_stop else ""
        chunk = self._chunk(token_id, text + self._output.finish())
        self._finish(chunk, "stop", stop_reason)
        return chunk

    def _chunk(self, token_id: int, text: str) -> Chunk:
        self._ids_given += 1
        logprobs = None
        if self._sampling.logprobs is not None:
            logprobs = [_logprob(token_id, self._sampling.logprobs)]
        return Chunk(self._index, [token_id], text, logprobs)

    def _finish(self, chunk: Chunk, reason: FinishReason, stop_reason: int | str | None) -> None:
        chunk.finish_reason, chunk.stop_reason = reason, stop_reason
        self.finished = True


def _logprob(token_id: int, top: int) -> TokenLogprob:
    """The scripted token has half of the probability, the ids after it share the rest by halves."""
    ranked = tuple((token_id + place, -0.6931 * (place + 1)) for place in range(top))
    return TokenLogprob(token_id, -0.6931, 1, ranked)


def fake_prompt_logprobs(request: GenerateRequest) -> list[TokenLogprob | None] | None:
    top = request.sampling.prompt_logprobs
    if top is None:
        return None
    ids: Sequence[int] = request.prompt_token_ids
    return [None, *(_logprob(token_id, top) for token_id in ids[1:])]
