"""Ends the work for a client that has gone, while no response has begun yet (streams watch for themselves)."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

CLIENT_GONE = Response(status_code=499)  # nginx's status for it; only logs and metrics will see it

_Result = TypeVar("_Result")


class ClientGoneError(Exception):
    """The client closed the connection; nobody is left to read an answer."""


async def until_disconnect(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of `work`, which is cancelled when the client disconnects first (ClientGoneError).

    The request's body must have been read already.
    """
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for pending in (task, watch):
            pending.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def json_response(request: Request, work: Coroutine[Any, Any, Any]) -> Response:
    """The result of `work` as JSON; the work is cancelled if the client leaves first."""
    try:
        payload = await until_disconnect(request, work)
    except ClientGoneError:
        return CLIENT_GONE
    return Response(msgspec.json.encode(payload), media_type="application/json")


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
