"""Which server processes use a home folder, and the private working folders of each. It knows nothing of what
they do there.

Every process holds a file lock (`flock`) for as long as it lives; the kernel lets go of it even at `kill -9`. So the
next start tells leftovers of the dead from the work of the living, without clocks or process ids.
"""

import contextlib
import fcntl
import os
import secrets
from pathlib import Path

from .errors import Unavailable
from .full_disk import full_disk_named
from .local_objects import remove
from .locks import lock_now


class Instance:
    """This process among those that share `root`. Blocking; call it in a thread."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._claimed: dict[str, int] = {}
        self.alone = False  # whether the last claim_dead() met no living process
        root.mkdir(parents=True, exist_ok=True)
        self._lock: int | None = None
        while self._lock is None:
            self.id = secrets.token_hex(8)
            self._lock = self._register()

    def _register(self) -> int | None:
        # Locked before it has its name: no claimant can find it unlocked and take this process for dead.
        hidden = self._root / f".{self.id}"
        lock = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            hidden.rename(self._lock_path(self.id))
        except (BlockingIOError, FileNotFoundError):  # a claimant swept it away just now: begin anew
            os.close(lock)
            return None
        return lock

    def new_folder(self) -> Path:
        """An empty folder that nobody else uses; a later start removes it if this process cannot. Quick."""
        folder = self._root / self.id / secrets.token_hex(8)
        try:
            with full_disk_named(self._root):
                folder.mkdir(parents=True, mode=0o700)
        except OSError as error:
            raise Unavailable(f"No working folder could be made below {self._root}: {error}.") from error
        return folder

    def claim_dead(self) -> list[str]:
        """The ids of processes that ended without being buried. Only one claimant gets each."""
        self.alone = True
        for path in self._root.glob("*.lock"):
            if path.stem not in self._claimed and path.stem != self.id:
                self._claim(path)
        return sorted(self._claimed)

    def _claim(self, path: Path) -> None:
        try:
            self._claimed[path.stem] = lock_now(path)
        except BlockingIOError:
            self.alone = False
        except FileNotFoundError:  # another start buried it just now
            pass

    def clear_dead(self) -> None:
        """Remove all working folders of the claimed, and what those left that died before they had a lock."""
        for dead in self._claimed:
            remove(self._root / dead)
        for hidden in self._root.glob(".*"):
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                lock = lock_now(hidden)
                hidden.unlink()
                os.close(lock)

    def bury(self) -> None:
        """Forget the claimed, once nothing of them is left anywhere."""
        for dead, lock in self._claimed.items():
            self._lock_path(dead).unlink(missing_ok=True)
            os.close(lock)
        self._claimed.clear()

    def close(self) -> None:
        """Remove this process's working folders and let go of its lock. Safe to repeat.

        Its lock file stays: a later start claims this id like any other and takes over what it wrote.
        """
        if self._lock is not None:
            remove(self._root / self.id)
            os.close(self._lock)
            self._lock = None
        for lock in self._claimed.values():
            os.close(lock)
        self._claimed.clear()

    def _lock_path(self, instance: str) -> Path:
        return self._root / f"{instance}.lock"
