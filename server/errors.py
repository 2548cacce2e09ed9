"""Maps errors to HTTP: status, OpenAI's error object and headers. The one place that knows both sides.

Streams that have already answered 200 use `error_body` for their error event, so both ways look alike to clients.
"""

import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, cast

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from ..storage.errors import (
    AuthenticationFailed,
    Conflict,
    DeadlineExceeded,
    InvalidInput,
    NotFound,
    Overloaded,
    PermissionDenied,
    StorageFull,
    TooLarge,
    TuneloopError,
    Unavailable,
)

log = structlog.get_logger(__name__)

RETRY_AFTER_SECONDS = 1  # what an Unavailable answer suggests: workers restart and drains end within seconds

# The first class that an error is an instance of decides, so subclasses come before their parents.
_STATUS: Sequence[tuple[type[TuneloopError], int]] = (
    (TooLarge, 413),
    (InvalidInput, 400),
    (AuthenticationFailed, 401),
    (PermissionDenied, 403),
    (NotFound, 404),
    (Conflict, 409),
    (Overloaded, 429),
    (DeadlineExceeded, 504),
    (StorageFull, 507),
    (Unavailable, 503),
)
_NO_OBJECT = frozenset({"missing", "model_type", "model_attributes_type", "dict_type"})  # pydantic's, for a whole body
_TYPE_OF_STATUS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def status_of(error: TuneloopError) -> int:
    """The HTTP status of an error; 500 for one that no class above claims."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def type_of_status(status: int) -> str:
    """OpenAI's word for a kind of failure."""
    return _TYPE_OF_STATUS.get(status, "server_error" if status >= 500 else "invalid_request_error")


def error_body(error: TuneloopError) -> dict[str, Any]:
    """OpenAI's error object: what a client reads, in a JSON answer or in a stream's error event."""
    return _body(error.message, type_of_status(status_of(error)), error.param, error.code)


def headers_of(error: TuneloopError) -> dict[str, str]:
    """Retry-After in whole seconds (rounded up, at least 1) where trying again helps; a 401's challenge."""
    if isinstance(error, Overloaded):
        return {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
    if isinstance(error, Unavailable) and not isinstance(error, StorageFull):
        return {"Retry-After": str(RETRY_AFTER_SECONDS)}
    if isinstance(error, AuthenticationFailed):
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(error, Conflict):
        return {"x-should-retry": "false"}  # OpenAI's SDKs would try again by themselves, and it stays a conflict
    return {}


def error_response(error: TuneloopError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse(
        error_body(error), status_code=status_of(error), headers={**headers_of(error), **(headers or {})}
    )


def internal_error_response(request_id: str) -> JSONResponse:
    """The answer to a bug of ours: no detail leaves the server, the request id finds the traceback in its log."""
    message = f"The server failed in a way that it should not. Report it with the request id {request_id}."
    return JSONResponse(_body(message, "server_error", None, "internal_error"), status_code=500)


def invalid_input(error: RequestValidationError | ValidationError) -> InvalidInput:
    """Turn pydantic's list of complaints into one sentence about the first, and the number of the others."""
    problems = error.errors()
    param, sentence = _describe(problems[0])
    more = f" ({len(problems) - 1} more fields are wrong.)" if len(problems) > 2 else ""
    more = " (One more field is wrong.)" if len(problems) == 2 else more
    return InvalidInput(sentence + more, param=param)


def install(app: FastAPI) -> None:
    """Answer every error of the app's routes, and unknown routes and methods, with OpenAI's error object."""
    app.add_exception_handler(TuneloopError, _on_tuneloop_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)


async def _on_tuneloop_error(request: Request, error: Exception) -> JSONResponse:
    error = cast(TuneloopError, error)
    if status_of(error) >= 500:
        log.warning("request failed", error=error.message, code=error.code, path=request.url.path)
    return error_response(error)


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    return error_response(invalid_input(cast(RequestValidationError, error)))


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Starlette's own refusals: no such route, wrong method, unreadable body."""
    error = cast(HTTPException, error)
    path, status = request.url.path, error.status_code
    if status == 404:
        message, code = f"There is no route {request.method} {path}. GET /openapi.json lists the routes.", "not_found"
    elif status == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        message, code = f"{path} does not take {request.method}. Use {allowed}.", "method_not_allowed"
    else:
        message, code = _sentence(error.detail or HTTPStatus(status).phrase), "invalid_request"
    return JSONResponse(_body(message, type_of_status(status), None, code), status_code=status, headers=error.headers)


def _body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _describe(problem: ErrorDetails) -> tuple[str | None, str]:
    """The field's dotted name (None for the body as a whole) and a sentence that names it."""
    steps = [str(step) for step in problem["loc"] if step not in ("body", "query", "path")]
    name = ".".join(steps) or None
    kind = problem["type"]
    if kind == "json_invalid":
        return None, f"The body is not valid JSON: {problem.get('ctx', {}).get('error', 'it cannot be parsed')}."
    reason = problem["msg"].removeprefix("Value error, ")
    if name is None:
        if kind in _NO_OBJECT:
            return None, "The body must be a JSON object, sent with Content-Type: application/json."
        return None, f"The body is wrong: {_sentence(reason)}"
    if kind == "missing":
        return name, f"The field '{name}' is missing. Give it."
    if kind == "extra_forbidden":
        return name, f"The field '{name}' is not known here. Remove it or correct its spelling."
    return name, f"The field '{name}' is wrong: {_sentence(reason)}"


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else text + "."
