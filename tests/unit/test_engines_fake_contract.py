"""The fake engine keeps the Engine contract, so that what is tested with it holds for real engines."""

import asyncio
import time
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
from tuneloop.adapters.base import AdapterVersion
from tuneloop.engines.base import Chunk, GenerateRequest, SamplingParams
from tuneloop.engines.fake import FakeConfig, FakeEngine
from tuneloop.engines.fake_checkpoint import write_fake_checkpoint
from tuneloop.engines.tokenizer import ChatTokenizer
from tuneloop.storage.errors import ContextTooLong, DeadlineExceeded, InvalidInput, Overloaded, Unavailable


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer.load(write_fake_checkpoint(tmp_path_factory.mktemp("checkpoint")))


async def started(tokenizer: ChatTokenizer, reply: str = "Hello from me.", **config: Any) -> FakeEngine:
    engine = FakeEngine(tokenizer, reply=reply, config=FakeConfig(**config))
    await engine.start()
    return engine


def request(
    *, adapter: AdapterVersion | None = None, deadline: float | None = None, **sampling: Any
) -> GenerateRequest:
    params = SamplingParams(**{"max_tokens": 50, **sampling})
    return GenerateRequest(
        request_id="r", prompt_token_ids=[5, 6, 7], sampling=params, adapter=adapter, deadline=deadline
    )


def version(name: str = "support") -> AdapterVersion:
    return AdapterVersion(
        name=name,
        version=1,
        base="tiny",
        digest=f"sha256:{name}",
        path=Path(),
        rank=2,
        alpha=4,
        targets=(),
        use_dora=False,
        use_rslora=False,
        size_bytes=1,
        origin="upload",
        source=None,
        created_at=datetime.now(UTC),
    )


async def run(engine: FakeEngine, wanted: GenerateRequest) -> list[Chunk]:
    return [chunk async for chunk in engine.generate(wanted)]


def texts(chunks: list[Chunk], index: int = 0) -> str:
    return "".join(chunk.text for chunk in chunks if chunk.index == index)


async def test_a_row_ends_with_its_reply(tokenizer: ChatTokenizer) -> None:
    chunks = await run(await started(tokenizer), request())
    assert texts(chunks) == "Hello from me."
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["stop"]
    assert chunks[-1].token_ids == [tokenizer.eos_token_id]


async def test_rows_are_interleaved(tokenizer: ChatTokenizer) -> None:
    chunks = await run(await started(tokenizer), request(n=2))
    assert [chunk.index for chunk in chunks[:4]] == [0, 1, 0, 1]
    assert texts(chunks, 1) == "Hello from me."


async def test_length_stop_strings_and_stop_tokens(tokenizer: ChatTokenizer) -> None:
    engine = await started(tokenizer)
    short = await run(engine, request(max_tokens=2))
    assert (texts(short), short[-1].finish_reason) == ("Hello from", "length")
    stopped = await run(engine, request(stop=("from",)))
    assert (texts(stopped), stopped[-1].stop_reason) == ("Hello ", "from")
    token = tokenizer.encode("Hello from", add_special_tokens=False)[1]
    by_token = await run(engine, request(stop_token_ids=frozenset({token})))
    assert (texts(by_token), by_token[-1].stop_reason) == ("Hello", token)


async def test_ignore_eos_goes_on_to_the_limit(tokenizer: ChatTokenizer) -> None:
    chunks = await run(await started(tokenizer), request(ignore_eos=True, max_tokens=40))
    assert sum(len(chunk.token_ids) for chunk in chunks) == 40
    assert texts(chunks).startswith("Hello from me.Hello from me.")


async def test_logprobs_come_where_asked_for(tokenizer: ChatTokenizer) -> None:
    engine = await started(tokenizer)
    first = (await run(engine, request(logprobs=2, prompt_logprobs=1)))[0]
    assert first.logprobs is not None
    assert first.prompt_logprobs is not None
    assert [entry.token_id for entry in first.logprobs] == first.token_ids
    assert len(first.logprobs[0].top) == 2
    assert [entry and entry.token_id for entry in first.prompt_logprobs] == [None, 6, 7]


async def test_a_prompt_seen_before_is_cached_for_the_same_adapter_only(tokenizer: ChatTokenizer) -> None:
    engine = await started(tokenizer)
    seen = [(await run(engine, request(adapter=adapter)))[0].cached_tokens for adapter in (None, None, version())]
    assert seen == [0, 2, 0]
    assert engine.stats().prefix_cache_hits == 2


