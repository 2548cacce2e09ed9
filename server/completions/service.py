"""Answers completions: prompts in, OpenAI's objects and events out. It knows no Starlette."""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ...engines.base import GenerateRequest
from ...engines.registry import ModelLease, ModelRegistry
from ...storage.errors import InvalidInput
from ..generation.logprobs import prompt_logprobs
from ..generation.rendering import encode_text
from ..generation.run import Generation, RowResult
from ..generation.sampling import fit_max_tokens, sampling_params
from ..generation.start import fingerprint, start_generation
from ..metrics import Metrics
from ..sse import DONE, data_event
from .protocol import CompletionRequest
from .rows import RowWriter

DEFAULT_MAX_TOKENS = 16  # OpenAI's for this endpoint


class CompletionService:
    def __init__(self, registry: ModelRegistry, metrics: Metrics, *, timeout_seconds: float | None) -> None:
        self._registry = registry
        self._metrics = metrics
        self._timeout_seconds = timeout_seconds

    async def complete(self, body: CompletionRequest) -> dict[str, Any]:
        """The whole `text_completion` object."""
        generation = await self._start(body)
        try:
            rows = await generation.collect()
        finally:
            await generation.aclose()
        choices = [
            _choice(body, generation, writer, row) for writer, row in zip(_writers(body, generation), rows, strict=True)
        ]
        return {**_frame(body, generation), "choices": choices, "usage": _usage(body, generation)}

    async def events(self, body: CompletionRequest) -> AsyncGenerator[bytes, None]:
        """The events of a stream. Everything that is wrong with the request is raised before the first one."""
        generation = await self._start(body)
        try:
            frame, writers = _frame(body, generation), _writers(body, generation)
            async for batch in generation.batches():
                events = []
                for chunk in batch:
                    writer = writers[chunk.index]
                    choice = writer.delta(chunk)
                    if choice is None:
                        continue
                    payload = {**frame, "choices": [choice]}
                    if body.wants_continuous_usage:
                        payload["usage"] = generation.row_usage(chunk.index).to_wire()
                    elif body.wants_usage:
                        payload["usage"] = None
                    events.append(data_event(payload))
                if events:
                    yield b"".join(events)
            if body.wants_usage:
                yield data_event({**frame, "choices": [], "usage": _usage(body, generation)}) + DONE
            else:
                yield DONE
        finally:
            await generation.aclose()

    async def _start(self, body: CompletionRequest) -> Generation:
        async def prepare(lease: ModelLease, deadline: float | None) -> Sequence[GenerateRequest]:
            return [await _engine_request(body, prompt, lease, deadline) for prompt in body.prompt]

        return await start_generation(
            self._registry, self._metrics, model=body.model, timeout_seconds=self._timeout_seconds, prepare=prepare
        )


def _frame(body: CompletionRequest, generation: Generation) -> dict[str, Any]:
    return {
        "id": _new_id(),
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": fingerprint(generation.lease),
    }


def _writers(body: CompletionRequest, generation: Generation) -> list[RowWriter]:
    return [
        RowWriter(
            body, generation.lease.tokenizer, index, body.prompt[place], generation.requests[place].prompt_token_ids
        )
        for index in range(generation.row_count)
        for place in (index // generation.rows_per_prompt,)
    ]


def _choice(body: CompletionRequest, generation: Generation, writer: RowWriter, row: RowResult) -> dict[str, Any]:
    choice = writer.whole(row)
    if body.prompt_logprobs is not None and row.prompt_logprobs is not None:
        choice["prompt_logprobs"] = prompt_logprobs(generation.lease.tokenizer, row.prompt_logprobs)
    return choice


def _usage(body: CompletionRequest, generation: Generation) -> dict[str, Any]:
    usage = generation.usage
    if body.only_echoes:
        usage.completion_tokens = 0  # the engine had to sample one token; it was not asked for
    return usage.to_wire()


async def _engine_request(
    body: CompletionRequest, prompt: str | list[int], lease: ModelLease, deadline: float | None
) -> GenerateRequest:
    info = lease.info
    if isinstance(prompt, str):
        ids = await encode_text(lease.tokenizer, prompt, add_special_tokens=body.add_special_tokens is not False)
    else:
        ids = prompt
    _check_prompt(ids, info.vocab_size)
    max_tokens = fit_max_tokens(
        body.max_tokens,
        prompt_tokens=len(ids),
        max_model_len=info.max_model_len,
        default=DEFAULT_MAX_TOKENS,
        prompt_field="prompt",
    )
    wanted = [count for count in (body.prompt_logprobs, body.logprobs if body.echo else None) if count is not None]
    sampling = sampling_params(
        body,
        info=info,
        defaults=lease.tokenizer.sampling_defaults,
        max_tokens=max(max_tokens, 1),
        logprobs=body.logprobs,
        prompt_logprobs=max(wanted, default=None),
    )
    return GenerateRequest(
        request_id=_new_id(),
        prompt_token_ids=ids,
        sampling=sampling,
        adapter=lease.adapter,
        priority=body.priority or 0,
        deadline=deadline,
    )


def _check_prompt(ids: Sequence[int], vocab_size: int) -> None:
    if not ids:
        raise InvalidInput("A prompt is empty; send at least one token of text.", param="prompt")
    if max(ids) >= vocab_size:
        raise InvalidInput(
            f"The prompt has the token id {max(ids)}, but this model's ids are 0 to {vocab_size - 1}.", param="prompt"
        )


def _new_id() -> str:
    return f"cmpl-{uuid.uuid4().hex}"
