"""The process that `test_files_crash.py` kills at each of its steps towards the disk, as its sibling for adapters."""

import asyncio
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tuneloop.storage import Database, ObjectStore
from tuneloop.storage.files import FileStore, StoredFile

from .adapters_store_crash_child import ACKNOWLEDGED, die_at


async def add(store: FileStore, content: str, expires_at: datetime | None = None) -> StoredFile:
    async with store.staging() as folder:
        (folder / "part-1").write_text(content)
        return await store.add(folder / "part-1", filename=content, purpose="batch", expires_at=expires_at)


async def work(home: Path) -> None:
    """Two files, one of them deleted again, and one whose time is up when the next start sees it."""
    database = Database(f"sqlite:///{home}/tuneloop.db")
    store = FileStore(database, ObjectStore(str(home / "blobs")), home=home)
    await store.start()

    def acknowledge(what: str) -> None:
        with (home / ACKNOWLEDGED).open("a") as file:
            file.write(what)

    first = await add(store, "1")
    acknowledge("a")
    await add(store, "2")
    acknowledge("b")
    await store.delete(first.id)
    acknowledge("c")
    await add(store, "3", datetime.now(UTC) + timedelta(microseconds=1))
    acknowledge("d")
    await store.close()
    await database.close()


def main() -> None:
    for line in sys.stdin:
        home, kill_at = line.split()
        child = os.fork()
        if child == 0:
            die_at(int(kill_at))
            asyncio.run(work(Path(home)))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{status}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
