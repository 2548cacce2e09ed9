"""The worker's process: started with a socket pair, heard until it ends, and then a reason why. Knows no requests."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from asyncio.subprocess import Process
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec

from .config import TransformersConfig
from .protocol import HEADER_BYTES, FromWorker, ToWorker, frame, frame_length, from_worker_decoder

_LOG_LINES = 40  # kept of the worker's stderr, for the reason of its death
_LOG_LINE = 4096  # characters kept of a line without an end
_LAST_WORDS_SECONDS = 1.0  # for reading stderr to its end after a death
_END_SECONDS = 5.0  # from closing the socket to SIGKILL


# Waiting compute threads spin briefly, then sleep: the server, a trainer or another worker may want their core, and a
# thread that spins on for one that isn't scheduled costs a whole time slice in every operator. Huge pages spare the
# translation misses of weights and KV that are read once a step. What the user's environment says goes before.
_ENVIRONMENT = {
    "GOMP_SPINCOUNT": "2000",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "TOKENIZERS_PARALLELISM": "false",
}


class WorkerProcess:
    """`on_message` gets every message, `on_death` the reason once; both are called from the event loop."""

    def __init__(self, on_message: Callable[[FromWorker], None], on_death: Callable[[str], None]) -> None:
        self._on_message, self._on_death = on_message, on_death
        self._process: Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._log: deque[str] = deque(maxlen=_LOG_LINES)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self, path: Path, config: TransformersConfig) -> None:
        ours, theirs = socket.socketpair()
        settings = msgspec.json.encode({"path": str(path), "engine": msgspec.to_builtins(config)}).decode()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tuneloop.engines.transformers.worker",
                str(theirs.fileno()),
                settings,
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                env={**_ENVIRONMENT, **os.environ},
                start_new_session=True,  # Ctrl-C is the server's to handle: it drains first
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._tasks = [asyncio.create_task(self._receive(reader)), asyncio.create_task(self._keep_log())]

    def send(self, message: ToWorker) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(frame(message))

    async def close(self) -> None:
        """Close the socket, on which the worker ends; kill it if it doesn't. Safe to repeat."""
        if self._writer is not None:
            self._writer.close()
        process = self._process
        if process is not None and process.returncode is None:
            try:
                await asyncio.wait_for(process.wait(), _END_SECONDS)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                header = await reader.readexactly(HEADER_BYTES)
                self._on_message(from_worker_decoder.decode(await reader.readexactly(frame_length(header))))
        assert self._process is not None
        code = await self._process.wait()
        await asyncio.wait(self._tasks[1:], timeout=_LAST_WORDS_SECONDS)
        words = next((line for line in reversed(self._log) if line.strip()), "")
        self._on_death(f"it ended with {_exit_name(code)}" + (f" ({words})" if words else ""))

    async def _keep_log(self) -> None:
        """Read the worker's stderr to its end, so that its writes never block; progress bars end lines by a return."""
        assert self._process is not None and self._process.stderr is not None
        rest = ""
        while piece := await self._process.stderr.read(1 << 14):
            *lines, rest = (rest + piece.decode("utf-8", "replace")).replace("\r", "\n").split("\n")
            self._log.extend(lines)
            rest = rest[-_LOG_LINE:]
        self._log.append(rest)


def _exit_name(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
