"""The model cache of a home: finished checkpoint folders, receipts, locks and unfinished work. It knows no source.

models/<key>/             a checkpoint folder that Tuneloop made (converted or unpacked); complete once it exists
models/receipts/<key>     where the checkpoint of a source is on this machine, so that finding it costs one small read
models/partial/<key>/     unfinished work, kept after an interruption for the next attempt
models/locks/<key>        one fetch of a source at a time, over all processes of this machine
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ...storage.errors import StorageFull
from ...storage.full_disk import full_disk_named
from .checkpoint import is_complete


class ModelCache:
    """Blocking; safe for several processes as long as writers hold the source's lock."""

    def __init__(self, home: Path) -> None:
        self.root = home / "models"

    def key(self, source: str) -> str:
        """A folder name for a source: readable, and distinct by the hash of its whole text."""
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", source).strip("-.")[-60:]
        return f"{slug}-{hashlib.sha256(source.encode()).hexdigest()[:12]}"

    def folder(self, key: str) -> Path:
        return self.root / key

    def find(self, source: str) -> Path | None:
        """The complete checkpoint folder that an earlier fetch of this source left, or None."""
        try:
            receipt = json.loads((self.root / "receipts" / self.key(source)).read_text(encoding="utf-8"))
            path = self.root / receipt["path"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return path if is_complete(path) else None

    def record(self, source: str, path: Path) -> None:
        """Write the receipt that `find` reads. A folder of this cache is told relative to it: a home may be moved."""
        receipt = self.root / "receipts" / self.key(source)
        receipt.parent.mkdir(parents=True, exist_ok=True)
        told = path.relative_to(self.root) if path.is_relative_to(self.root) else path
        aside = receipt.with_name(f"{receipt.name}.{os.getpid()}")
        aside.write_text(json.dumps({"source": source, "path": str(told)}), encoding="utf-8")
        aside.replace(receipt)

    @contextmanager
    def lock(self, source: str, *, on_wait: Callable[[], None]) -> Iterator[Path | None]:
        """Hold a source against other processes; `on_wait` is called if somebody else has it.

        Gives the checkpoint folder that the other one made meanwhile, or None if there is work to do. If the disk
        becomes full inside the block, the unfinished work goes, so that whatever else uses the disk can go on.
        Raises StorageFull then.
        """
        from filelock import FileLock, Timeout  # only a fetch needs it; finding a model does not

        path = self.root / "locks" / self.key(source)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        waited = False
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waited = True
            on_wait()
            lock.acquire()
        try:
            with full_disk_named(self.root):
                yield self.find(source) if waited else None
        except StorageFull:
            shutil.rmtree(self.root / "partial" / self.key(source), ignore_errors=True)
            raise
        finally:
            lock.release()

    def partial(self, source: str) -> Path:
        """The folder for unfinished work; the same one, with its content, after an interruption."""
        folder = self.root / "partial" / self.key(source)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def install(self, source: str, built: Path) -> Path:
        """Make a built checkpoint folder the finished one of its source, at once and durably; drop unfinished work."""
        key = self.key(source)
        for file in sorted(built.iterdir()):
            _sync(file)
        _sync(built)
        target = self.folder(key)
        old = self.root / "partial" / f"{key}.old"
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            # An engine that still maps the old files keeps them: only their names go.
            target.rename(old)
        built.rename(target)
        _sync(self.root)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.root / "partial" / key, ignore_errors=True)
        self.record(source, target)
        return target


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
