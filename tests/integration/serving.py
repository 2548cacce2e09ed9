"""A real `tuneloop serve` process on a free port of this machine: started, watched, stopped. It knows no test."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
from openai import AsyncOpenAI, OpenAI

TUNELOOP = Path(sys.executable).with_name("tuneloop")
MODEL = "smollm2-135m"
PATIENCE_SECONDS = 120.0  # for what takes seconds on a quiet machine

T = TypeVar("T")


def wait_for(condition: Callable[[], T | None], what: str, *, seconds: float = PATIENCE_SECONDS) -> T:
    """The first truthy value of `condition`. Fails with `what` if there is none in time."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {seconds:g} s in vain: {what}"
        time.sleep(0.02)
    return value


def clean_environment(**changes: str) -> dict[str, str]:
    """This process's environment without settings of Tuneloop, so that no developer's own ones get in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TUNELOOP_")}
    return kept | changes


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended. One that nobody has reaped yet runs no more and holds no memory."""
    try:
        return process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


class Server:
    """One server and all that it starts. `arguments` are those of `tuneloop serve` beside home and port."""

    def __init__(self, home: Path, log: Path, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        self.home = home
        self.log = log
        self.port = 0
        self._arguments = arguments
        self._env = dict(env or {})
        self._popen: subprocess.Popen[bytes] | None = None
        self._http: httpx.Client | None = None
        self._seen: dict[int, psutil.Process] = {}

    def start(self, *, port: int = 0) -> "Server":
        """Start the process and wait until it answers; models may still be loading. `port` 0 takes a free one."""
        command = [str(TUNELOOP), "serve", *self._arguments, "--home", str(self.home), "--port", str(port)]
        begin = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self._popen = subprocess.Popen(
                [*command, "--log-format", "json"], stdout=log, stderr=log, env=clean_environment(**self._env)
            )
        listening = re.compile(r"Uvicorn running on http://127\.0\.0\.1:(\d+)")

        def announced() -> re.Match[str] | None:
            text = self.log.read_bytes()[begin:].decode(errors="replace")
            assert self.running, f"the server ended at start:\n{text}"
            return listening.search(text)

        self.port = int(wait_for(announced, "the server listens")[1])
        self._http = httpx.Client(base_url=self.url, timeout=PATIENCE_SECONDS)
        wait_for(lambda: self._answers("/health"), "the server answers")
        return self

    def wait_ready(self) -> "Server":
        wait_for(lambda: self._answers("/ready"), "the server is ready")
        self.workers()
        return self

    def _answers(self, probe: str) -> bool:
        assert self.running, f"the server ended:\n{self.log_text()}"
        try:
            return self.http.get(probe).status_code == 200
        except httpx.TransportError:  # its port is bound before it answers
            return False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def http(self) -> httpx.Client:
        """A client of this server, closed with it."""
        assert self._http is not None
        return self._http

    @property
    def running(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    @property
    def process(self) -> psutil.Process:
        assert self._popen is not None
        return psutil.Process(self._popen.pid)

    def sdk(self, api_key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=PATIENCE_SECONDS)

    def async_sdk(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_SECONDS)

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def workers(self) -> list[psutil.Process]:
        """All processes that the server has started and that still run."""
        found = [child for child in self.process.children(recursive=True) if not is_gone(child)]
        self._seen.update({child.pid: child for child in found})
        return found

    def card(self, model: str) -> dict[str, Any]:
        """A model's card of GET /v1/models/{id}."""
        answer = self.http.get(f"/v1/models/{model}")
        assert answer.status_code == 200, answer.text
        card: dict[str, Any] = answer.json()
        return card

    def status(self, model: str = MODEL) -> dict[str, Any]:
        status: dict[str, Any] = self.card(model)["status"]
        return status

    def worker(self, model: str = MODEL) -> psutil.Process:
        """The worker process of a base model that is loaded."""
        worker = psutil.Process(self.status(model)["pid"])
        self._seen[worker.pid] = worker
        return worker

    def metric(self, name: str, **labels: str) -> float:
        """The value of one series, 0 where there is none yet."""
        wanted = {f'{key}="{value}"' for key, value in labels.items()}
        for line in self.http.get("/metrics").text.splitlines():
            head, _, value = line.rpartition(" ")
            series, _, rest = head.partition("{")
            if series == name and wanted <= set(rest.removesuffix("}").split(",")):
                return float(value)
        return 0.0

    def running_rows(self) -> tuple[int, int]:
        """Rows that run and that wait in the model's engine, and requests in flight: (0, 0) when nothing is left."""
        status = self.status()
        return status["running"] + status["waiting"], status["in_flight"]

    def signal(self, number: signal.Signals) -> None:
        assert self._popen is not None
        self._popen.send_signal(number)

    def wait(self) -> int:
        """The exit status, once the process has ended."""
        assert self._popen is not None
        return self._popen.wait(PATIENCE_SECONDS)

    def kill(self) -> None:
        """kill -9, as the kernel or an impatient operator does it."""
        self.workers()
        self.signal(signal.SIGKILL)
        self.wait()
        self._close_client()

    def stop(self) -> None:
        """End whatever is left. Safe to repeat."""
        self._close_client()
        if self.running:
            self.workers()
            self.signal(signal.SIGTERM)
            try:
                self.wait()
            except subprocess.TimeoutExpired:
                self.signal(signal.SIGKILL)
                self.wait()
        for process in self._seen.values():
            if process.is_running() and not is_gone(process):
                process.kill()

    def _close_client(self) -> None:
        if self._http is not None:
            self._http.close()


def chat(prompt: str = "What is the capital of France?", model: str = MODEL, **fields: Any) -> dict[str, Any]:
    """A chat request at temperature 0; `fields` add to it or replace."""
    return {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0} | fields


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The OpenAI error object of a refusal, after checking its status and form."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


def parse_events(lines: list[str]) -> list[tuple[str, Any]]:
    """(event, data) of an event stream's lines; data is decoded unless it is `[DONE]`."""
    events: list[tuple[str, Any]] = []
    name = "message"
    for line in lines:
        if line.startswith("event:"):
            name = line.removeprefix("event:").strip()
        elif line.startswith("data:"):
            data = line.removeprefix("data:").strip()
            events.append((name, data if data == "[DONE]" else json.loads(data)))
        elif not line:
            name = "message"
    return events
