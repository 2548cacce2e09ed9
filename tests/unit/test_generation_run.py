"""A Generation alone: what queues up is merged, errors follow the chunks before them, the end is counted once."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from tuneloop.engines.base import GenerateRequest, SamplingParams
from tuneloop.engines.fake import FakeConfig, FakeEngine
from tuneloop.engines.fake_checkpoint import write_fake_checkpoint
from tuneloop.engines.registry import ModelLease
from tuneloop.engines.tokenizer import ChatTokenizer
from tuneloop.server.generation.run import Generation
from tuneloop.server.metrics import Metrics
from tuneloop.storage.errors import Unavailable

TEXT = "Hello from the base model."


class Bench:
    """An engine, metrics, and whether the lease came back."""

    def __init__(self, engine: FakeEngine, tokenizer: ChatTokenizer) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.metrics = Metrics()
        self.returned = 0

    def generation(self, *, prompts: int = 1, **sampling: Any) -> Generation:
        params = SamplingParams(**{"max_tokens": 50, **sampling})
        requests = [
            GenerateRequest(request_id=f"r{place}", prompt_token_ids=[5, 6, 7 + place], sampling=params)
            for place in range(prompts)
        ]
        lease = ModelLease(
            ref="tiny", base="tiny", engine=self.engine, tokenizer=self.tokenizer, info=self.engine.info, adapter=None
        )
        stack = AsyncExitStack()
        stack.callback(self._give_back)
        return Generation(lease, requests, metrics=self.metrics, stack=stack, arrived=0.0)

    def finished(self, reason: str) -> float | None:
        labels = {"model_name": "tiny", "finished_reason": reason}
        return self.metrics.registry.get_sample_value("vllm:request_success_total", labels)

    def _give_back(self) -> None:
        self.returned += 1


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    tokenizer = ChatTokenizer.load(write_fake_checkpoint(tmp_path))
    engine = FakeEngine(tokenizer, config=FakeConfig(max_num_seqs=4))
    await engine.start()
    yield Bench(engine, tokenizer)


async def test_what_queues_up_is_merged_by_row(bench: Bench) -> None:
    generation = bench.generation(n=2, logprobs=0)
    await generation.begin()
    await bench.engine.until(lambda: bench.engine.running == 0)  # all chunks are there, none was taken
    batches = [batch async for batch in generation.batches()]
    await generation.aclose()
    assert len(batches) == 1
    first, second = batches[0]
    assert (first.index, first.text, first.finish_reason) == (0, TEXT, "stop")
    assert (second.index, second.text) == (1, "Hello number 1 from the base model.")
    assert first.logprobs is not None
    assert [entry.token_id for entry in first.logprobs] == first.token_ids
    assert generation.usage.completion_tokens == len(first.token_ids) + len(second.token_ids)
    assert bench.finished("stop") == 1


async def test_rows_of_several_prompts_are_numbered_through(bench: Bench) -> None:
    generation = bench.generation(prompts=2, n=2)
    await generation.begin()
    rows = await generation.collect()
    await generation.aclose()
    assert ["".join(row.text) for row in rows][::2] == [TEXT, TEXT]
    assert generation.usage.prompt_tokens == 6
    assert generation.row_usage(3).prompt_tokens == 3


async def test_an_error_comes_after_the_chunks_before_it(bench: Bench) -> None:
    bench.engine.fail_next(Unavailable("gone"), after_tokens=3)
    generation = bench.generation()
    await generation.begin()
    seen = ""
    with pytest.raises(Unavailable, match="gone"):
        async for batch in generation.batches():
            seen += "".join(chunk.text for chunk in batch)
    await generation.aclose()
    assert seen == "Hello from the"
    assert (bench.finished("error"), bench.returned) == (1, 1)


async def test_one_failing_prompt_ends_the_others(bench: Bench) -> None:
    bench.engine.fail_next(Unavailable("gone"))
    generation = bench.generation(prompts=3, ignore_eos=True, max_tokens=1000)
    with pytest.raises(Unavailable, match="gone"):
        await generation.begin()
        await generation.collect()
    await generation.aclose()
    assert (bench.engine.running, bench.engine.waiting) == (0, 0)


async def test_closing_early_is_an_abort_and_counts_once(bench: Bench) -> None:
    generation = bench.generation()
    await generation.begin()
    await generation.aclose()
    await generation.aclose()
    assert bench.engine.cancelled == ["r0"]
    assert (bench.finished("abort"), bench.returned) == (1, 1)
    in_flight = bench.metrics.registry.get_sample_value("tuneloop:requests_in_flight", {"model_name": "tiny"})
    assert in_flight == 0
