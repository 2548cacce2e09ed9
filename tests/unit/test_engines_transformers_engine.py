"""The engine over a real worker process: text, stops, aborts, deaths and what is left behind (nothing)."""

import asyncio
import json
import os
import signal
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
import transformers as hf
from tuneloop.adapters.base import AdapterVersion
from tuneloop.engines.base import Chunk, GenerateRequest, SamplingParams
from tuneloop.engines.fake_checkpoint import write_fake_checkpoint
from tuneloop.engines.tokenizer import ChatTokenizer
from tuneloop.engines.transformers import TransformersConfig, TransformersEngine
from tuneloop.storage.errors import ContextTooLong, InvalidInput, Overloaded, TuneloopError, Unavailable

from tests.support.engine import TINY, make_checkpoint, temporary_folder

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT = [40, 41, 42, 43, 44]


@cache
def served_checkpoint() -> tuple[Path, ChatTokenizer]:
    """A tiny random model with a real tokenizer of its vocabulary."""
    folder = write_fake_checkpoint(temporary_folder() / "served")
    tokenizer = ChatTokenizer.load(folder)
    config = hf.LlamaConfig(**{**TINY, "vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_token_id})
    return make_checkpoint(config, folder), tokenizer


def make_engine(path: Path | None = None, **settings: Any) -> TransformersEngine:
    folder, tokenizer = served_checkpoint()
    small = {"threads": 1, "kv_cache_bytes": 1 << 24, "weights": "float32"}
    return TransformersEngine(path or folder, tokenizer, TransformersConfig(**{**small, **settings}))


def request(name: str, max_tokens: int = 12, **sampling: Any) -> GenerateRequest:
    fields = {"temperature": 0.0, "ignore_eos": True, "max_tokens": max_tokens, **sampling}
    return GenerateRequest(request_id=name, prompt_token_ids=PROMPT, sampling=SamplingParams(**fields))


@dataclass
class Said:
    """All that one request's iterator gave, by row."""

    text: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    ids: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    last: dict[int, Chunk] = field(default_factory=dict)
    chunks: list[Chunk] = field(default_factory=list)


async def collect(engine: TransformersEngine, wanted: GenerateRequest) -> Said:
    said = Said()
    async for chunk in engine.generate(wanted):
        assert chunk.index not in said.last or said.last[chunk.index].finish_reason is None, "nothing after the end"
        said.text[chunk.index] += chunk.text
        said.ids[chunk.index] += chunk.token_ids
        said.last[chunk.index] = chunk
        said.chunks.append(chunk)
    return said


async def settles(condition: Any) -> None:
    """Wait for what a worker tells within its next reports."""
    for _ in range(600):
        if condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it did not come about")


async def begun(engine: TransformersEngine, count: int) -> list[AsyncGenerator[Chunk, None]]:
    streams = [engine.generate(request(f"long{i}", 400)) for i in range(count)]
    await asyncio.gather(*(anext(s) for s in streams))
    return streams


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[TransformersEngine]:
    running = make_engine()
    await running.start()
    yield running
    await running.close()


async def test_what_the_model_is(engine: TransformersEngine) -> None:
    info = engine.info
    _, tokenizer = served_checkpoint()
    assert (info.max_model_len, info.vocab_size, info.device) == (512, tokenizer.vocab_size, "cpu")
    assert info.eos_token_ids == {tokenizer.eos_token_id}
    shape = info.modules["model.layers.0.mlp.down_proj"]
    assert (shape.in_features, shape.out_features) == (64, 48)
    assert info.pid is not None and psutil.Process(info.pid).parent() == psutil.Process()
    assert engine.alive


async def test_text_and_tokens_agree(engine: TransformersEngine) -> None:
    _, tokenizer = served_checkpoint()
    said = await collect(engine, request("plain"))
    assert len(said.ids[0]) == 12 and said.last[0].finish_reason == "length"
    whole = tokenizer.decode([*PROMPT, *said.ids[0]], skip_special_tokens=True)
    assert whole == tokenizer.decode(PROMPT, skip_special_tokens=True) + said.text[0]


async def test_streams_side_by_side_give_what_each_gives_alone(engine: TransformersEngine) -> None:
    alone = [await collect(engine, request(f"alone{n}", n, seed=n, temperature=1.0)) for n in (1, 5, 30)]
    together = await asyncio.gather(
        *(collect(engine, request(f"beside{n}", n, seed=n, temperature=1.0)) for n in (1, 5, 30))
    )
    assert [t.ids for t in together] == [a.ids for a in alone]


async def test_a_stop_string_across_tokens_ends_the_row_and_stays_out(engine: TransformersEngine) -> None:
    free = await collect(engine, request("free", 30))
    text = free.text[0]
    ends = [0]
    for chunk in free.chunks:
        ends.append(ends[-1] + len(chunk.text))
    # from the middle of one token's text into a later one's
    start = next(i for i in range(3, len(text) - 4) if i + 2 in ends and text.find(text[i : i + 4]) == i)
    stop = text[start : start + 4]
    said = await collect(engine, request("stopped", 30, stop=(stop,)))
    assert (said.text[0], said.last[0].finish_reason, said.last[0].stop_reason) == (text[:start], "stop", stop)
    kept = await collect(engine, request("kept", 30, stop=(stop,), include_stop=True))
    assert kept.text[0] == text[: start + 4]
    await settles(lambda: engine.stats().running == 0)


async def test_stop_tokens_and_the_end_token(engine: TransformersEngine) -> None:
    free = await collect(engine, request("free", 30))
    token = free.ids[0][7]
    first = free.ids[0].index(token)
    said = await collect(engine, request("token", 30, stop_token_ids=frozenset({token})))
    assert (said.last[0].finish_reason, said.last[0].stop_reason) == ("stop", token)
    assert said.ids[0] == free.ids[0][: first + 1]
    later = await collect(engine, request("later", 30, stop_token_ids=frozenset({token}), min_tokens=first + 1))
    assert len(later.ids[0]) > first + 1
    eos = served_checkpoint()[1].eos_token_id
    assert eos is not None
    ended = await collect(engine, request("ended", 30, ignore_eos=False, logit_bias={eos: 100.0}, min_tokens=3))
    assert (len(ended.ids[0]), ended.last[0].finish_reason, ended.last[0].stop_reason) == (4, "stop", None)


async def test_several_completions_with_their_own_seeds(engine: TransformersEngine) -> None:
    said = await collect(engine, request("n", 12, n=3, temperature=1.0, seed=4, logprobs=2, prompt_logprobs=1))
    assert set(said.last) == {0, 1, 2} and len({tuple(v) for v in said.ids.values()}) == 3
    again = await collect(engine, request("again", 12, n=3, temperature=1.0, seed=4))
    assert again.ids == said.ids
    prompts = [c.prompt_logprobs for c in said.chunks if c.prompt_logprobs is not None]
    assert len(prompts) == 1 and prompts[0][0] is None and len(prompts[0]) == len(PROMPT)
    assert all(c.logprobs is not None and len(c.logprobs[0].top) == 2 for c in said.chunks)


async def test_closing_the_iterator_frees_the_rows(engine: TransformersEngine) -> None:
    for stream in await begun(engine, 3):  # they may be through before the worker tells that they run
        await stream.aclose()
    await settles(lambda: engine.stats().running == 0)
    assert engine.stats().kv_cache_usage == 0


async def test_a_cancelled_reader_frees_the_rows(engine: TransformersEngine) -> None:
    [stream] = await begun(engine, 1)  # it may be through before the worker tells that it runs

    async def read_on() -> None:
        async for _ in stream:
            pass

    task = asyncio.create_task(read_on())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await settles(lambda: engine.stats().running == 0)


@pytest.mark.parametrize(
    ("wrong", "kind", "words"),
    [
        (request("w", 510), ContextTooLong, "515 were asked for"),
        (request("w", logit_bias={99_999: 1.0}), InvalidInput, "Token id 99999"),
        (request("w", stop_token_ids=frozenset({99_999}), min_tokens=3), InvalidInput, "Token id 99999"),
        (request("w", 0), InvalidInput, "at least one token"),
        (
            GenerateRequest(request_id="w", prompt_token_ids=[1, 99_999], sampling=SamplingParams()),
            InvalidInput,
            "Token id 99999",
        ),
        (GenerateRequest(request_id="w", prompt_token_ids=[], sampling=SamplingParams()), InvalidInput, "no tokens"),
    ],
)
async def test_what_cannot_be_served_is_refused_and_ends_nothing(
    engine: TransformersEngine, wrong: GenerateRequest, kind: type[TuneloopError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        await collect(engine, wrong)
    assert len((await collect(engine, request("after", 2))).ids[0]) == 2


async def test_an_id_in_use_is_refused_and_its_owner_goes_on(engine: TransformersEngine) -> None:
    async with aclosing(engine.generate(request("twin", 50))) as first:
        await anext(first)
        with pytest.raises(InvalidInput, match="in use"):
            await collect(engine, request("twin"))
        assert sum([1 async for _ in first]) == 49


def version_at(folder: Path) -> AdapterVersion:
    return AdapterVersion(
        name="a",
        version=1,
        base="tiny",
        digest="sha256:a",
        path=folder,
        rank=4,
        alpha=8,
        targets=(),
        use_dora=False,
        use_rslora=False,
        size_bytes=1,
        origin="path",
        source=None,
        created_at=datetime.now(UTC),
    )


async def test_an_adapter_that_cannot_be_read_is_refused(engine: TransformersEngine, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be read"):
        await engine.load_adapter(version_at(tmp_path))
    await engine.unload_adapter("sha256:a")
    wanted = GenerateRequest(
        request_id="a", prompt_token_ids=PROMPT, sampling=SamplingParams(), adapter=version_at(tmp_path)
    )
    with pytest.raises(InvalidInput, match="cannot be read"):
        await collect(engine, wanted)


async def test_a_killed_worker_fails_all_streams_and_leaves_nothing() -> None:
    before = psutil.Process().num_fds()
    dying = make_engine(max_waiting=6)
    info = await dying.start()
    assert info.pid is not None
    streams = await begun(dying, 6)
    loads = asyncio.create_task(dying.load_adapter(version_at(Path("/nowhere"))))
    rest = [asyncio.create_task(_drain(s)) for s in streams]
    os.kill(info.pid, signal.SIGKILL)
    for outcome in await asyncio.gather(*rest, return_exceptions=True):
        assert isinstance(outcome, Unavailable) and "SIGKILL" in outcome.message
    with pytest.raises(TuneloopError):
        await loads
    assert not dying.alive
    for call in (collect(dying, request("late")), dying.unload_adapter("sha256:a")):
        with pytest.raises(Unavailable, match="SIGKILL"):
            await call
    await dying.close()
    await dying.close()
    assert not psutil.pid_exists(info.pid)
    await settles(lambda: psutil.Process().num_fds() <= before)


async def _drain(stream: AsyncGenerator[Chunk, None]) -> None:
    async for _ in stream:
        pass


async def test_closing_ends_the_process_and_the_streams() -> None:
    closing = make_engine(max_waiting=2, max_num_seqs=2)
    info = await closing.start()
    assert info.pid is not None
    process = psutil.Process(info.pid)
    streams = await begun(closing, 2)
    waiting = [asyncio.create_task(collect(closing, request(f"wait{i}"))) for i in range(4)]
    done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert isinstance(next(iter(done)).exception(), Overloaded)
    await closing.close()
    for stream in streams:
        with pytest.raises(Unavailable, match="it was stopped"):
            await _drain(stream)
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(o) for o in outcomes} == {Overloaded, Unavailable}
    assert not process.is_running()


async def test_a_checkpoint_without_all_weights_is_refused_with_the_reason(tmp_path: Path) -> None:
    folder, _ = served_checkpoint()
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    config = json.loads((folder / "config.json").read_text())
    deeper = {**config, "num_hidden_layers": config["num_hidden_layers"] + 1}
    deeper.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(deeper))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    broken = make_engine(tmp_path)
    with pytest.raises(InvalidInput, match=r"lacks \d+ weights of its model, model\.layers\.3"):
        await broken.start()
    assert not broken.alive
    with pytest.raises(Unavailable):
        await collect(broken, request("r"))


async def test_an_engine_that_was_never_started_says_so() -> None:
    idle = make_engine()
    assert not idle.alive
    with pytest.raises(Unavailable, match="was not started"):
        await collect(idle, request("r"))
    await idle.close()
