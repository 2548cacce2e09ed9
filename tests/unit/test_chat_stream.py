"""Chat streams: the transcript, whole characters, usage, logprobs, errors in the middle, and the official SDK."""

import json
from typing import Any

import httpx2  # the HTTP client that the official SDK brings
import openai
import pytest
from openai import AsyncOpenAI
from tuneloop.storage.errors import Unavailable

from .conftest import BASE, AppFactory, Running

HI: list[Any] = [{"role": "user", "content": "Hi"}]


async def transcript(running: Running, **fields: Any) -> list[str]:
    """The events of a stream, each without its blank line."""
    body = {"model": BASE, "messages": HI, "stream": True, **fields}
    response = await running.client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    events = response.text.split("\n\n")
    assert events.pop() == ""
    return events


def payloads(events: list[str]) -> list[dict[str, Any]]:
    return [json.loads(event.removeprefix("data: ")) for event in events if event != "data: [DONE]"]


async def test_the_transcript(running: Running) -> None:
    events = await transcript(running, max_tokens=1)
    first = json.loads(events[0].removeprefix("data: "))
    frame = (
        f'"id":"{first["id"]}","object":"chat.completion.chunk","created":{first["created"]},"model":"tiny",'
        '"service_tier":"default","system_fingerprint":"fp_tiny"'
    )
    assert events == [
        f'data: {{{frame},"choices":[{{"index":0,"delta":{{"role":"assistant","content":""}},'
        '"logprobs":null,"finish_reason":null}]}',
        f'data: {{{frame},"choices":[{{"index":0,"delta":{{"content":"Hello"}},'
        '"logprobs":null,"finish_reason":null}]}',
        f'data: {{{frame},"choices":[{{"index":0,"delta":{{}},"logprobs":null,"finish_reason":"length",'
        '"stop_reason":null}]}',
        "data: [DONE]",
    ]


@pytest.mark.parametrize(
    "fields",
    [{}, {"logprobs": True}, {"return_token_ids": True}, {"n": 2}, {"stop": "base"}, {"logprobs": True, "n": 2}],
)
async def test_the_deltas_are_the_whole_answer(running: Running, fields: dict[str, Any]) -> None:
    """The same request, streamed and not, gives the same choices."""
    response = await running.client.post("/v1/chat/completions", json={"model": BASE, "messages": HI, **fields})
    whole = response.json()["choices"]
    chunks = payloads(await transcript(running, **fields))
    for choice in whole:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
        assert parts[-1]["stop_reason"] == choice["stop_reason"]
        if choice["logprobs"]:
            content = [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]]
            assert content == choice["logprobs"]["content"]
        if "token_ids" in choice:
            assert [i for part in parts for i in part.get("token_ids", ())] == choice["token_ids"]
            assert chunks[0]["prompt_token_ids"] == response.json()["prompt_token_ids"]


async def test_usage_comes_last_if_asked_for(running: Running) -> None:
    chunks = payloads(await transcript(running, stream_options={"include_usage": True}, n=2))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {
        "prompt_tokens": 17,
        "completion_tokens": 22,
        "total_tokens": 39,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert all("usage" not in chunk for chunk in payloads(await transcript(running)))


async def test_usage_can_come_with_every_chunk(running: Running) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = payloads(await transcript(running, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 7)
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {17}


async def test_no_event_splits_a_character(app_factory: AppFactory) -> None:
    text = 'é北京🤗👩\u200d👩 "quoted" \\ \n\r\u2028 end'
    async with app_factory(reply=text) as running:
        chunks = payloads(await transcript(running))
        deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
        assert "".join(deltas) == text
        assert not any("\ufffd" in delta for delta in deltas)
        assert len(deltas) > 5


async def test_echo_comes_before_the_answer(running: Running) -> None:
    messages = [*HI, {"role": "assistant", "content": "So, "}]
    chunks = payloads(await transcript(running, messages=messages, continue_final_message=True, echo=True))
    contents = [chunk["choices"][0]["delta"].get("content") for chunk in chunks]
    assert contents[:2] == ["", "So, "]


async def test_an_error_in_the_middle_is_an_event_and_the_end(running: Running) -> None:
    running.engine.fail_next(Unavailable("The worker died."), after_tokens=2)
    events = await transcript(running)
    assert events[-1] == (
        'event: error\ndata: {"error":{"message":"The worker died.","type":"server_error","param":null,'
        '"code":"unavailable"}}'
    )
    assert running.engine.running == 0
    assert "data: [DONE]" not in events
    metrics = (await running.client.get("/metrics")).text
    assert 'vllm:request_success_total{finished_reason="error",model_name="tiny"} 1.0' in metrics


async def test_the_official_sdk_reads_it(running: Running) -> None:
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(running.app))
    client = AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http, max_retries=0)
    stream = await client.chat.completions.create(
        model=BASE,
        messages=HI,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == (
        "Hello from the base model."
    )
    assert chunks[-1].usage is not None
    running.engine.fail_next(Unavailable("The worker died."), after_tokens=2)
    with pytest.raises(openai.APIError, match="The worker died"):
        async for _ in await client.chat.completions.create(model=BASE, messages=HI, stream=True):
            pass
