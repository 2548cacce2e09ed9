"""Completion streams: several prompts at once, echo, logprobs that go on from chunk to chunk, usage, errors."""

import json
from typing import Any

import pytest
from tuneloop.storage.errors import Unavailable

from .conftest import BASE, Running


async def chunks(running: Running, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": BASE, "prompt": ["Hello", [288, 290]], "stream": True, **fields}
    response = await running.client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 2},
        {"echo": True},
        {"logprobs": 1},
        {"echo": True, "logprobs": 1, "n": 2},
        {"echo": True, "logprobs": 1, "max_tokens": 0},
        {"return_token_ids": True},
        {"stop": " base"},
    ],
)
async def test_the_chunks_are_the_whole_answer(running: Running, fields: dict[str, Any]) -> None:
    body = {"model": BASE, "prompt": ["Hello", [288, 290]], **fields}
    whole = (await running.client.post("/v1/completions", json=body)).json()["choices"]
    streamed = await chunks(running, **fields)
    for choice in whole:
        parts = [part for chunk in streamed for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
        assert parts[-1]["stop_reason"] == choice["stop_reason"]
        if choice["logprobs"]:
            for name, expected in choice["logprobs"].items():
                assert [entry for part in parts for entry in part["logprobs"][name]] == expected
        if "token_ids" in choice:
            assert [i for part in parts for i in part["token_ids"]] == choice["token_ids"]
            assert parts[0]["prompt_token_ids"] == choice["prompt_token_ids"]


async def test_all_chunks_share_a_frame(running: Running) -> None:
    streamed = await chunks(running)
    frames = {tuple((name, chunk[name]) for name in ("id", "object", "created", "model")) for chunk in streamed}
    assert len(frames) == 1
    assert streamed[0]["object"] == "text_completion"


async def test_usage_sums_over_the_prompts(running: Running) -> None:
    streamed = await chunks(running, stream_options={"include_usage": True})
    assert streamed[-1]["choices"] == []
    assert streamed[-1]["usage"]["prompt_tokens"] == 3
    assert streamed[-1]["usage"]["completion_tokens"] == 14
    assert all(chunk["usage"] is None for chunk in streamed[:-1])
    options = {"include_usage": True, "continuous_usage_stats": True}
    last = [chunk for chunk in await chunks(running, stream_options=options) if chunk["choices"]][-1]
    assert last["usage"]["completion_tokens"] == 7  # of its own row


async def test_one_failing_prompt_ends_the_stream(running: Running) -> None:
    running.engine.fail_next(Unavailable("The worker died."), after_tokens=3)
    body = {"model": BASE, "prompt": ["Hello", "Hello"], "stream": True}
    response = await running.client.post("/v1/completions", json=body)
    assert response.text.split("\n\n")[-2].startswith("event: error\ndata: ")
    assert running.engine.running == 0
