"""Processes on this machine: each phase in a session of its own, which no signal to the server reaches.

A phase holds the run folder's lock from its first moment to its last, so its life is the kernel's knowledge and no
process number that somebody else may have by now.
"""

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import psutil

from ...storage.errors import Conflict, Unavailable
from ..run_folder import Phase, RunFolder
from .base import Handle, Launcher

_LOG_LINES = 3
_LOG_BYTES = 8192


class LocalLauncher(Launcher):
    """`python -m tuneloop.finetune`, by torchrun where a run has several processes."""

    name: ClassVar[str] = "local"

    def __init__(self) -> None:
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    async def start(self, run: RunFolder, phase: Phase, *, processes: int = 1, threads: int | None = None) -> Handle:
        """As Launcher says."""
        return await asyncio.to_thread(self._start, run, phase, processes, threads)

    async def find(self, run: RunFolder) -> Handle | None:
        """As Launcher says. Without a note of its number a process can be waited for, and not be signalled."""
        return await asyncio.to_thread(lambda: run.read_process() if run.alive() else None)

    async def alive(self, run: RunFolder, handle: Handle) -> bool:
        """As Launcher says. Reaps what has ended."""
        child = self._children.get(int(handle["pid"]))
        if child is not None:
            child.poll()
        return await asyncio.to_thread(run.alive)

    async def exit_reason(self, run: RunFolder, handle: Handle) -> str:
        """As Launcher says; the exit status is known only to the server process that started the phase."""
        child = self._children.get(int(handle["pid"]))
        status = None if child is None else child.poll()
        return f"{_described(status)}{await asyncio.to_thread(_last_lines, run.log)}"

    async def stop(self, run: RunFolder, handle: Handle, *, force: bool = False) -> None:
        """As Launcher says. A group is signalled only while its leader is the process that was started."""
        leader = _leader(handle)
        if not handle["pid"] or (leader is None and not await asyncio.to_thread(run.alive)):
            return
        with suppress(ProcessLookupError, PermissionError):
            if force:
                os.killpg(int(handle["pid"]), signal.SIGKILL)
            elif leader is not None:
                leader.send_signal(signal.SIGTERM)

    def _start(self, run: RunFolder, phase: Phase, processes: int, threads: int | None) -> Handle:
        command = [sys.executable, "-m", "tuneloop.finetune", str(run.path), phase]
        if phase == "train" and processes > 1:
            torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
            command[2:3] = [*torchrun, "tuneloop.finetune"]
        try:
            lock = run.take_lock()
        except BlockingIOError:
            raise Conflict(f"A process works in {run.path} already; wait for its end, or stop it.") from None
        try:
            with run.log.open("ab") as log:
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=_environment(threads),
                    cwd=run.path,
                    pass_fds=(lock,),
                    start_new_session=True,
                )
        except OSError as error:
            raise Unavailable(f"The trainer cannot be started: {error.strerror or error}.") from error
        finally:
            os.close(lock)
        self._children[child.pid] = child
        handle = {"pid": child.pid, "started": psutil.Process(child.pid).create_time()}
        run.write_process(handle)
        return handle


def _environment(threads: int | None) -> dict[str, str]:
    """The server's own, so that proxies and tokens hold; this package is found wherever the process stands."""
    environment = dict(os.environ)
    if threads is not None:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return environment | {"TOKENIZERS_PARALLELISM": "true", "PYTHONUNBUFFERED": "1"}


def _leader(handle: Handle) -> psutil.Process | None:
    try:
        process = psutil.Process(int(handle["pid"]))
        return process if abs(process.create_time() - float(handle["started"])) < 1 else None
    except psutil.NoSuchProcess:
        return None


def _described(status: int | None) -> str:
    if status is None:
        return "The trainer ended without a word."
    if status == -signal.SIGKILL:
        return "The trainer was killed (SIGKILL), perhaps by the system because memory was short."
    if status < 0:
        return f"The trainer was ended by {signal.Signals(-status).name}."
    return f"The trainer ended with exit status {status}."


def _last_lines(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_BYTES))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except FileNotFoundError:
        return ""
    return f" Its last lines: {' | '.join(lines[-_LOG_LINES:])}" if lines else ""
