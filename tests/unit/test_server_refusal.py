"""Refusals that close the connection: what the client still sends is taken first, so that no reset eats the answer."""

import asyncio
from collections.abc import Sequence

import pytest
from starlette.types import Message
from tuneloop.server import refusal
from tuneloop.server.drain import Drain, DrainMiddleware
from tuneloop.server.refusal import refuse_and_close
from tuneloop.storage.errors import Unavailable

MIB = 1 << 20


class Connection:
    """Gives the pieces of a body one by one, then waits for ever; keeps the order of what happens."""

    def __init__(self, pieces: Sequence[bytes], *, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        self.scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": list(headers)}
        self.events: list[str] = []
        self.answer: list[Message] = []
        self._pieces = list(pieces)

    async def receive(self) -> Message:
        if not self._pieces:
            await asyncio.Event().wait()
        body = self._pieces.pop(0)
        self.events.append(f"read {len(body)}")
        return {"type": "http.request", "body": body, "more_body": bool(self._pieces) or body == b"more"}

    async def send(self, message: Message) -> None:
        self.events.append(message["type"])
        self.answer.append(message)

    async def refuse(self) -> None:
        await refuse_and_close(Unavailable("Not now."), self.scope, self.receive, self.send)


ANSWERED = ["http.response.start", "http.response.body"]


async def test_the_body_is_taken_before_the_answer() -> None:
    connection = Connection([b"abc", b"de"])
    await connection.refuse()
    assert connection.events == ["read 3", "read 2", *ANSWERED]
    assert connection.answer[0]["status"] == 503
    assert (b"connection", b"close") in connection.answer[0]["headers"]


async def test_a_body_without_end_is_cut_off() -> None:
    connection = Connection([bytes(MIB // 2)] * 5)
    await connection.refuse()
    assert connection.events == [f"read {MIB // 2}"] * 2 + ANSWERED


async def test_a_client_that_stops_sending_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusal, "_DISCARD_SECONDS", 0.01)
    connection = Connection([b"more"])
    await connection.refuse()
    assert connection.events == ["read 4", *ANSWERED]


async def test_a_client_that_asks_first_is_answered_at_once() -> None:
    connection = Connection([b"abc"], headers=[(b"expect", b"100-continue")])
    await connection.refuse()
    assert connection.events == ANSWERED


async def test_a_draining_server_refuses_so() -> None:
    async def app(*_: object) -> None:
        raise AssertionError("a new request got in")

    drain, connection = Drain(), Connection([b"abc"])
    drain.begin()
    await DrainMiddleware(app, drain)(connection.scope, connection.receive, connection.send)
    assert connection.events == ["read 3", *ANSWERED]
