"""SIGTERM during streams: not ready first, no new work, every stream to its end, exit status 0."""

import json
import select
import signal
import socket
import threading
from queue import Queue

import httpx

from .conftest import StartServer
from .serving import MODEL, PATIENCE_SECONDS, Server, chat, is_gone, parse_events, wait_for

STREAMS = 4
TOKENS = 150


def read_stream(server: Server, begun: threading.Event, results: "Queue[list[str]]") -> None:
    lines: list[str] = []
    body = chat(stream=True, max_completion_tokens=TOKENS, ignore_eos=True, stream_options={"include_usage": True})
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=PATIENCE_SECONDS) as response:
        for line in response.iter_lines():
            lines.append(line)
            if '"content":"The' in line:
                begun.set()
    results.put(lines)


def answer_to_a_late_body(server: Server) -> bytes:
    """All that a client gets that sends its body a moment after its headers."""
    body = json.dumps(chat()).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode())
        select.select([connection], [], [], 0.2)
        connection.sendall(body)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def test_streams_outlive_sigterm(start_server: StartServer) -> None:
    server = start_server(MODEL, "--grace-seconds", str(PATIENCE_SECONDS))
    worker = server.worker()
    results: Queue[list[str]] = Queue()
    begun = [threading.Event() for _ in range(STREAMS)]
    threads = [threading.Thread(target=read_stream, args=(server, event, results)) for event in begun]
    for thread in threads:
        thread.start()
    for event in begun:
        assert event.wait(PATIENCE_SECONDS)

    server.signal(signal.SIGTERM)
    not_ready = wait_for(lambda: answer if (answer := server.http.get("/ready")).status_code == 503 else None, "/ready")
    assert not_ready.json()["reasons"] == ["the server is shutting down"]
    assert results.empty(), "the streams still run"
    refused = server.http.post("/v1/chat/completions", json=chat())
    assert refused.status_code == 503
    assert "retry-after" in refused.headers and refused.headers["connection"] == "close"
    late = answer_to_a_late_body(server)
    assert late.startswith(b"HTTP/1.1 503 ") and late.endswith(b"}}"), "the answer is whole, whenever the body comes"
    assert server.http.get("/health").status_code == 200

    for thread in threads:
        thread.join()
    for _ in threads:
        *_, (_, usage), (_, done) = parse_events(results.get_nowait())
        assert done == "[DONE]"
        assert usage["usage"]["completion_tokens"] == TOKENS
    assert server.wait() == 0
    assert is_gone(worker)
