"""A client that leaves, over real sockets: the engine's row is freed at once, streamed or not, queued or running."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import uvicorn
from tuneloop.engines.fake import FakeConfig

from .conftest import BASE, AppFactory, Running

BODY = {"model": BASE, "messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True}
ENDLESS = FakeConfig(max_model_len=10**6, max_num_seqs=1)


class Served:
    """An app behind uvicorn on a free port."""

    def __init__(self, running: Running, url: str) -> None:
        self.running = running
        self.engine = running.engine
        self.url = url


@pytest.fixture
async def served(app_factory: AppFactory) -> AsyncIterator[Served]:
    async with app_factory(config=ENDLESS) as running:
        await running.services.registry.load(BASE)
        config = uvicorn.Config(running.app, port=0, lifespan="off", log_config=None, timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        task = asyncio.create_task(server._serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Served(running, f"http://127.0.0.1:{port}")
        server.should_exit = True
        await task


async def gone(served: Served, count: int = 1) -> None:
    engine = served.engine
    await engine.until(lambda: len(engine.cancelled) == count and engine.running == engine.waiting == 0)


async def aborts(served: Served) -> float:
    """The requests counted as aborted."""
    text = (await served.running.client.get("/metrics")).text
    line = 'vllm:request_success_total{finished_reason="abort",model_name="tiny"} '
    return next((float(row.removeprefix(line)) for row in text.splitlines() if row.startswith(line)), 0.0)


async def test_a_stream_that_is_left_frees_its_row(served: Served) -> None:
    async with (
        httpx.AsyncClient(base_url=served.url) as client,
        client.stream("POST", "/v1/chat/completions", json={**BODY, "stream": True}) as response,
    ):
        assert response.status_code == 200
        lines = response.aiter_lines()
        assert json.loads((await anext(lines)).removeprefix("data: "))["choices"][0]["delta"]["role"] == "assistant"
        assert served.engine.running == 1
        await response.aclose()
        await gone(served)
    assert await aborts(served) == 1


async def test_a_stream_that_is_left_while_nothing_comes(served: Served) -> None:
    body = {"model": BASE, "prompt": "a", "stream": True, "ignore_eos": True, "max_tokens": 10**5}
    async with (
        httpx.AsyncClient(base_url=served.url) as client,
        client.stream("POST", "/v1/completions", json=body) as response,
    ):
        await anext(response.aiter_lines())
        with served.engine.paused():
            await response.aclose()
            await gone(served)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_is_left_before_its_first_token(served: Served, stream: bool) -> None:
    with served.engine.paused():
        async with httpx.AsyncClient(base_url=served.url) as client:
            request = asyncio.create_task(client.post("/v1/chat/completions", json={**BODY, "stream": stream}))
            await served.engine.until(lambda: served.engine.running == 1)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
        await gone(served)
    assert await aborts(served) == 1


async def test_a_request_that_is_left_in_the_queue(served: Served) -> None:
    async with httpx.AsyncClient(base_url=served.url) as client, served_stream(client) as first:
        await anext(first.aiter_lines())
        with served.engine.paused():  # an endless stream that nobody reads would leave the loop no time
            queued = asyncio.create_task(client.post("/v1/chat/completions", json=BODY))
            await served.engine.until(lambda: served.engine.waiting == 1)
            queued.cancel()
            await served.engine.until(lambda: served.engine.waiting == 0)
        assert served.engine.running == 1  # the other one goes on


async def test_an_answer_that_is_left_half_way(served: Served) -> None:
    async with httpx.AsyncClient(base_url=served.url) as client:
        request = asyncio.create_task(client.post("/v1/chat/completions", json=BODY))
        await served.engine.until(lambda: served.engine.stats().steps > 5)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        await gone(served)


async def test_keep_alive_connections_carry_one_stream_after_another(served: Served) -> None:
    limits = httpx.Limits(max_connections=1)
    async with httpx.AsyncClient(base_url=served.url, limits=limits) as client:
        for _ in range(3):
            response = await client.post("/v1/chat/completions", json={**BODY, "stream": True, "max_tokens": 5})
            assert response.text.endswith("data: [DONE]\n\n")
    assert served.engine.cancelled == []


def served_stream(client: httpx.AsyncClient) -> Any:
    return client.stream("POST", "/v1/chat/completions", json={**BODY, "stream": True})
