"""The server as a process on a real socket: start, drain on SIGTERM, and the end of the grace time."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from .conftest import write_checkpoint

CHILD = Path(__file__).with_name("server_run_child.py")
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "stream": True}


@dataclass(kw_only=True)
class Child:
    process: subprocess.Popen[str]
    client: httpx.Client

    def wait_ready(self) -> None:
        while True:  # the test's own timeout ends it
            assert self.process.poll() is None, self.process.stderr
            try:
                if self.client.get("/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.02)

    def lines(self) -> list[dict[str, object]]:
        """The log, once the process has ended."""
        _, errors = self.process.communicate(timeout=60)
        return [json.loads(line) for line in errors.splitlines()]


def start(tmp_path: Path, grace_seconds: float) -> Child:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    checkpoint = write_checkpoint(tmp_path / "tiny")
    arguments = [sys.executable, str(CHILD), str(checkpoint), str(tmp_path / "home"), str(port), str(grace_seconds)]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    return Child(process=process, client=httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60))


@pytest.fixture
def patient(tmp_path: Path) -> Iterator[Child]:
    child = start(tmp_path, 60)
    with child.client:
        yield child
    child.process.kill()
    child.process.wait()


@pytest.fixture
def hasty(tmp_path: Path) -> Iterator[Child]:
    child = start(tmp_path, 0)
    with child.client:
        yield child
    child.process.kill()
    child.process.wait()


def stream(child: Child, begun: threading.Event, received: list[str]) -> None:
    with child.client.stream("POST", "/v1/chat/completions", json=BODY) as response:
        for line in response.iter_lines():
            received.append(line)
            if '"Hello' in line or "Hello" in line:
                begun.set()


def begin_stream(child: Child) -> tuple[threading.Thread, list[str]]:
    begun, received = threading.Event(), list[str]()
    thread = threading.Thread(target=stream, args=(child, begun, received))
    thread.start()
    assert begun.wait(60)
    return thread, received


def test_a_stream_outlives_sigterm_and_new_requests_do_not(patient: Child) -> None:
    patient.wait_ready()
    thread, received = begin_stream(patient)
    patient.process.send_signal(signal.SIGTERM)
    while (ready := patient.client.get("/ready")).status_code == 200:
        time.sleep(0.005)
    assert ready.json()["reasons"] == ["the server is shutting down"]
    refused = patient.client.post("/v1/chat/completions", json=BODY)
    assert refused.status_code == 503
    assert refused.headers["connection"] == "close"
    assert "retry-after" in refused.headers
    thread.join()
    text = "".join(
        choice["delta"].get("content") or ""
        for line in received
        if line.startswith("data: {")
        for choice in json.loads(line.removeprefix("data: "))["choices"]
    )
    assert text.endswith("the end")
    assert "data: [DONE]" in received
    lines = patient.lines()
    assert patient.process.returncode == 0
    assert any(line["event"] == "draining" for line in lines)
    access = next(line for line in lines if line.get("path") == "/v1/chat/completions" and line.get("status") == 200)
    assert str(access["request_id"]).startswith("req_")


def test_a_stream_is_told_when_the_grace_time_is_over(hasty: Child) -> None:
    hasty.wait_ready()
    thread, received = begin_stream(hasty)
    hasty.process.send_signal(signal.SIGTERM)
    thread.join()
    assert "event: error" in received
    assert "data: [DONE]" not in received
    hasty.lines()
    assert hasty.process.returncode == 0


def test_an_idle_server_ends_at_once(patient: Child) -> None:
    patient.wait_ready()
    patient.process.send_signal(signal.SIGINT)
    assert not [line for line in patient.lines() if line["level"] in ("warning", "error", "critical")]
    assert patient.process.returncode == 0


def test_a_killed_upload_leaves_nothing_behind(tmp_path: Path) -> None:
    child = start(tmp_path, 0)
    child.wait_ready()
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.zip"\r\n\r\n' + bytes(2 * 1024**2)
    request = b"POST /v1/adapters HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    with socket.create_connection(("127.0.0.1", child.client.base_url.port or 0)) as connection:
        connection.sendall(request + b"Content-Length: 9000000\r\n\r\n" + head)
        while not any(part.stat().st_size for part in (tmp_path / "home").rglob("part-*")):
            time.sleep(0.02)
        child.process.kill()
        child.process.communicate()
    child.client.close()
    again = start(tmp_path, 0)
    with again.client:
        again.wait_ready()
        assert not list((tmp_path / "home").rglob("part-*"))
        assert again.client.get("/v1/adapters").json()["data"] == []
        again.process.send_signal(signal.SIGTERM)
        again.lines()
    assert again.process.returncode == 0
