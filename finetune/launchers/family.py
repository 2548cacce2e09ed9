"""All processes of a run on this machine, whoever their parent is by now. It knows them by a mark in their environment.

Sessions and groups do not hold them together: torchrun gives each of its workers a session of its own, and workers
outlive a torchrun that was killed.
"""

import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "TUNELOOP_RUN"
_SECONDS = 10.0  # for what was killed to be gone; the kernel needs milliseconds


def mark(run: Path) -> dict[str, str]:
    """What a process of the run has in its environment, and so all that it starts."""
    return {MARK: str(run.resolve())}


def members(run: Path) -> list[psutil.Process]:
    """Those that live now, the oldest first."""
    return sorted(_members(str(run.resolve())), key=_age)


def kill(run: Path) -> bool:
    """End them all at once; whether there were any. They are gone when this returns."""
    found = members(run)
    for process in found:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process.send_signal(signal.SIGKILL)  # psutil looks first whether the number is still this process's
    psutil.wait_procs([process for process in found if process.is_running()], timeout=_SECONDS)
    return bool(found)


def leader(run: Path, pid: int, started: float) -> psutil.Process | None:
    """The process of this number, if it is still the one that was started: by its mark, or by when it began.

    The mark alone is not there yet in the instant of its start, and the time moves when the clock is set.
    """
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE and (
            abs(process.create_time() - started) < 1 or process.environ().get(MARK) == str(run.resolve())
        ):
            return process
    return None


def _members(marked: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            if process.environ().get(MARK) == marked:
                yield process


def _age(process: psutil.Process) -> tuple[float, int]:
    with suppress(psutil.NoSuchProcess):
        return process.create_time(), process.pid
    return float("inf"), process.pid
