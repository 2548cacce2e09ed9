"""A load generator for streamed chats: as little work a token as Python allows, so that servers are measured.

It speaks HTTP/1.1 over plain sockets and counts `data:` events; httpx would spend more on a chunk than the servers do.
"""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Times in seconds since the request was sent."""

    first_token: float
    seconds: float
    tokens: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a run of many streams gave: output tokens a second over all, median time to first token."""

    tokens_per_second: float
    first_token: float
    tokens: int
    seconds: float


class LoadError(RuntimeError):
    """The server refused a request of the benchmark."""


async def stream_chat(base_url: str, body: dict[str, Any]) -> Answer:
    """One streamed chat; raises LoadError with the server's words."""
    url = urlsplit(base_url)
    assert url.hostname is not None
    payload = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    reader, writer = await asyncio.open_connection(url.hostname, url.port, limit=1 << 20)
    began = time.perf_counter()
    try:
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n".encode()
            + payload
        )
        status = await reader.readline()
        if b" 200 " not in status:
            raise LoadError((status + await reader.read()).decode("utf-8", "replace"))
        return await _read_events(reader, began)
    finally:
        writer.close()


async def _read_events(reader: asyncio.StreamReader, began: float) -> Answer:
    first: float | None = None
    pieces: list[str] = []
    tokens = 0
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise LoadError(line.decode())
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
        for choice in event.get("choices", ()):
            if choice["delta"].get("content"):
                first = first or time.perf_counter() - began
                pieces.append(choice["delta"]["content"])
    seconds = time.perf_counter() - began
    return Answer(first_token=first or seconds, seconds=seconds, tokens=tokens, text="".join(pieces))


async def run_load(base_url: str, bodies: Sequence[dict[str, Any]], concurrency: int) -> Load:
    """Send `bodies` in order over `concurrency` streams, each starting its next request when one ends."""
    waiting = iter(bodies)
    answers: list[Answer] = []

    async def client() -> None:
        for body in waiting:
            answers.append(await stream_chat(base_url, body))  # noqa: PERF401 - shared by the clients

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    seconds = time.perf_counter() - began
    tokens = sum(a.tokens for a in answers)
    return Load(
        tokens_per_second=tokens / seconds,
        first_token=median(a.first_token for a in answers),
        tokens=tokens,
        seconds=seconds,
    )


def chats(count: int, *, seed: int, model: Callable[[int], str], max_tokens: int = 64) -> list[dict[str, Any]]:
    """`count` different chats of about 50 prompt tokens with the same settings for every server."""
    words = [
        "amber",
        "basil",
        "cedar",
        "delta",
        "ember",
        "frost",
        "grove",
        "haven",
        "inlet",
        "jolly",
        "karma",
        "lemon",
        "mango",
        "noble",
        "ocean",
        "pearl",
    ]
    bodies: list[dict[str, Any]] = []
    for number in range(count):
        mark = " ".join(words[(seed * 7 + number * (i + 3) + i * i) % len(words)] for i in range(5))
        bodies.append(
            {
                "model": model(number),
                "messages": [
                    {"role": "user", "content": f"{seed}-{number} {mark}: tell me a short story of these words."}
                ],
                "max_tokens": max_tokens,
                "temperature": 0,
                "ignore_eos": True,
            }
        )
    return bodies
