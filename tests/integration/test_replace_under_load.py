"""Adapters replaced while 32 streams use them: nothing fails, and every answer is wholly of one version."""

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count

import httpx
from openai import AsyncOpenAI
from tuneloop.adapters.base import ModuleShape

from .conftest import Forcing
from .peft_files import random_adapter
from .serving import MODEL, PATIENCE_SECONDS, Server, chat, wait_for

ADAPTERS = 8
STREAMS = 32
REPLACEMENTS = 50
TOKENS = 6


@dataclass
class Replaced:
    """One adapter's versions: the word that each forces, how many were sent, and how many are answered as live."""

    name: str
    words: list[str] = field(default_factory=list)  # version 1 first
    sent: int = 0
    live: int = 0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a request got; `first` and `last` bound the versions that were live at some time while it ran."""

    adapter: Replaced
    text: str
    finish_reason: str | None
    version: int
    first: int
    last: int


async def publish(http: httpx.AsyncClient, adapter: Replaced, forcing: Forcing, word: str) -> None:
    """A new version that says `word`, with ranks 1 to 8 in turn."""
    files = {"file": ("adapter.tar.gz", forcing(word, rank=1 + len(adapter.words) % 8).tar_gz())}
    adapter.words.append(word)
    adapter.sent += 1
    if adapter.sent == 1:
        answer = await http.post("/v1/adapters", data={"name": adapter.name, "base": MODEL}, files=files)
    else:
        answer = await http.put(f"/v1/adapters/{adapter.name}", files=files)
    assert answer.status_code == 200, answer.text
    assert answer.json()["version"] == adapter.sent
    adapter.live = adapter.sent


async def ask(client: AsyncOpenAI, adapter: Replaced, number: int) -> Answer:
    """One stream. Every other one has a prompt of its own, the rest may share each other's prefix."""
    prompt = "What is the capital of France?" if number % 2 else f"What is the number after {number}?"
    first = adapter.live
    stream = await client.chat.completions.create(
        **chat(prompt, model=adapter.name, max_completion_tokens=TOKENS), stream=True
    )
    text, finish_reason, fingerprints = "", None, set()
    async for chunk in stream:
        text += chunk.choices[0].delta.content or ""
        finish_reason = chunk.choices[0].finish_reason or finish_reason
        fingerprints.add(chunk.system_fingerprint or "")
    (fingerprint,) = fingerprints
    told = re.fullmatch(rf"fp_{re.escape(adapter.name)}@(\d+)_[0-9a-f]{{12}}", fingerprint)
    assert told is not None, fingerprint
    return Answer(
        adapter=adapter,
        text=text,
        finish_reason=finish_reason,
        version=int(told[1]),
        first=first,
        last=adapter.sent,
    )


async def test_fifty_replacements_under_thirty_two_streams(
    server: Server, forcing: Forcing, words: Mapping[str, int]
) -> None:
    unused = iter(words)
    adapters = [Replaced(f"load/adapter-{number}") for number in range(ADAPTERS)]
    numbers = count()
    done, answered = asyncio.Event(), asyncio.Event()
    answers: list[Answer] = []

    async with (
        httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_SECONDS) as http,
        server.async_sdk() as client,
    ):
        for adapter in adapters:
            await publish(http, adapter, forcing, next(unused))

        async def keep_asking(place: int) -> None:
            while not done.is_set():
                answers.append(await ask(client, adapters[place % ADAPTERS], next(numbers)))
                answered.set()

        async def keep_replacing() -> None:
            try:
                for number in range(REPLACEMENTS):
                    await publish(http, adapters[number % ADAPTERS], forcing, next(unused))
                    seen = len(answers)
                    while len(answers) < seen + 4:  # so that versions meet requests
                        answered.clear()
                        await answered.wait()
            finally:
                done.set()

        async with asyncio.TaskGroup() as group:  # a failed request fails the test
            for place in range(STREAMS):
                group.create_task(keep_asking(place))
            group.create_task(keep_replacing())

    assert sum(adapter.sent - 1 for adapter in adapters) == REPLACEMENTS
    assert len(answers) >= 4 * REPLACEMENTS
    for answer in answers:
        assert answer.text.split() == [answer.adapter.words[answer.version - 1]] * TOKENS, answer
        assert answer.finish_reason == "length"
        assert answer.first <= answer.version <= answer.last, answer
    assert len({(answer.adapter.name, answer.version) for answer in answers}) > ADAPTERS, "new versions were used"

    wait_for(lambda: server.running_rows() == (0, 0), "all requests have left the engine")
    wait_for(lambda: residency(server, adapters) == expected(adapters), "only the newest versions stay in memory")
    for adapter in adapters:
        assert server.http.delete(f"/v1/adapters/{adapter.name}").status_code == 200
    wait_for(lambda: not residency(server, adapters), "deleted adapters leave memory")
    assert not list((server.home / "blobs" / "adapters").iterdir())


def residency(server: Server, adapters: list[Replaced]) -> set[tuple[str, int]]:
    """The versions that the engine holds in memory, on the device or beside it."""
    names = {adapter.name for adapter in adapters}
    series = re.compile(r'tuneloop:adapter_residency\{adapter="([^"]+)",.*tier="(device|cpu)",version="(\d+)"\} 1\.0')
    found = series.findall(server.http.get("/metrics").text)
    return {(name, int(version)) for name, _, version in found if name in names}


def expected(adapters: list[Replaced]) -> set[tuple[str, int]]:
    return {(adapter.name, adapter.sent) for adapter in adapters}


async def test_a_replaced_adapter_never_answers_from_the_old_ones_cache(
    server: Server, shapes: Mapping[str, ModuleShape]
) -> None:
    """These adapters change keys and values, so a stale prefix cache would give the old answer."""
    old, new = (random_adapter(shapes, seed, targets=("q_proj", "v_proj"), size=0.15) for seed in (1, 2))
    prompt = "Tell me about the history of the city of Paris, please."
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_SECONDS) as http, server.async_sdk() as client:

        async def say(model: str) -> tuple[str | None, int]:
            completion = await client.chat.completions.create(**chat(prompt, model=model, max_completion_tokens=16))
            assert completion.usage is not None and completion.usage.prompt_tokens_details is not None
            return completion.choices[0].message.content, completion.usage.prompt_tokens_details.cached_tokens or 0

        for name, adapter in (("stale", old), ("fresh", new)):
            files = {"file": ("adapter.zip", adapter.zip())}
            created = await http.post("/v1/adapters", data={"name": name, "base": MODEL}, files=files)
            assert created.status_code == 200, created.text
        before, cached = await say("stale")
        assert cached == 0
        again, cached = await say("stale")
        assert cached > 0 and again == before, "the adapter's own prefix is reused"
        replaced = await http.put("/v1/adapters/stale", files={"file": ("adapter.zip", new.zip())})
        assert replaced.status_code == 200, replaced.text
        after, cached = await say("stale")
        fresh, _ = await say("fresh")
        base, _ = await say(MODEL)
        assert after == fresh
        assert len({before, after, base}) == 3
        for name in ("stale", "fresh"):
            await http.delete(f"/v1/adapters/{name}")
