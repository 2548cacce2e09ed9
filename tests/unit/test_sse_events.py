"""The event stream alone: pings while nothing comes, errors as events, and generators that are always closed."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Message
from tuneloop.server import sse
from tuneloop.server.disconnect import json_response
from tuneloop.storage.errors import InvalidInput, Unavailable


class Client:
    """The two ends of an ASGI connection; it disconnects once `leave_after` messages have been sent to it."""

    def __init__(self, *, leave_at_once: bool = False, leave_after: bytes | None = None) -> None:
        self.sent: list[Message] = []
        self._left = asyncio.Event()
        self._leave_after = leave_after
        if leave_at_once:
            self._left.set()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    def request(self) -> Request:
        return Request({"type": "http", "method": "POST", "headers": []}, self.receive)

    async def receive(self) -> Message:
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        if self._leave_after is not None and self._leave_after in message.get("body", b""):
            self._left.set()


class Events:
    """A scripted source of events that knows whether it was closed. An exception in the script is raised."""

    def __init__(self, *script: bytes | Exception | None) -> None:
        self.script = script
        self.closed = False

    async def __call__(self) -> AsyncGenerator[bytes, None]:
        try:
            for item in self.script:
                if item is None:
                    await asyncio.Event().wait()
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield item
        finally:
            self.closed = True


async def answer(client: Client, events: Events) -> None:
    response = await sse.sse_response(client.request(), events())
    await response({"type": "http", "method": "POST"}, client.receive, client.send)


async def test_events_are_sent_as_they_are() -> None:
    client, events = Client(), Events(b"data: 1\n\n", b"data: 2\n\n")
    await answer(client, events)
    assert client.body == b"data: 1\n\ndata: 2\n\n"
    assert client.sent[0]["status"] == 200
    assert events.closed


async def test_errors_before_the_first_event_are_raised() -> None:
    events = Events(InvalidInput("Wrong."))
    with pytest.raises(InvalidInput, match=r"Wrong\."):
        await answer(Client(), events)
    assert events.closed


async def test_errors_after_it_are_an_event() -> None:
    client = Client()
    await answer(client, Events(b"data: 1\n\n", Unavailable("Gone.")))
    event = client.body.removeprefix(b"data: 1\n\n").decode()
    name, data = event.rstrip("\n").split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["message"] == "Gone."


async def test_a_client_that_leaves_before_the_first_event() -> None:
    events = Events(None)
    response = await sse.sse_response((client := Client(leave_at_once=True)).request(), events())
    assert response.status_code == 499
    assert client.sent == []
    assert events.closed


async def test_a_client_that_leaves_in_the_middle() -> None:
    client, events = Client(leave_after=b"data: 2"), Events(b"data: 1\n\n", b"data: 2\n\n", None)
    await answer(client, events)
    assert events.closed


async def test_pings_come_while_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PING_SECONDS", 0.01)
    client, events = Client(leave_after=b": ping"), Events(b"data: 1\n\n", None)
    await answer(client, events)
    assert client.body.startswith(b"data: 1\n\n: ping")
    assert client.body.endswith(b"\n\n")


def test_pings_are_every_fifteen_seconds() -> None:
    assert sse.PING_SECONDS == 15


async def test_json_answers_end_with_the_client_too() -> None:
    async def work() -> dict[str, Any]:
        return {"a": "é"}

    async def endless() -> dict[str, Any]:
        async for _ in events():
            pass
        return {}

    assert (await json_response(Client().request(), work())).body == '{"a":"é"}'.encode()
    events = Events(None)
    assert (await json_response(Client(leave_at_once=True).request(), endless())).status_code == 499