async def test_the_answer_names_the_adapter_version(tokenizer: ChatTokenizer) -> None:
    engine = FakeEngine(tokenizer)
    await engine.start()
    assert texts(await run(engine, request(adapter=version()))) == "Hello from support@1."
    assert engine.stats().adapters_on_device == ("sha256:support",)
    await engine.unload_adapter("sha256:support")
    assert engine.resident == {}
    engine.refuse_adapter("sha256:support", InvalidInput("unfit"))
    with pytest.raises(InvalidInput, match="unfit"):
        await run(engine, request(adapter=version()))


async def test_a_full_queue_refuses(tokenizer: ChatTokenizer) -> None:
    engine = await started(tokenizer, max_num_seqs=1, max_waiting=1)
    with engine.paused():
        tasks = [asyncio.create_task(run(engine, request())) for _ in range(2)]
        await engine.until(lambda: engine.running + engine.waiting == 2)
        with pytest.raises(Overloaded) as caught:
            await run(engine, request())
        assert caught.value.retry_after > 0
    assert [texts(chunks) for chunks in await asyncio.gather(*tasks)] == ["Hello from me."] * 2


async def test_closing_the_iterator_frees_the_row(tokenizer: ChatTokenizer) -> None:
    engine = await started(tokenizer, max_num_seqs=1)
    iterator = cast(AsyncGenerator[Chunk, None], engine.generate(request()))
    await anext(iterator)
    assert engine.running == 1
    await iterator.aclose()
    assert (engine.running, engine.cancelled) == (0, ["r"])
    assert await run(engine, request())


async def test_cancelling_while_queued_frees_the_place(tokenizer: ChatTokenizer) -> None:
    engine = await started(tokenizer, max_num_seqs=1)
    with engine.paused():
        tasks = [asyncio.create_task(run(engine, request())) for _ in range(2)]
        await engine.until(lambda: engine.waiting > 0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert (engine.running, engine.waiting) == (0, 0)
    assert await run(engine, request())


async def test_a_deadline_ends_a_row_that_runs_or_waits(tokenizer: ChatTokenizer) -> None:
    engine = await started(tokenizer, max_num_seqs=1)
    with engine.paused():
        running = asyncio.create_task(run(engine, request(deadline=time.monotonic() + 0.05)))
        await engine.until(lambda: engine.running > 0)
        with pytest.raises(DeadlineExceeded, match="queued"):
            await run(engine, request(deadline=time.monotonic()))
        with pytest.raises(DeadlineExceeded, match="could finish"):
            await running
    assert engine.running == 0


async def test_death_fails_what_runs_and_what_comes(tokenizer: ChatTokenizer) -> None:
    engine = await started(tokenizer)
    with engine.paused():
        task = asyncio.create_task(run(engine, request()))
        await engine.until(lambda: engine.running > 0)
        engine.die("killed")
        with pytest.raises(Unavailable, match="killed"):
            await task
    assert not engine.alive
    with pytest.raises(Unavailable, match="killed"):
        await run(engine, request())


async def test_planned_failures_come_after_their_tokens(tokenizer: ChatTokenizer) -> None:
    engine = await started(tokenizer)
    engine.fail_next(Unavailable("gone"), after_tokens=2)
    seen = []
    with pytest.raises(Unavailable, match="gone"):
        async for chunk in engine.generate(request()):
            seen.append(chunk)  # noqa: PERF401 - the chunks before the error are what is tested
    assert len(seen) == 2


async def test_what_does_not_fit_is_refused(tokenizer: ChatTokenizer) -> None:
    engine = await started(tokenizer, max_model_len=20)
    with pytest.raises(ContextTooLong, match="do not fit the context of 20"):
        await run(engine, request(max_tokens=30))
    with pytest.raises(InvalidInput, match="outside the vocabulary"):
        await run(engine, GenerateRequest(request_id="r", prompt_token_ids=[10**6], sampling=SamplingParams()))


async def test_an_engine_that_did_not_start_is_unavailable(tokenizer: ChatTokenizer) -> None:
    engine = FakeEngine(tokenizer, config=FakeConfig(start_error=InvalidInput("no such kernel")))
    assert not engine.alive
    with pytest.raises(InvalidInput, match="no such kernel"):
        await engine.start()
    with pytest.raises(Unavailable):
        await run(engine, request())


async def test_close_can_be_repeated(tokenizer: ChatTokenizer) -> None:
    engine = await started(tokenizer)
    await engine.close()
    await engine.close()
    assert engine.stats().rss_bytes == 0
