"""The events of a chat stream: role first, content deltas, one finish chunk a choice, usage if asked, `[DONE]`.

A token costs one string escape and a few concatenations: what is the same in all chunks is encoded once. It knows
no engine beyond its chunks, and no Starlette.
"""

import time
from collections.abc import Sequence
from typing import Any

from ...engines.base import Chunk
from ..generation.logprobs import chat_logprobs
from ..generation.run import Generation
from ..generation.start import fingerprint
from ..sse import DONE, data_event, encode_json
from .protocol import ChatCompletionRequest


class ChatEvents:
    """Makes the events of one stream, in the order `opening`, `deltas` (any number), `closing`. `echo` comes first."""

    def __init__(self, body: ChatCompletionRequest, generation: Generation, *, request_id: str, echo: str) -> None:
        self._body = body
        self._generation = generation
        self._echo = echo
        self._frame: dict[str, Any] = {
            "id": request_id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": body.model,
            "service_tier": "default",
            "system_fingerprint": fingerprint(generation.lease),
        }
        self._before = b"data: " + encode_json(self._frame)[:-1] + b',"choices":[{"index":'
        # OpenAI's chunks say `"usage":null` where a usage chunk will follow, and nothing where none was asked for.
        self._after = b'}],"usage":null}\n\n' if body.wants_usage else b"}]}\n\n"
        self._plain = not (body.logprobs or body.return_token_ids or body.wants_continuous_usage)

    def opening(self) -> bytes:
        """A chunk with the role for each choice, and one with what is echoed."""
        role = {"role": self._body.response_role, "content": ""}
        events = []
        for index in range(self._generation.row_count):
            extra = {}
            if self._body.return_token_ids and index == 0:
                extra["prompt_token_ids"] = list(self._generation.requests[0].prompt_token_ids)
            events.append(self._chunk(index, role, extra=extra))
            if self._echo:
                events.append(self._chunk(index, {"content": self._echo}))
        return b"".join(events)

    def deltas(self, batch: Sequence[Chunk]) -> bytes:
        """The events of a batch; empty if nothing in it is to be shown yet."""
        return b"".join([self._delta(chunk) for chunk in batch])

    def closing(self) -> bytes:
        if not self._body.wants_usage:
            return DONE
        return data_event({**self._frame, "choices": [], "usage": self._generation.usage.to_wire()}) + DONE

    def _delta(self, chunk: Chunk) -> bytes:
        event = b""
        if self._plain:
            if chunk.text:
                event = b'%b%d,"delta":{"content":%b},"logprobs":null,"finish_reason":null%b' % (
                    self._before,
                    chunk.index,
                    encode_json(chunk.text),
                    self._after,
                )
        elif chunk.text or chunk.token_ids:
            event = self._chunk(chunk.index, {"content": chunk.text}, gained=chunk)
        if chunk.finish_reason is not None:
            event += self._chunk(chunk.index, {}, finished=chunk)
        return event

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        gained: Chunk | None = None,
        finished: Chunk | None = None,
        extra: dict[str, Any] | None = None,
    ) -> bytes:
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        if gained is not None and self._body.logprobs:
            content = chat_logprobs(self._generation.lease.tokenizer, gained.logprobs or ())
            choice["logprobs"] = {"content": content, "refusal": None}
        if gained is not None and self._body.return_token_ids:
            choice["token_ids"] = gained.token_ids
        if finished is not None:
            choice["finish_reason"], choice["stop_reason"] = finished.finish_reason, finished.stop_reason
        payload = {**self._frame, "choices": [choice], **(extra or {})}
        if self._body.wants_continuous_usage:
            payload["usage"] = self._generation.row_usage(index).to_wire()
        elif self._body.wants_usage:
            payload["usage"] = None
        return data_event(payload)
