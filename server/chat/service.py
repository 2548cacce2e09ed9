"""Answers chat completions: messages in, OpenAI's objects and events out. It knows no Starlette."""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ...engines.base import GenerateRequest
from ...engines.registry import ModelLease, ModelRegistry
from ..generation.logprobs import chat_logprobs, prompt_logprobs
from ..generation.rendering import render_messages
from ..generation.run import Generation, RowResult
from ..generation.sampling import fit_max_tokens, sampling_params
from ..generation.start import fingerprint, start_generation
from ..generation.template import check_chat_template
from ..metrics import Metrics
from .protocol import ChatCompletionRequest
from .stream import ChatEvents


class ChatService:
    """`trust_chat_template`: whether requests may bring a template of their own."""

    def __init__(
        self, registry: ModelRegistry, metrics: Metrics, *, timeout_seconds: float | None, trust_chat_template: bool
    ) -> None:
        self._registry = registry
        self._metrics = metrics
        self._timeout_seconds = timeout_seconds
        self._trust_chat_template = trust_chat_template

    async def complete(self, body: ChatCompletionRequest) -> dict[str, Any]:
        """The whole `chat.completion` object."""
        generation = await self._start(body)
        try:
            rows = await generation.collect()
        finally:
            await generation.aclose()
        return self._completion(body, generation, rows)

    async def events(self, body: ChatCompletionRequest) -> AsyncGenerator[bytes, None]:
        """The events of a stream. Everything that is wrong with the request is raised before the first one."""
        generation = await self._start(body)
        try:
            stream = ChatEvents(body, generation, request_id=_new_id(), echo=_echo(body))
            yield stream.opening()
            async for batch in generation.batches():
                if event := stream.deltas(batch):
                    yield event
            yield stream.closing()
        finally:
            await generation.aclose()

    async def _start(self, body: ChatCompletionRequest) -> Generation:
        check_chat_template(body.chat_template, trusted=self._trust_chat_template)

        async def prepare(lease: ModelLease, deadline: float | None) -> Sequence[GenerateRequest]:
            return [await _engine_request(body, lease, deadline)]

        return await start_generation(
            self._registry, self._metrics, model=body.model, timeout_seconds=self._timeout_seconds, prepare=prepare
        )

    def _completion(
        self, body: ChatCompletionRequest, generation: Generation, rows: Sequence[RowResult]
    ) -> dict[str, Any]:
        lease = generation.lease
        completion: dict[str, Any] = {
            "id": _new_id(),
            "object": "chat.completion",
            "created": int(time.time()),
            "model": body.model,
            "choices": [_choice(body, lease, index, row) for index, row in enumerate(rows)],
            "usage": generation.usage.to_wire(),
            "service_tier": "default",
            "system_fingerprint": fingerprint(lease),
        }
        if body.prompt_logprobs is not None and rows[0].prompt_logprobs is not None:
            completion["prompt_logprobs"] = prompt_logprobs(lease.tokenizer, rows[0].prompt_logprobs)
        if body.return_token_ids:
            completion["prompt_token_ids"] = list(generation.requests[0].prompt_token_ids)
        return completion


def _choice(body: ChatCompletionRequest, lease: ModelLease, index: int, row: RowResult) -> dict[str, Any]:
    logprobs = None
    if body.logprobs:
        logprobs = {"content": chat_logprobs(lease.tokenizer, row.logprobs), "refusal": None}
    choice: dict[str, Any] = {
        "index": index,
        "message": {"role": body.response_role, "content": _echo(body) + "".join(row.text), "refusal": None},
        "logprobs": logprobs,
        "finish_reason": row.finish_reason,
        "stop_reason": row.stop_reason,
    }
    if body.return_token_ids:
        choice["token_ids"] = row.token_ids
    return choice


async def _engine_request(body: ChatCompletionRequest, lease: ModelLease, deadline: float | None) -> GenerateRequest:
    prompt = await render_messages(
        lease.tokenizer,
        [message.to_template() for message in body.messages],
        add_generation_prompt=body.opens_new_message,
        continue_final_message=bool(body.continue_final_message),
        template_kwargs=body.chat_template_kwargs,
        chat_template=body.chat_template,
        add_special_tokens=bool(body.add_special_tokens),
    )
    info = lease.info
    max_tokens = fit_max_tokens(
        body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        prompt_tokens=len(prompt),
        max_model_len=info.max_model_len,
        prompt_field="messages",
    )
    sampling = sampling_params(
        body,
        info=info,
        defaults=lease.tokenizer.sampling_defaults,
        max_tokens=max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
    )
    return GenerateRequest(
        request_id=_new_id(),
        prompt_token_ids=prompt,
        sampling=sampling,
        adapter=lease.adapter,
        priority=body.priority or 0,
        deadline=deadline,
    )


def _echo(body: ChatCompletionRequest) -> str:
    """vLLM's `echo`: the last message's text in front of the answer, if the answer belongs to the same role."""
    final = body.messages[-1]
    if not body.echo or final.role != body.response_role or final.content is None:
        return ""
    return final.content if isinstance(final.content, str) else "\n".join(part["text"] for part in final.content)


def _new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"
