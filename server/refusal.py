"""Refuses a request before its body was read, in such a way that the client sees the answer.

Closing a connection while the client still sends makes the kernel reset it, and the reset may overtake the answer. So
what is on its way is taken first, within limits: a client that sends gigabytes, or nothing, is cut off.
"""

import asyncio
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from ..storage.errors import TuneloopError
from .errors import error_response

_DISCARD_BYTES = 1 << 20
_DISCARD_SECONDS = 2.0


async def refuse_and_close(error: TuneloopError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with `error` and close the connection, which cannot carry another request."""
    if "expect" not in Headers(scope=scope):  # else the client waits for our word before it sends the body
        with suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_SECONDS):
                await _discard_body(receive)
    await error_response(error, {"Connection": "close"})(scope, receive, send)


async def _discard_body(receive: Receive) -> None:
    seen = 0
    while seen < _DISCARD_BYTES:
        message = await receive()
        if message["type"] != "http.request" or not message.get("more_body"):
            return
        seen += len(message.get("body", b""))
