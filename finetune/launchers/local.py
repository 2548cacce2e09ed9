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
from typing import Any, ClassVar

import psutil

from ...storage.errors import Conflict, NotFound, Unavailable
from ..run_folder import Phase, RunFolder
from . import family
from .base import Handle, Launcher

_LOG_LINES = 3
_LOG_BYTES = 8192

# Children belong to the process and not to a launcher, which may go while they live.
_children: dict[int, subprocess.Popen[bytes]] = {}


class LocalLauncher(Launcher):
    """`python -m tuneloop.finetune`, by torchrun where a run has several processes."""

    name: ClassVar[str] = "local"

    def __init__(self, module: str = "tuneloop.finetune") -> None:
        self._module = module

    async def start(self, run: RunFolder, phase: Phase, *, processes: int = 1, threads: int | None = None) -> Handle:
        """As Launcher says."""
        return await asyncio.to_thread(self._start, run, phase, processes, threads)

    async def find(self, run: RunFolder) -> Handle | None:
        """As Launcher says."""
        return await asyncio.to_thread(_find, run)

    async def alive(self, run: RunFolder, handle: Handle) -> bool:
        """As Launcher says. Reaps what has ended, and ends what a dead process left behind."""
        _poll(handle)
        return await asyncio.to_thread(_alive, run, handle)

    async def exit_reason(self, run: RunFolder, handle: Handle) -> str:
        """As Launcher says; the exit status is known only to the server process that started the phase."""
        status = _poll(handle)
        short = await asyncio.to_thread(_kernel_kills) > int(handle.get("kernel_kills", 0))
        return f"{_described(status, memory_short=short)}{await asyncio.to_thread(_last_lines, run.log)}"

    async def stop(self, run: RunFolder, handle: Handle, *, force: bool = False) -> None:
        """As Launcher says. Only processes of this run are ever signalled, never what has their number by now."""
        await asyncio.to_thread(_stop, run, handle, force=force)

    def _start(self, run: RunFolder, phase: Phase, processes: int, threads: int | None) -> Handle:
        command = [sys.executable, "-m", self._module, str(run.path), phase]
        if phase == "train" and processes > 1:
            torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
            command[2:2] = torchrun
        try:
            lock = run.take_lock()
        except BlockingIOError:
            raise Conflict(f"A process works in {run.path} already; wait for its end, or stop it.") from None
        except FileNotFoundError:
            raise NotFound(f"The folder of the run, {run.path}, is gone.") from None
        try:
            family.kill(run.path)  # workers of a torchrun that was killed would write into the same log
            with run.log.open("ab") as log:
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=_environment(threads) | family.mark(run.path),
                    cwd=run.path,
                    pass_fds=(lock,),
                    start_new_session=True,
                )
        except OSError as error:
            raise Unavailable(f"The trainer cannot be started: {error.strerror or error}.") from error
        finally:
            os.close(lock)
        _children[child.pid] = child
        return _handle(psutil.Process(child.pid))


def _environment(threads: int | None) -> dict[str, str]:
    """The server's own, so that proxies and tokens hold; this package is found wherever the process stands."""
    environment = dict(os.environ)
    if threads is not None:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if environment.get("PYTHONPATH"):
        paths = environment["PYTHONPATH"].split(os.pathsep)
        environment["PYTHONPATH"] = os.pathsep.join(str(Path(path).absolute()) for path in paths if path)
    # Nothing in the folder where a process stands is ever imported: that of a run has a `data` folder.
    return environment | {"TOKENIZERS_PARALLELISM": "true", "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}


def _poll(handle: Handle) -> int | None:
    """The exit status of a child of this process that has ended, which is thereby reaped."""
    child = _children.get(int(handle["pid"]))
    return None if child is None else child.poll()


def _find(run: RunFolder) -> Handle | None:
    if not run.alive():
        return None
    found = family.members(run.path)  # the oldest is the one that was started; the others are its children
    return _handle(found[0]) if found else None


def _alive(run: RunFolder, handle: Handle) -> bool:
    """By the lock. A child that holds it while the process itself is gone does nobody's work any more."""
    if not run.alive():
        return False
    if family.leader(run.path, int(handle["pid"]), float(handle["started"])) is None:
        family.kill(run.path)
        return run.alive()
    return True


def _stop(run: RunFolder, handle: Handle, *, force: bool) -> None:
    process = family.leader(run.path, int(handle["pid"]), float(handle["started"]))
    if process is not None:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL if force else signal.SIGTERM)
    if force:
        family.kill(run.path)


def _handle(process: psutil.Process) -> dict[str, Any]:
    return {"pid": process.pid, "started": process.create_time(), "kernel_kills": _kernel_kills()}


def _kernel_kills() -> int:
    """How many processes the kernel has ended for lack of memory since the machine started; 0 where it is not told."""
    with suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _described(status: int | None, *, memory_short: bool) -> str:
    killer = " The kernel's out-of-memory killer was at work meanwhile, so perhaps the memory did not suffice."
    why = killer if memory_short else ""
    if status is None:
        return f"The trainer ended without a word.{why}"
    if status == -signal.SIGKILL:
        return f"The trainer was killed (SIGKILL).{why}"
    if status < 0:
        return f"The trainer was ended by {_signal_name(-status)}.{why}"
    return f"The trainer ended with exit status {status}.{why}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time one
        return f"signal {number}"


def _last_lines(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_BYTES))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except FileNotFoundError:
        return ""
    return f" Its last lines: {' | '.join(lines[-_LOG_LINES:])}" if lines else ""
