"""Request ids, body limits, error answers and the drain, on a small app of their own."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import structlog
from fastapi import Depends, FastAPI, Request
from pydantic import BaseModel, ConfigDict
from starlette.middleware import Middleware
from starlette.responses import StreamingResponse
from tuneloop.server import errors
from tuneloop.server.drain import Drain, DrainMiddleware
from tuneloop.server.metrics import Metrics
from tuneloop.server.middleware import BodyLimitMiddleware, RequestMiddleware
from tuneloop.storage import errors as kinds


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    number: int
    text: str = ""


def raise_it(kind: str) -> None:
    if kind == "bug":
        raise RuntimeError("the secret is 42")
    if kind == "Overloaded":
        raise kinds.Overloaded("Full.", retry_after=2.1)
    raise getattr(kinds, kind)("Wrong.", param="p")


class Harness:
    def __init__(self) -> None:
        self.drain, self.metrics, self.release = Drain(), Metrics(), asyncio.Event()
        self.streaming = asyncio.Event()
        app = FastAPI(
            middleware=[
                Middleware(RequestMiddleware, metrics=self.metrics),
                Middleware(DrainMiddleware, drain=self.drain),
                Middleware(BodyLimitMiddleware, limit_of=lambda scope: (100, "max_body_bytes")),
            ]
        )
        errors.install(app)

        @app.get("/raise/{kind}", dependencies=[Depends(raise_it)])
        async def fail() -> None: ...

        @app.post("/echo")
        async def echo(body: Body) -> Body:
            return body

        @app.post("/size")
        async def size(request: Request) -> int:
            return len(await request.body())

        @app.get("/id")
        async def request_id(request: Request) -> Any:
            return {"state": request.state.request_id, "log": structlog.contextvars.get_contextvars()["request_id"]}

        @app.get("/stream")
        async def stream() -> StreamingResponse:
            async def chunks() -> AsyncIterator[str]:
                self.streaming.set()
                yield "a"
                await self.release.wait()
                yield "b"

            return StreamingResponse(chunks())

        @app.get("/health")
        async def health() -> str:
            return "ok"

        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://test")


@pytest.fixture
async def harness() -> AsyncIterator[Harness]:
    harness = Harness()
    async with harness.client:
        yield harness


@pytest.mark.parametrize(
    ("kind", "status", "type_", "headers"),
    [
        ("InvalidInput", 400, "invalid_request_error", {}),
        ("ContextTooLong", 400, "invalid_request_error", {}),
        ("AuthenticationFailed", 401, "authentication_error", {"www-authenticate": "Bearer"}),
        ("PermissionDenied", 403, "permission_error", {}),
        ("NotFound", 404, "not_found_error", {}),
        ("Conflict", 409, "invalid_request_error", {}),
        ("TooLarge", 413, "invalid_request_error", {}),
        ("Overloaded", 429, "rate_limit_error", {"retry-after": "3"}),
        ("Unavailable", 503, "server_error", {"retry-after": "1"}),
        ("DeadlineExceeded", 504, "server_error", {}),
        ("StorageFull", 507, "server_error", {}),
    ],
)
async def test_each_error_has_its_status(
    harness: Harness, kind: str, status: int, type_: str, headers: dict[str, str]
) -> None:
    answer = await harness.client.get(f"/raise/{kind}")
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["type"] == type_
    assert error["code"] == getattr(kinds, kind).code
    assert set(error) == {"message", "type", "param", "code"}
    assert headers.items() <= dict(answer.headers).items()


async def test_every_kind_of_error_is_mapped() -> None:
    def leaves(kind: type[kinds.TuneloopError]) -> list[type[kinds.TuneloopError]]:
        return [kind, *(leaf for sub in kind.__subclasses__() for leaf in leaves(sub))]

    for kind in kinds.TuneloopError.__subclasses__():
        for leaf in leaves(kind):
            error = leaf.__new__(leaf)
            assert errors.status_of(error) < 500 or leaf.__name__ in ("Unavailable", "StorageFull", "DeadlineExceeded")


async def test_a_bug_tells_its_request_id_and_nothing_else(harness: Harness) -> None:
    answer = await harness.client.get("/raise/bug", headers={"X-Request-Id": "abc-1"})
    assert answer.status_code == 500
    assert "abc-1" in answer.json()["error"]["message"]
    assert answer.headers["x-request-id"] == "abc-1"
    assert "42" not in answer.text


async def test_unknown_routes_and_methods_have_the_error_object(harness: Harness) -> None:
    answer = await harness.client.get("/nowhere")
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")
    answer = await harness.client.get("/echo")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ("{", None, "not valid JSON"),
        ("{}", "number", "The field 'number' is missing"),
        ('{"number": "x"}', "number", "The field 'number' is wrong"),
        ('{"number": 1, "nummer": 2}', "nummer", "The field 'nummer' is not known"),
        ('{"number": "x", "text": 1}', "number", "(One more field is wrong.)"),
        ("[]", None, "The body must be a JSON object"),
        ("", None, "The body must be a JSON object"),
    ],
)
async def test_a_wrong_body_is_named(harness: Harness, body: str, param: str | None, words: str) -> None:
    answer = await harness.client.post("/echo", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert words in answer.json()["error"]["message"]


async def test_request_ids(harness: Harness) -> None:
    answer = await harness.client.get("/id")
    given = answer.headers["x-request-id"]
    assert answer.json() == {"state": given, "log": given}
    answer = await harness.client.get("/id", headers={"X-Request-Id": "mine"})
    assert answer.headers["x-request-id"] == "mine"
    for wrong in ("a b", "x" * 129, 'a"b'):
        answer = await harness.client.get("/id", headers={"X-Request-Id": wrong})
        assert answer.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("path", ["/size", "/echo"])
async def test_a_body_over_the_limit_is_refused_declared_or_not(harness: Harness, path: str) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(11):
            yield b" " * 10

    headers = {"Content-Type": "application/json"}
    for content in (b" " * 101, chunks()):
        answer = await harness.client.post(path, content=content, headers=headers)
        assert answer.status_code == 413
        assert "max_body_bytes" in answer.json()["error"]["message"]
        assert answer.headers["connection"] == "close"
    assert (await harness.client.post("/size", content=b" " * 100)).json() == 100


async def test_a_drain_refuses_new_requests_and_waits_for_running_ones(harness: Harness) -> None:
    running = asyncio.create_task(harness.client.get("/stream"))
    await harness.streaming.wait()
    harness.drain.begin()
    harness.drain.begin()
    refused = await harness.client.get("/id")
    assert refused.status_code == 503
    assert refused.headers["connection"] == "close"
    assert "retry-after" in refused.headers
    assert json.loads(refused.text)["error"]["code"] == "unavailable"
    assert (await harness.client.get("/health")).status_code == 200
    assert not await harness.drain.wait_idle(0.01)
    harness.release.set()
    assert (await running).text == "ab"
    assert await harness.drain.wait_idle(10)


async def test_answers_are_counted_by_route(harness: Harness) -> None:
    await harness.client.get("/raise/NotFound")
    await harness.client.get("/raise/Conflict")
    text = harness.metrics.render().decode()
    assert 'http_requests_total{handler="/raise/{kind}",method="GET",status="4xx"} 2.0' in text
