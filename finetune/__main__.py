"""`python -m tuneloop.finetune <run folder> prepare|train`: one phase of a run, in a process of its own.

Whatever ends the phase is in the run's event log before the process ends, unless it is killed.
"""

import os
import sys
from pathlib import Path

from .events import EventWriter
from .run_folder import RunFolder


def main(arguments: list[str]) -> int:
    """Exit status 0 if the phase did its work or was asked to stop, 1 if it failed and said why."""
    if len(arguments) != 2 or arguments[1] not in ("prepare", "train"):
        sys.stderr.write("usage: python -m tuneloop.finetune <run folder> prepare|train\n")
        return 2
    run = RunFolder(Path(arguments[0]))
    if arguments[1] == "train":
        _keep_memory(arguments)
        from .training.run import train

        return train(run)
    from .data.prepare import prepare
    from .failures import report

    events = EventWriter(run.events)
    try:
        prepare(run, events)
    except Exception as error:  # noqa: BLE001 - whatever it is, the log must say so
        report(events, error)
        return 1
    finally:
        events.close()
    return 0


def _keep_memory(arguments: list[str]) -> None:
    """Begin anew with an allocator that keeps large blocks, in huge pages: a fifth of a step on a CPU else goes into
    page faults, as every tensor is given back to the system and asked for again. glibc reads this at its start only.
    """
    if "GLIBC_TUNABLES" in os.environ or not sys.platform.startswith("linux"):
        return
    names = ("hugetlb=1", "mmap_threshold=4294967296", "trim_threshold=17179869184")
    tunables = ":".join(f"glibc.malloc.{name}" for name in names)
    command = [sys.executable, "-m", "tuneloop.finetune", *arguments]
    os.execve(sys.executable, command, {**os.environ, "GLIBC_TUNABLES": tunables})  # noqa: S606 - a list, no shell


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
