"""/v1/files by the official SDK and by hand: what is answered, what is refused, who may, and what it costs."""

import asyncio
import os
import tracemalloc
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import httpx
import httpx2  # the HTTP client that the official SDK brings
import openai
import pytest
from openai import AsyncOpenAI
from tuneloop.storage import durable

from .conftest import AppFactory, Running

HOUR = 3600


def sdk_of(running: Running) -> AsyncOpenAI:
    client = httpx2.AsyncClient(transport=httpx2.ASGITransport(running.app))
    return AsyncOpenAI(
        base_url="http://test/v1",
        api_key="none",
        http_client=client,
        max_retries=0,
        _strict_response_validation=True,
    )


async def upload(client: httpx.AsyncClient, content: bytes = b"{}", **options: Any) -> str:
    values: dict[str, Any] = {"data": {"purpose": "fine-tune"}, "files": {"file": ("a.jsonl", content)}} | options
    response = await client.post("/v1/files", **values)
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


async def test_the_sdk_from_upload_to_deletion(running: Running) -> None:
    sdk = sdk_of(running)
    file = await sdk.files.create(file=("daten ü.jsonl", b'{"a": 1}\n'), purpose="fine-tune")
    assert (file.object, file.bytes, file.filename, file.purpose) == ("file", 9, "daten ü.jsonl", "fine-tune")
    assert (file.status, file.expires_at) == ("processed", None)
    assert abs(file.created_at - datetime.now(UTC).timestamp()) < 10
    assert await sdk.files.retrieve(file.id) == file
    assert [found async for found in sdk.files.list()] == [file]
    assert await sdk.files.wait_for_processing(file.id) == file
    content = await sdk.files.content(file.id)
    assert content.content == b'{"a": 1}\n'
    assert content.response.headers["content-disposition"] == "attachment; filename*=UTF-8''daten%20%C3%BC.jsonl"
    deleted = await sdk.files.delete(file.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (file.id, "file", True)
    for call in (sdk.files.retrieve, sdk.files.delete, sdk.files.content):
        with pytest.raises(openai.NotFoundError) as caught:
            await call(file.id)
        assert caught.value.param == "file_id"


async def test_the_sdk_pages_through_all_files_even_while_it_deletes_them(running: Running) -> None:
    sdk = sdk_of(running)
    ids = [(await sdk.files.create(file=("a", b"1"), purpose="batch")).id for _ in range(5)]
    other = await sdk.files.create(file=("a", b"1"), purpose="user_data")
    assert [file.id async for file in sdk.files.list(limit=2, order="asc", purpose="batch")] == ids
    page = (await running.client.get("/v1/files", params={"limit": 2})).json()
    assert (page["object"], page["has_more"]) == ("list", True)
    assert (page["first_id"], page["last_id"]) == (other.id, ids[4])
    async for file in sdk.files.list(limit=2, purpose="batch"):
        await sdk.files.delete(file.id)
    assert [file.id async for file in sdk.files.list(limit=2)] == [other.id]
    assert (await running.client.get("/v1/files?purpose=evals")).json()["last_id"] is None


async def test_expires_after_as_the_sdk_sends_it(running: Running) -> None:
    sdk = sdk_of(running)
    file = await sdk.files.create(
        file=("a", b"1"), purpose="batch", expires_after={"anchor": "created_at", "seconds": HOUR}
    )
    assert file.expires_at is not None
    assert abs(file.expires_at - file.created_at - HOUR) <= 1


async def test_files_are_there_after_a_restart(app_factory: AppFactory) -> None:
    async with app_factory() as running:
        file_id = await upload(running.client, b"hello")
    async with app_factory() as running:
        assert (await running.client.get(f"/v1/files/{file_id}/content")).content == b"hello"
        assert not [path for path in running.home.rglob("*part*") if path.is_file()]


PURPOSE, FILE = {"purpose": "fine-tune"}, {"file": ("a.jsonl", b"{}")}
AFTER = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}


