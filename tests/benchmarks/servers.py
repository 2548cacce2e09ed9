"""Starts the servers that are compared, one at a time, and stops them with all their processes."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

START_SECONDS = 600


@dataclass(frozen=True, kw_only=True)
class Running:
    url: str
    start_seconds: float  # from exec to ready
    process: psutil.Process

    @property
    def resident_bytes(self) -> int:
        """Of the whole process tree."""
        members = [self.process, *self.process.children(recursive=True)]
        return sum(p.memory_info().rss for p in members if p.is_running())


@contextmanager
def running(command: Sequence[str], environment: dict[str, str], port: int, ready: str, log: Path) -> Iterator[Running]:
    """The server while the block runs; `ready` is the path that answers 200 when it can serve."""
    began = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=output, stderr=output, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(f"{url}{ready}", process, log)
        yield Running(url=url, start_seconds=time.perf_counter() - began, process=psutil.Process(process.pid))
    finally:
        _stop(process)


def _wait(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(
                f"the server ended with {process.returncode}:\n{log.read_text('utf-8', 'replace')[-3000:]}"
            )
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"the server was not ready in {START_SECONDS} s; see {log}")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    members: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        members = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for member in psutil.wait_procs(members, timeout=10)[1]:
        member.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def tuneloop(home: Path, log: Path, *, roots: Path, **settings: str) -> Iterator[Running]:
    """Our server on the embedded model; `settings` are TUNELOOP_* without the prefix, in lower case."""
    port = free_port()
    environment = {f"TUNELOOP_{k.upper()}": v for k, v in settings.items()}
    environment |= {"TUNELOOP_HOME": str(home), "TUNELOOP_ADAPTER_ROOTS": str(roots), "TUNELOOP_LOG_LEVEL": "warning"}
    command = [sys.executable, "-m", "tuneloop.server.cli", "serve", "smollm2-135m", "--port", str(port)]
    with running(command, environment, port, "/ready", log) as server:
        yield server


@contextmanager
def vllm(executable: Path, model: Path, log: Path, adapters: dict[str, Path]) -> Iterator[Running]:
    """vLLM's own server for CPUs in float32, with LoRA on and `adapters` known from the start."""
    port = free_port()
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{executable.parent}:{os.environ['PATH']}",
    }
    # not `vllm serve`: that command asks for the metadata of a package named vllm, which vllm-cpu doesn't have
    command = [str(executable.parent / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "smollm2-135m", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
    command += ["--enable-lora", "--max-loras", "8", "--max-lora-rank", "8", "--max-num-seqs", "64"]
    if adapters:
        command += ["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())]
    with running(command, environment, port, "/health", log) as server:
        yield server
