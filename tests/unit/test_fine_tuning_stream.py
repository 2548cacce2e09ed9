"""A job's live event stream over real sockets, its curves and its log."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from tuneloop.finetune.jobs.records import JobEvent
from tuneloop.finetune.jobs.service import JobService
from tuneloop.server.fine_tuning.log_tail import tail

from .conftest import AppFactory, MakeAdapter
from .fine_tuning_support import Tuning, open_tuning, quicken


@pytest.fixture
async def tuning(app_factory: AppFactory, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Tuning]:
    quicken(monkeypatch)
    monkeypatch.setattr("tuneloop.server.fine_tuning.events_stream._LOOK_SECONDS", 0.02)
    async with open_tuning(app_factory) as tuning:
        yield tuning


@pytest.fixture
async def client(tuning: Tuning) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app behind uvicorn, since a transport inside the process would wait for the stream's end."""
    config = uvicorn.Config(tuning.running.app, port=0, lifespan="off", log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        yield client
    server.should_exit = True
    await task


@asynccontextmanager
async def stream(client: httpx.AsyncClient, job: str, query: str = "", **headers: str) -> AsyncIterator[Any]:
    """The events as `(id, data)`, `[DONE]` as `(None, "[DONE]")`."""
    url = f"/v1/fine_tuning/jobs/{job}/events/stream{query}"
    async with client.stream("GET", url, headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        yield events(response)


async def events(response: httpx.Response) -> AsyncGenerator[tuple[int | None, Any], None]:
    number: int | None = None
    async for line in response.aiter_lines():
        if line.startswith("id: "):
            number = int(line.removeprefix("id: "))
        elif line == "data: [DONE]":
            yield None, "[DONE]"
        elif line.startswith("data: "):
            yield number, json.loads(line.removeprefix("data: "))


async def test_what_happened_then_what_happens_then_the_end(
    tuning: Tuning, client: httpx.AsyncClient, make_adapter: MakeAdapter
) -> None:
    job = await tuning.create()
    trainer = await tuning.launcher.trainer()
    async with stream(client, job.id) as found:
        first = [await anext(found) for _ in range(2)]
        trainer.write("started", step=0, total_steps=4)
        trainer.step(1, 2.0)
        live = [await anext(found) for _ in range(2)]
        trainer.succeed(make_adapter(1))
        rest = [event async for event in found]
    received = [*first, *live, *rest]
    assert [number for number, _ in received] == [1, 2, 3, 4, 5, 6, None]
    assert received[-1][1] == "[DONE]"
    assert received[0][1]["message"] == f"Created fine-tuning job: {job.id}"
    listed = [event.id async for event in tuning.sdk.fine_tuning.jobs.list_events(job.id)]
    assert [data["id"] for _, data in received[:-1]] == listed[::-1]

    # Coming back: by the header, by the parameter, behind the last one, and by OpenAI's path.
    async with stream(client, job.id, **{"Last-Event-ID": "4"}) as found:
        assert [number async for number, _ in found] == [5, 6, None]
    async with stream(client, job.id, "?after_seq=5", **{"Last-Event-ID": "1"}) as found:
        assert [number async for number, _ in found] == [6, None]
    async with stream(client, job.id, "?after_seq=6") as found:
        assert [number async for number, _ in found] == [None]
    whole = await client.get(f"/v1/fine_tuning/jobs/{job.id}/events?stream=true")
    assert whole.text.startswith("retry: 1000\n\nid: 1\ndata: {")
    assert whole.text.endswith("\n\ndata: [DONE]\n\n")


async def test_the_headers_come_before_anything_happens(tuning: Tuning, client: httpx.AsyncClient) -> None:
    job = await tuning.create()
    await tuning.launcher.trainer()
    async with stream(client, job.id, "?after_seq=100") as found, asyncio.timeout(5):
        task = asyncio.create_task(anext(found))
        await asyncio.sleep(0.1)
        assert not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize(("query", "header", "param"), [
    ("?after_seq=-1", "", "after_seq"), ("?after_seq=x", "", "after_seq"), ("", "abc", "Last-Event-ID"),
])  # fmt: skip
async def test_a_place_that_is_none_is_refused(tuning: Tuning, query: str, header: str, param: str) -> None:
    job = await tuning.create()
    response = await tuning.running.client.get(
        f"/v1/fine_tuning/jobs/{job.id}/events/stream{query}", headers={"Last-Event-ID": header}
    )
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_a_client_that_leaves_is_followed_no_more(
    tuning: Tuning, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = asyncio.Event()
    follow = JobService.follow

    async def watched(self: JobService, job_id: str, *, after_seq: int = 0) -> AsyncGenerator[JobEvent, None]:
        try:
            async for event in follow(self, job_id, after_seq=after_seq):
                yield event
        finally:
            closed.set()

    monkeypatch.setattr(JobService, "follow", watched)
    job = await tuning.create()
    await tuning.launcher.trainer()
    async with stream(client, job.id) as found:
        await anext(found)
        assert not closed.is_set()
    async with asyncio.timeout(5):
        await closed.wait()
    assert (await tuning.running.services.jobs.get(job.id)).state == "running"  # nothing depends on who looks


async def test_a_server_that_shuts_down_does_not_wait_for_watchers(tuning: Tuning, client: httpx.AsyncClient) -> None:
    job = await tuning.create()
    await tuning.launcher.trainer()
    async with stream(client, job.id) as found:
        await anext(found)
        tuning.running.services.drain.begin()
        rest = [data async for _, data in found]
    assert "[DONE]" not in rest  # the job goes on: the client is to come back


async def test_curves_have_one_point_a_step(tuning: Tuning) -> None:
    job = await tuning.create()
    path = f"/v1/fine_tuning/jobs/{job.id}/metrics"
    assert (await tuning.get(path))["series"] == {}
    trainer = await tuning.launcher.trainer()
    trainer.write("started", step=0, total_steps=4)
    trainer.write("metrics", step=1, train_loss=3.0, epoch=0.5)
    trainer.write("metrics", step=2, train_loss=2.5, epoch=1.0)
    trainer.write("metrics", step=2, train_loss=2.0, epoch=1.0)  # computed again after a crash
    trainer.write("metrics", step=2, valid_loss=2.2)
    trainer.write("metrics", step=3, train_loss=float("inf"))
    series: dict[str, Any] = {}
    while series.get("train_loss", {}).get("step") != [1, 2, 3]:
        series = (await tuning.get(path))["series"]
    assert series == {
        "train_loss": {"step": [1, 2, 3], "value": [3.0, 2.0, None]},
        "epoch": {"step": [1, 2], "value": [0.5, 1.0]},
        "valid_loss": {"step": [2], "value": [2.2]},
    }


async def test_the_log_is_told_from_its_end(tuning: Tuning) -> None:
    job = await tuning.create()
    path = f"/v1/fine_tuning/jobs/{job.id}/log"
    assert (await tuning.running.client.get(path)).text == ""
    trainer = await tuning.launcher.trainer()
    trainer.run.log.write_text("".join(f"line {n}\n" for n in range(1000)))
    response = await tuning.running.client.get(path)
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert response.text.splitlines() == [f"line {n}" for n in range(800, 1000)]
    assert (await tuning.running.client.get(f"{path}?tail=1")).text == "line 999\n"
    assert (await tuning.running.client.get(f"{path}?tail=0")).status_code == 400


def test_a_tail_reads_blocks_from_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuneloop.server.fine_tuning.log_tail._BLOCK_BYTES", 7)
    path = tmp_path / "log.txt"
    assert tail(path, 5) == ""
    for text, lines, kept in (
        ("", 3, ""),
        ("a\nbb\nccc\n", 2, "bb\nccc\n"),
        ("a\nbb\nccc", 2, "bb\nccc"),
        ("a\nbb\nccc\n", 9, "a\nbb\nccc\n"),
        ("ü" * 10 + "\nend\n", 2, "ü" * 10 + "\nend\n"),
    ):
        path.write_text(text, "utf-8")
        assert tail(path, lines) == kept
    path.write_bytes(b"\xff\n")
    assert tail(path, 1) == "\ufffd\n"


def test_a_tail_of_one_endless_line_stays_small(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(b"x" * (6 << 20))
    assert 4 << 20 <= len(tail(path, 10)) <= (4 << 20) + (64 << 10)
