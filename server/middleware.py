"""What every request passes through: its id, the access log, the answer to bugs, its origin, the limit of its body.

Pure ASGI, because wrapping a response (BaseHTTPMiddleware) would buffer streams and hide disconnects.
"""

import re
import time
import uuid
from collections.abc import Callable, Collection

import structlog
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..storage.errors import PermissionDenied, TooLarge
from .drain import PROBES
from .errors import error_response, internal_error_response
from .metrics import Metrics
from .refusal import refuse_and_close

log = structlog.get_logger("tuneloop.access")

CLIENT_CLOSED_REQUEST = 499  # nginx's number, for the log and metrics only

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SAFE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")  # others could forge log lines


class RequestMiddleware:
    """Gives each request an id (the client's `X-Request-Id` if it is harmless), logs and counts it.

    An exception that nobody handled is logged with its traceback and answered with a 500 that holds the id. Once a
    response has begun it is too late for a status: the exception goes on and the server cuts the connection.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SAFE_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_id)
            except ClientDisconnect:
                status = status or CLIENT_CLOSED_REQUEST  # in the middle of its own body: there is nobody to answer
            except Exception:
                log.exception("unhandled exception", method=scope["method"], path=scope["path"])
                if status:
                    raise
                await internal_error_response(request_id)(scope, receive, send_with_id)
            finally:
                self._finish(scope, status, time.perf_counter() - started)

    def _finish(self, scope: Scope, status: int, seconds: float) -> None:
        handler = getattr(scope.get("route"), "path_format", "none")
        method = scope["method"] if scope["method"] in _METHODS else "other"  # invented ones would make endless series
        self._metrics.http_request(method, handler, status)
        write = log.debug if scope["path"] in PROBES else log.info  # probes would drown the rest
        client = scope.get("client")
        write(
            "request",
            method=scope["method"],
            path=scope["path"],
            status=status,
            seconds=round(seconds, 4),
            client=client[0] if client else None,
        )


class CrossSiteMiddleware:
    """Refuses changes that a browser makes for a page of another site, unless `cors_origins` names it.

    CORS alone does not: a form of any web page may post to a server on this machine, and only the answer is hidden from
    the page. Browsers say so themselves (Sec-Fetch-Site); what is no browser is not concerned.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        self._app = app
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            headers = Headers(scope=scope)
            origin = headers.get("origin", "null")
            is_allowed = "*" in self._origins or origin in self._origins
            if headers.get("sec-fetch-site") == "cross-site" and not is_allowed:
                error = PermissionDenied(f"Pages of {origin!r} may not call this server. Allow it by cors_origins.")
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimitMiddleware:
    """Refuses bodies over the limit of their path: at once by Content-Length, else as soon as too much has come."""

    def __init__(self, app: ASGIApp, limit_of: Callable[[Scope], tuple[int, str]]) -> None:
        """`limit_of` gives the bytes allowed for a request and the setting that says so."""
        self._app = app
        self._limit_of = limit_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit, setting = self._limit_of(scope)
        error = TooLarge(f"The body is larger than {limit} bytes. Send less, or raise the server's {setting}.")
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared) > limit:
            await refuse_and_close(error, scope, receive, send)
            return
        seen, started = 0, False

        async def receive_counted() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > limit:
                    raise error
            return message

        async def send_unless_over(message: Message) -> None:
            # Frameworks turn what `receive` raises into answers of their own; ours is the one that counts.
            nonlocal started
            if seen > limit and not started:
                return
            started = True
            await send(message)

        try:
            await self._app(scope, receive_counted, send_unless_over)
        except TooLarge:
            if seen <= limit or started:
                raise
        if seen > limit and not started:
            await refuse_and_close(error, scope, receive, send)
