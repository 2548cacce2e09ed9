"""File locks that the kernel lets go of when their process ends, even at `kill -9`. It knows no purpose of any."""

import fcntl
import os
from pathlib import Path


def lock_now(path: Path, flags: int = os.O_RDWR) -> int:
    """A descriptor that holds the lock of a file or folder for as long as any process holds the descriptor.

    Raises BlockingIOError while somebody else has it, and what opening the file raises.
    """
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
