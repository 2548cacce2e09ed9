"""Server-sent events: how bytes become events, and the response that sends them. It knows no endpoint.

An event stream that has begun can no longer change its status, so its errors travel as an `error` event.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import msgspec
import structlog
from sse_starlette import EventSourceResponse
from sse_starlette.sse import AppStatus
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from ..storage.errors import TuneloopError
from .disconnect import CLIENT_GONE, ClientGoneError, until_disconnect
from .errors import error_body

log = structlog.get_logger(__name__)

PING_SECONDS = 15  # keeps proxies from closing a stream while a long prompt is prefilled
DONE = b"data: [DONE]\n\n"

# sse-starlette would cut all streams at SIGTERM; here they finish within the grace time (see run.py).
AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]

encode_json = msgspec.json.encode


def data_event(payload: Any) -> bytes:
    """One event with a JSON payload."""
    return b"data: " + encode_json(payload) + b"\n\n"


def error_event(error: TuneloopError) -> bytes:
    """OpenAI's error object as an event; the official SDK raises it as an APIError."""
    return b"event: error\ndata: " + encode_json(error_body(error)) + b"\n\n"


async def sse_response(request: Request, events: AsyncGenerator[bytes, None]) -> Response:
    """Send whole events as they come.

    What `events` raises before its first event is raised here, so that it gets an HTTP status. `events` is closed
    at once when the client leaves, be it before the first event or later.
    """

    async def first_event() -> bytes:
        return await anext(events)

    try:
        first = await until_disconnect(request, first_event())
    except BaseException as error:
        await events.aclose()
        if isinstance(error, ClientGoneError):
            return CLIENT_GONE
        raise
    left = asyncio.Event()

    async def on_leave(_message: Message) -> None:
        left.set()

    return EventSourceResponse(
        _until_left(first, events, left), ping=PING_SECONDS, sep="\n", client_close_handler_callable=on_leave
    )


async def _until_left(first: bytes, events: AsyncGenerator[bytes, None], left: asyncio.Event) -> AsyncIterator[bytes]:
    async with aclosing(events):
        try:
            yield first
            async for event in events:
                # sse-starlette cancels this generator when the client leaves, but by a cancellation that waits until
                # the generator waits: a source that always has the next event ready would never notice.
                if left.is_set():
                    return
                yield event
        except TuneloopError as error:
            log.warning("stream failed", error=error.message, code=error.code)
            yield error_event(error)