WRONG: list[tuple[str, Any, Any]] = [  # the field at fault, and the form
    ("purpose", {}, FILE),
    ("purpose", {"purpose": ""}, FILE),
    ("purpose", {"purpose": "fine_tune"}, FILE),
    ("purpose", {"purpose": "fine-tune-results"}, FILE),
    ("purpose", {"purpose": ["batch", "batch"]}, FILE),
    ("file", PURPOSE, {"data": ("a", b"1")}),
    ("file", PURPOSE, [("file", ("a", b"1")), ("file", ("b", b"1"))]),
    ("file", PURPOSE, {"file": ("a", b"")}),
    ("file", PURPOSE, {"file": ("a" * 256, b"1")}),
    ("file", PURPOSE | {"file": "text"}, {"other": ("a", b"1")}),
    ("name", PURPOSE | {"name": "x"}, FILE),
    ("expires_after", PURPOSE | {"expires_after": "3600"}, FILE),
    ("expires_after[anchor]", PURPOSE | {"expires_after[seconds]": "3600"}, FILE),
    ("expires_after[anchor]", PURPOSE | AFTER | {"expires_after[anchor]": "now"}, FILE),
    ("expires_after[seconds]", PURPOSE | {"expires_after[anchor]": "created_at"}, FILE),
    *(
        ("expires_after[seconds]", PURPOSE | AFTER | {"expires_after[seconds]": seconds}, FILE)
        for seconds in ("3599", "2592001", "-3600", "1e4", "²²²²", "9" * 5000)
    ),
]


