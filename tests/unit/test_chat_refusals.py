"""What chat completions refuse: by name, with the reason, before anything reaches the engine."""

from typing import Any

import httpx
import pytest
from tuneloop.engines.fake import FakeConfig
from tuneloop.storage.errors import DeadlineExceeded, Overloaded, Unavailable

from .conftest import BASE, AppFactory, Running

HI = {"role": "user", "content": "Hi"}


async def refused(running: Running, status: int = 400, **fields: Any) -> dict[str, Any]:
    body = {"model": BASE, "messages": [HI], **fields}
    response = await running.client.post("/v1/chat/completions", json=body)
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


UNSUPPORTED: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "functions": [{"name": "f"}],
    "function_call": "auto",
    "response_format": {"type": "json_object"},
    "structured_outputs": {"regex": "a+"},
    "guided_json": {},
    "store": True,
    "audio": {"voice": "x", "format": "wav"},
    "modalities": ["text", "audio"],
    "prediction": {"type": "content", "content": "x"},
    "reasoning_effort": "high",
    "verbosity": "low",
    "web_search_options": {},
    "documents": [{"title": "a", "text": "b"}],
    "use_beam_search": True,
    "best_of": 2,
    "bad_words": ["x"],
    "allowed_token_ids": [1],
    "logprob_token_ids": [1],
    "truncate_prompt_tokens": 5,
    "vllm_xargs": {"a": 1},
}


@pytest.mark.parametrize("name", UNSUPPORTED)
async def test_known_fields_that_cannot_be_honoured_are_refused_by_name(running: Running, name: str) -> None:
    error = await refused(running, **{name: UNSUPPORTED[name]})
    assert error["param"] == name
    assert f"'{name}'" in error["message"]
    assert running.engine.requests == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temprature": 1}, "temprature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"presence_penalty": -2.1}, "presence_penalty"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"stop": [""]}, "stop.0"),
        ({"stop": ["a"] * 33}, "stop"),
        ({"stop_token_ids": [99999]}, "stop_token_ids"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"model": None}, "model"),
        ({"model": ""}, "model"),
    ],
)
async def test_wrong_values_are_named(running: Running, fields: dict[str, Any], param: str) -> None:
    assert (await refused(running, **fields))["param"] == param
    assert running.engine.requests == []


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "robot", "content": "x"}, "Input should be 'system'"),
        ({"role": "function", "content": "x", "name": "f"}, "Input should be 'system'"),
        ({"role": "user"}, "must have content"),
        ({"role": "user", "content": None}, "must have content"),
        ({"role": "assistant"}, "must have content or tool_calls"),
        ({"role": "user", "content": 5}, "string or a list of text parts"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "'image_url' are not supported",
        ),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "'input_audio' are not supported"),
        ({"role": "user", "content": [{"type": "file", "file": {}}]}, "'file' are not supported"),
        ({"role": "user", "content": [{"type": "text"}]}, "must have its text"),
        ({"role": "user", "content": ["x"]}, "must be an object"),
        ({"role": "user", "content": "x", "mood": "calm"}, "'messages.0.mood' is not known"),
        ({"role": "user", "content": "x", "tool_call_id": "c"}, "tool_call_id"),
        ({"role": "tool", "content": "x"}, "tool_call_id"),
        (
            {"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]},
            "only assistant",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            "no place for tool calls",
        ),
    ],
)
async def test_wrong_messages_are_named(running: Running, message: dict[str, Any], reason: str) -> None:
    error = await refused(running, messages=[message])
    assert reason in error["message"]
    assert error["param"].startswith("messages")


async def test_no_messages(running: Running) -> None:
    assert (await refused(running, messages=[]))["param"] == "messages"


async def test_unknown_models_are_not_found(running: Running) -> None:
    error = await refused(running, 404, model="nobody")
    assert (error["type"], error["param"]) == ("not_found_error", "model")


async def test_what_does_not_fit_the_context_is_told_in_numbers(running: Running) -> None:
    error = await refused(running, max_tokens=2040)
    assert error["code"] == "context_length_exceeded"
    assert "2048 tokens, but you requested 2057 tokens (17 in the messages, 2040 for" in error["message"]
    error = await refused(running, messages=[{"role": "user", "content": "z" * 3000}])
    assert error["code"] == "context_length_exceeded"
    assert "leaves no room for a completion" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_queue_is_429_with_retry_after(app_factory: AppFactory, stream: bool) -> None:
    async with app_factory(config=FakeConfig(max_num_seqs=0, max_waiting=0)) as running:
        body = {"model": BASE, "messages": [HI], "stream": stream}
        response = await running.client.post("/v1/chat/completions", json=body)
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (Unavailable("The worker died."), 503),
        (DeadlineExceeded("Too late."), 504),
        (Overloaded("Full.", retry_after=2.4), 429),
    ],
)
async def test_failures_before_the_first_token_have_their_status(
    running: Running, stream: bool, failure: Any, status: int
) -> None:
    running.engine.fail_next(failure)
    error = await refused(running, status, stream=stream)
    assert error["message"] == failure.message
    assert running.engine.running == 0


async def test_a_deadline_ends_a_request_that_waits(app_factory: AppFactory) -> None:
    async with app_factory(request_timeout_seconds=0.1) as running:
        await running.services.registry.load(BASE)
        with running.engine.paused():
            error = await refused(running, 504)
        assert error["code"] == "deadline_exceeded"


async def test_a_failure_in_the_middle_is_no_half_answer(running: Running) -> None:
    running.engine.fail_next(Unavailable("The worker died."), after_tokens=3)
    assert (await refused(running, 503))["message"] == "The worker died."


async def test_bodies_that_are_no_objects(running: Running) -> None:
    for content in (b"[]", b"{", b'"x"', b""):
        response: httpx.Response = await running.client.post(
            "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
        )
        assert response.status_code == 400, response.text
        assert response.json()["error"]["type"] == "invalid_request_error"
