"""Graceful drain: what still runs, whether new work is refused, and the middleware that refuses it.

The order on SIGTERM: `/ready` answers 503, new requests get 503 with Retry-After and `Connection: close`, running ones
finish. Who waits for how long is `run.py`'s business.
"""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..storage.errors import Unavailable
from .refusal import refuse_and_close

PROBES = frozenset({"/health", "/ready", "/metrics", "/version"})  # answered until the end


class Drain:
    """Counts running requests. `begin` is safe to call twice, and from a signal handler."""

    def __init__(self) -> None:
        self.draining = False
        self.in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def begin(self) -> None:
        """From now on new requests are refused."""
        self.draining = True

    def enter(self) -> None:
        self.in_flight += 1
        self._idle.clear()

    def leave(self) -> None:
        self.in_flight -= 1
        if self.in_flight == 0:
            self._idle.set()

    async def wait_idle(self, timeout_seconds: float) -> bool:
        """Wait until no request runs. False if some still do after the timeout."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True


class DrainMiddleware:
    """Counts requests, refuses new ones while draining, and lets no connection be reused after that."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        if self._drain.draining:
            error = Unavailable("The server is shutting down. Send the request again; another replica will take it.")
            await refuse_and_close(error, scope, receive, send)
            return

        async def send_closing(message: Message) -> None:
            if message["type"] == "http.response.start" and self._drain.draining:
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        self._drain.enter()
        try:
            await self._app(scope, receive, send_closing)
        finally:
            self._drain.leave()