async def test_a_wrong_form_is_refused_with_its_field(running: Running) -> None:
    for param, data, files in WRONG:
        response = await running.client.post("/v1/files", data=data, files=files)
        error = response.json().get("error")
        assert error is not None, (param, data)
        assert (response.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error"), error
        assert error["message"].endswith(".")
    raw = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    raw += b'--b\r\nContent-Disposition: form-data; name="file"; filename="a\0b"\r\n\r\n1\r\n--b--\r\n'
    kind = {"content-type": "multipart/form-data; boundary=b"}
    response = await running.client.post("/v1/files", content=raw, headers=kind)
    assert response.status_code == 400, response.text
    assert (await running.client.get("/v1/files")).json()["data"] == []
    assert not [path for path in running.home.rglob("*part*") if path.is_file()]
    assert await running.services.objects.list("files") == []


async def test_what_is_no_form_or_a_wrong_query_is_refused(running: Running) -> None:
    for options in ({"json": {"purpose": "batch"}}, {"content": b"x"}, {}):
        response = await running.client.post("/v1/files", **options)
        assert response.status_code == 400
        assert "multipart/form-data" in response.json()["error"]["message"]
    for query in ("limit=0", "limit=10001", "limit=x", "order=up", "purpose=x", "after=file-1"):
        response = await running.client.get(f"/v1/files?{query}")
        assert response.status_code == 400
        assert response.json()["error"]["param"] == query.partition("=")[0]


async def test_the_limit_is_the_files_own(app_factory: AppFactory) -> None:
    async with app_factory(max_file_bytes=5000, max_body_bytes=100, max_upload_bytes=100) as running:
        await upload(running.client, bytes(4000))
        response = await running.client.post("/v1/files", data=PURPOSE, files={"file": ("a", bytes(6000))})
        assert response.status_code == 413
        assert "max_file_bytes" in response.json()["error"]["message"]


async def test_ranges(running: Running) -> None:
    file_id = await upload(running.client, b"0123456789")
    url = f"/v1/files/{file_id}/content"
    whole = await running.client.get(url)
    assert (whole.status_code, whole.headers["content-length"], whole.headers["accept-ranges"]) == (200, "10", "bytes")
    for wanted, content, said in (
        ("bytes=2-4", b"234", "bytes 2-4/10"),
        ("bytes=7-", b"789", "bytes 7-9/10"),
        ("bytes=-4", b"6789", "bytes 6-9/10"),
        ("bytes=-40", b"0123456789", "bytes 0-9/10"),
        ("bytes=0-99", b"0123456789", "bytes 0-9/10"),
    ):
        part = await running.client.get(url, headers={"Range": wanted, "If-Range": whole.headers["etag"]})
        assert (part.status_code, part.content, part.headers["content-range"]) == (206, content, said)
    for ignored in ("bytes=4-2", "bytes=-", "lines=1-2", "bytes=1-2,4-5"):
        assert (await running.client.get(url, headers={"Range": ignored})).content == b"0123456789"
    stale = await running.client.get(url, headers={"Range": "bytes=2-4", "If-Range": '"other"'})
    assert (stale.status_code, stale.content) == (200, b"0123456789")
    outside = await running.client.get(url, headers={"Range": "bytes=10-"})
    assert (outside.status_code, outside.headers["content-range"]) == (416, "bytes */10")


async def test_a_file_that_is_deleted_while_it_is_sent_arrives_whole(running: Running) -> None:
    content = os.urandom(5 * 1024**2)
    file_id = await upload(running.client, content)
    sent: list[bytes] = []
    deletion: httpx.Response | None = None

    async def send(message: Any) -> None:
        nonlocal deletion
        if message["type"] == "http.response.body":
            sent.append(message.get("body", b""))
            if deletion is None:
                deletion = await running.client.delete(f"/v1/files/{file_id}")

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    path = f"/v1/files/{file_id}/content"
    scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": []}
    await running.app(scope, receive, send)
    assert deletion is not None
    assert deletion.status_code == 200
    assert b"".join(sent) == content
    assert (await running.client.get(path)).status_code == 404


async def test_a_large_upload_and_download_do_not_pass_through_memory(running: Running) -> None:
    size, piece = 50 * 1024**2, bytes(64 * 1024)

    async def body() -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(size // len(piece)):
            yield piece
        yield b"\r\n--b--\r\n"

    received = 0

    async def send(message: Any) -> None:
        nonlocal received
        received += len(message.get("body", b""))

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    tracemalloc.start()
    try:
        kind = {"content-type": "multipart/form-data; boundary=b"}
        response = await running.client.post("/v1/files", content=body(), headers=kind)
        path = f"/v1/files/{response.json()['id']}/content"
        scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": []}
        await running.app(scope, receive, send)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert response.json()["bytes"] == received == size
    assert peak < 8 * 1024**2


async def test_a_full_disk(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(durable, "copy_file", fail)
        response = await running.client.post("/v1/files", data=PURPOSE, files=FILE)
    assert response.status_code == 507
    assert await running.services.objects.list("files") == []
    await upload(running.client)


async def test_files_to_train_on_are_for_keys_that_may_train(app_factory: AppFactory) -> None:
    async with app_factory(api_key="admin") as running:
        keys = {}
        for scope in ("infer", "tune"):
            secret, _ = await running.services.keys.create(scope, scopes=[scope])
            keys[scope] = {"Authorization": f"Bearer {secret}"}
        client, infer, tune = running.client, keys["infer"], keys["tune"]
        assert (await client.get("/v1/files")).status_code == 401
        secret_id = await upload(client, headers=tune)
        open_ids = [await upload(client, headers=infer, data={"purpose": "batch"}) for _ in range(3)]
        refused = await client.post("/v1/files", data=PURPOSE, files=FILE, headers=infer)
        assert (refused.status_code, refused.json()["error"]["param"]) == (403, "purpose")
        page = (await client.get("/v1/files?limit=3", headers=infer)).json()
        assert ([file["id"] for file in page["data"]], page["has_more"]) == (open_ids[::-1], False)
        assert (await client.get("/v1/files?purpose=fine-tune", headers=infer)).json()["data"] == []
        assert len((await client.get("/v1/files", headers=tune)).json()["data"]) == 4
        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            url = f"/v1/files/{secret_id}{path}"
            unseen = await client.request(method, url, headers=infer)
            unknown = await client.request(method, url.replace(secret_id, "file-x"), headers=infer)
            assert unseen.status_code == 404
            assert unseen.text.replace(secret_id, "file-x") == unknown.text  # they look alike
        assert (await client.delete(f"/v1/files/{open_ids[0]}", headers=infer)).status_code == 200
        assert (await client.delete(f"/v1/files/{secret_id}", headers=tune)).status_code == 200
