"""Uploads to disk, names in paths, and downloads as a stream."""

import io
import tarfile
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from tuneloop.server.adapters import paths
from tuneloop.server.adapters.archive_stream import FILES, tar_gz
from tuneloop.server.multipart import Upload, receive_upload
from tuneloop.storage.errors import InvalidInput, TooLarge

from .conftest import Running


def form(**parts: object) -> tuple[bytes, str]:
    request = httpx.Request("POST", "http://test", **parts)  # type: ignore[arg-type]
    return request.read(), request.headers["content-type"]


async def receive(body: bytes, content_type: str, folder: Path, step: int = 7) -> Upload:
    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), step):
            yield body[start : start + step]

    return await receive_upload(chunks(), content_type, folder)


@pytest.mark.parametrize("step", [1, 7, 100_000])
async def test_files_and_fields_arrive_whole(tmp_path: Path, step: int) -> None:
    data = bytes(range(256)) * 20
    body, kind = form(
        data={"name": "grüße", "base": "b"}, files=[("file", ("../../etc/a.bin", data)), ("file", ("b", b""))]
    )
    upload = await receive(body, kind, tmp_path, step)
    assert upload.fields == {"name": "grüße", "base": "b"}
    assert [file.filename for file in upload.files] == ["a.bin", "b"]
    assert [file.path.read_bytes() for file in upload.files] == [data, b""]
    assert all(file.path.parent == tmp_path for file in upload.files)


async def test_a_large_file_does_not_pass_through_memory(tmp_path: Path) -> None:
    size, piece = 32 * 1024**2, bytes(64 * 1024)

    async def chunks() -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(size // len(piece)):
            yield piece
        yield b"\r\n--b--\r\n"

    tracemalloc.start()
    try:
        upload = await receive_upload(chunks(), "multipart/form-data; boundary=b", tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert upload.files[0].path.stat().st_size == size
    assert peak < 4 * 1024**2


async def test_windows_paths_lose_their_folders_too(tmp_path: Path) -> None:
    body, kind = form(files={"file": ("C:\\x\\a.zip", b"1")})
    assert (await receive(body, kind, tmp_path)).files[0].filename == "a.zip"


async def test_a_cut_body_is_refused(tmp_path: Path) -> None:
    body, kind = form(files={"file": ("a", b"1" * 100)})
    for length in (0, 10, len(body) // 2, len(body) - 10):
        folder = tmp_path / str(length)
        folder.mkdir()
        with pytest.raises(InvalidInput):
            await receive(body[:length], kind, folder)


async def test_a_client_that_leaves_in_the_middle_leaves_nothing(running: Running) -> None:
    body, kind = form(data={"name": "x"}, files={"file": ("a", b"1" * 100)})
    messages: list[dict[str, object]] = [
        {"type": "http.request", "body": body[:150], "more_body": True},
        {"type": "http.disconnect"},
    ]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/adapters",
        "query_string": b"",
        "headers": [(b"content-type", kind.encode())],
    }
    sent: list[object] = []

    async def receive_next() -> dict[str, object]:
        return messages.pop(0)

    async def send(message: object) -> None:
        sent.append(message)

    await running.app(scope, receive_next, send)
    assert sent == []
    assert not list(running.home.rglob("part-*"))
    metrics = (await running.client.get("/metrics")).text
    assert 'http_requests_total{handler="/v1/adapters",method="POST",status="4xx"} 1.0' in metrics


@pytest.mark.parametrize("kind", ["", "text/plain", "multipart/form-data", "multipart/form-data; boundary=other"])
async def test_what_is_no_form_is_refused(tmp_path: Path, kind: str) -> None:
    body, _ = form(files={"file": ("a", b"1")})
    with pytest.raises(InvalidInput):
        await receive(body, kind, tmp_path)


async def test_repeated_fields_and_too_much_are_refused(tmp_path: Path) -> None:
    body, kind = form(data={"name": ["a", "b"]}, files={"file": ("a", b"1")})
    with pytest.raises(InvalidInput, match="twice"):
        await receive(body, kind, tmp_path)
    body, kind = form(files=[("file", (str(n), b"1")) for n in range(17)])
    (tmp_path / "2").mkdir()
    with pytest.raises(TooLarge):
        await receive(body, kind, tmp_path / "2", 10_000)
    body, kind = form(data={"name": "x" * 70_000}, files={"file": ("a", b"1")})
    (tmp_path / "3").mkdir()
    with pytest.raises(TooLarge):
        await receive(body, kind, tmp_path / "3", 10_000)


def test_a_download_is_a_real_archive(tmp_path: Path) -> None:
    contents = {FILES[0]: b"{}", FILES[1]: bytes(range(256)) * 8192}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    stream = tar_gz(tmp_path, 1_700_000_000)
    first = next(stream)
    for name in contents:
        (tmp_path / name).unlink()  # a version that is deleted meanwhile does not cut the download
    with tarfile.open(fileobj=io.BytesIO(first + b"".join(stream)), mode="r:gz") as archive:
        members = {member.name: archive.extractfile(member) for member in archive.getmembers()}
        assert {name: handle.read() for name, handle in members.items() if handle is not None} == contents


def _routes() -> TestClient:
    paths.register()

    def route(suffix: str, name: str) -> Route:
        async def endpoint(request: Request) -> PlainTextResponse:
            values = ",".join(str(value) for value in request.path_params.values())
            return PlainTextResponse(f"{name}|{values}")

        return Route(f"/a/{{name:adapter}}{suffix}", endpoint)

    return TestClient(
        Starlette(
            routes=[
                route("", "one"),
                route("/versions", "versions"),
                route("/versions/{version}", "version"),
                route("/aliases/{alias}", "alias"),
                route("/download", "download"),
            ]
        )
    )


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/a/support", "one|support"),
        ("/a/org/support", "one|org/support"),
        ("/a/org%2Fsupport", "one|org/support"),
        ("/a/ft:base:me:x1/versions", "versions|ft:base:me:x1"),
        ("/a/a/b/c/versions/3", "version|a/b/c,3"),
        ("/a/org/s/aliases/prod", "alias|org/s,prod"),
        ("/a/versions/versions", "versions|versions"),
        ("/a/org/versions2", "one|org/versions2"),
    ],
)
def test_names_with_slashes_reach_their_route(path: str, expected: str) -> None:
    assert _routes().get(path).text == expected


@given(st.lists(st.sampled_from(["a", "b:c", "versions", "pin", "x.y", "aliases2"]), min_size=1, max_size=5))
def test_a_name_that_is_accepted_is_reachable(segments: list[str]) -> None:
    name = "/".join(segments)
    try:
        paths.check_name_fits_paths(name)
    except InvalidInput:
        assert {"versions", "pin"} & set(segments[1:])
        return
    assert _routes().get(f"/a/{name}/versions/1").text == f"version|{name},1"
