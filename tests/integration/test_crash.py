"""kill -9 of the engine worker, of the server, and during an upload: what must survive does, and nothing is left."""

import asyncio
import re
import signal
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tuneloop.adapters.base import ModuleShape

from .conftest import Forcing, StartServer
from .peft_files import random_adapter
from .serving import MODEL, PATIENCE_SECONDS, Server, chat, is_gone, parse_events, wait_for

STREAMS = 16
MIB = 1024**2


@pytest.fixture(scope="module")
def server(start_module_server: StartServer) -> Server:
    """A server of this module's own: others would be disturbed by what happens here."""
    return start_module_server(MODEL)


async def kill_during_streams(server: Server, model: str) -> list[list[tuple[str, Any]]]:
    """Begin 16 streams, kill the worker once each has had a token, and read them to their ends."""
    worker = server.worker()
    begun = [asyncio.Event() for _ in range(STREAMS)]
    body = chat(model=model, stream=True, max_completion_tokens=2000, ignore_eos=True)

    async def read(http: httpx.AsyncClient, number: int) -> list[tuple[str, Any]]:
        lines: list[str] = []
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                lines.append(line)
                if '"delta":{"content":' in line:
                    begun[number].set()
        return parse_events(lines)

    limits = httpx.Limits(max_keepalive_connections=0, max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_SECONDS, limits=limits) as http:
        streams = [asyncio.create_task(read(http, number)) for number in range(STREAMS)]
        await asyncio.gather(*(event.wait() for event in begun))
        worker.send_signal(signal.SIGKILL)
        return await asyncio.gather(*streams)


async def test_a_killed_worker_ends_its_streams_with_errors_and_comes_back(
    server: Server, shapes: Mapping[str, ModuleShape]
) -> None:
    adapter = random_adapter(shapes).tar_gz()
    created = server.http.post("/v1/adapters", data={"name": "crash", "base": MODEL}, files={"file": ("a", adapter)})
    assert created.status_code == 200, created.text
    before = server.http.post("/v1/chat/completions", json=chat(model="crash", max_completion_tokens=12)).json()
    await check_one_death(server, "crash", before)  # the first one also opens what stays open: pools, threads

    descriptors, memory = server.process.num_fds(), server.process.memory_info().rss
    worker_memory = server.worker().memory_info().rss
    for _ in range(2):
        await check_one_death(server, "crash", before)
    wait_for(lambda: server.process.num_fds() <= descriptors, "no file or socket stays open")
    assert server.process.memory_info().rss < memory + 64 * MIB
    assert server.worker().memory_info().rss < worker_memory + 128 * MIB
    assert len(server.workers()) == 1
    assert [c for c in server.process.net_connections() if c.status == psutil.CONN_CLOSE_WAIT] == []


async def check_one_death(server: Server, model: str, before: dict[str, Any]) -> None:
    """One worker's death, from its streams' errors to the first answer of the next worker."""
    worker = server.worker()
    for events in await kill_during_streams(server, model):
        *tokens, (kind, last) = events
        assert kind == "error"
        assert last["error"]["type"] == "server_error"
        assert last["error"]["code"] == "engine_died"
        assert "SIGKILL" in last["error"]["message"]
        assert all(name == "message" and data != "[DONE]" for name, data in tokens)

    not_ready = server.http.get("/ready")
    assert not_ready.status_code == 503
    (reason,) = not_ready.json()["reasons"]
    assert reason.startswith(f"The model '{MODEL}' ")
    assert server.http.get("/health").status_code == 200

    # The next request waits for the reload instead of failing.
    after = server.http.post("/v1/chat/completions", json=chat(model=model, max_completion_tokens=12))
    assert after.status_code == 200, after.text
    assert after.json()["choices"][0]["message"] == before["choices"][0]["message"]
    server.wait_ready()
    assert is_gone(worker)
    assert server.worker().pid != worker.pid
    wait_for(lambda: server.running_rows() == (0, 0), "no row of the dead worker is left")


def everything_below(folder: Path) -> set[str]:
    """All paths below a home that adapters could leave something in; lock files of running processes don't count."""
    return {
        str(path.relative_to(folder))
        for part in ("adapters", "blobs")
        for path in (folder / part).rglob("*")
        if not re.search(r"adapters/instances(/|$)", path.as_posix())
    }


def begin_upload(server: Server, name: str) -> socket.socket:
    """The first part of a form with a file that never ends, once it is on disk; the caller closes the connection."""
    head = (
        '--part\r\nContent-Disposition: form-data; name="name"\r\n\r\n'
        f"{name}\r\n--part\r\n"
        'Content-Disposition: form-data; name="base"\r\n\r\n'
        f"{MODEL}\r\n--part\r\n"
        'Content-Disposition: form-data; name="file"; filename="adapter.tar.gz"\r\n\r\n'
    )
    request = (
        f"POST /v1/adapters HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Length: {1000 * MIB}\r\n"
        f"Content-Type: multipart/form-data; boundary=part\r\n\r\n{head}"
    )
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(request.encode() + bytes(3 * MIB))
    wait_for(lambda: staged_bytes(server.home) >= MIB, "the upload arrives on disk")
    return connection


def staged_bytes(home: Path) -> int:
    return sum(path.stat().st_size for path in (home / "adapters" / "instances").rglob("*") if path.is_file())


def test_a_killed_server_keeps_what_it_acknowledged_and_nothing_else(
    start_server: StartServer, forcing: Forcing, words: Mapping[str, int]
) -> None:
    server = start_server(MODEL)
    port, (first, second) = server.port, list(words)[:2]
    files = {"file": ("adapter.tar.gz", forcing(first).tar_gz())}
    assert server.http.post("/v1/adapters", data={"name": "kept", "base": MODEL}, files=files).status_code == 200
    files = {"file": ("adapter.tar.gz", forcing(second).tar_gz())}
    assert server.http.put("/v1/adapters/kept", files=files).status_code == 200
    assert server.http.put("/v1/adapters/kept/aliases/prod", json={"version": 1}).status_code == 200
    split = {"weights": {"1": 0.25, "2": 0.75}}
    assert server.http.put("/v1/adapters/kept/aliases/split", json=split).status_code == 200
    listed, versions = server.http.get("/v1/adapters").json(), server.http.get("/v1/adapters/kept/versions").json()
    on_disk = everything_below(server.home)
    assert sum("adapter_model" in path for path in on_disk) == 2

    with begin_upload(server, "half"):
        worker = server.worker()
        server.kill()
    wait_for(lambda: is_gone(worker), "the worker ends with its server")

    server.start(port=port).wait_ready()
    assert everything_below(server.home) == on_disk
    assert staged_bytes(server.home) == 0
    assert server.http.get("/v1/adapters").json() == listed
    assert server.http.get("/v1/adapters/kept/versions").json() == versions
    for model, word in (("kept", second), ("kept@1", first), ("kept@prod", first), (MODEL, "The")):
        answer = server.http.post("/v1/chat/completions", json=chat(model=model, max_completion_tokens=2))
        assert answer.json()["choices"][0]["message"]["content"].split()[0] == word
    (models,) = [{card["id"] for card in server.http.get("/v1/models").json()["data"]}]
    assert models == {MODEL, "kept"}


def test_a_client_that_dies_during_its_upload_leaves_nothing(server: Server) -> None:
    on_disk = everything_below(server.home)
    with begin_upload(server, "half"):
        assert staged_bytes(server.home) > 0
    wait_for(lambda: staged_bytes(server.home) == 0, "the staging folder goes")
    assert everything_below(server.home) == on_disk
    assert server.http.get("/v1/adapters/half").status_code == 404
