"""The process that `test_adapters_store_crash.py` kills: it forks one child a line of its input, warm from imports.

A line `home kill_at steps` makes the child work in `home` and end itself by SIGKILL at its `kill_at`th step towards
the disk: a file opened for writing, renamed, synced, copied or removed, an SQL statement or a commit (before and
after). Every finished operation is a dot in `home/acknowledged`. The answer is the child's exit status.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine
from tuneloop.adapters import AdapterFacts, AdapterLimits, AdapterStore
from tuneloop.storage import Database, ObjectStore

ACKNOWLEDGED = "acknowledged"
_AUDITED = frozenset({"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.copyfile"})


async def publish(store: AdapterStore, name: str, content: str) -> None:
    facts = AdapterFacts(
        digest=f"sha256:{content.encode().hex():0>64}",
        peft_type="LORA",
        base_model_name=None,
        rank=8,
        alpha=8.0,
        targets=("q",),
        use_dora=False,
        use_rslora=False,
        size_bytes=1,
    )
    async with store.staging() as folder:
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_text(content * 1000)
        await store.publish(folder, name=name, base="base", facts=facts, origin="upload")


def operations(store: AdapterStore) -> list[Callable[[], Awaitable[object]]]:
    return [
        lambda: publish(store, "a", "one"),
        lambda: publish(store, "a", "two"),
        lambda: store.set_alias("a", "prod", {1: 1, 2: 1}),
        lambda: store.rollback("a"),
        lambda: publish(store, "b", "one"),
        lambda: publish(store, "b", "three"),
        lambda: store.delete_version("b", 1),
        lambda: store.delete("a"),
        lambda: publish(store, "a", "one"),
    ]


async def work(home: Path, steps: int) -> None:
    database = Database(f"sqlite:///{home}/tuneloop.db")
    store = AdapterStore(database, ObjectStore(str(home / "blobs")), home=home, limits=AdapterLimits())
    await store.start()
    for operation in operations(store)[:steps]:
        await operation()
        with (home / ACKNOWLEDGED).open("a") as file:
            file.write(".")
    await store.close()
    await database.close()


def die_at(count: int) -> None:
    left = count

    def step(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(name: str, args: tuple[Any, ...]) -> None:
        writes = name == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or name in _AUDITED) and not str(args[0]).endswith(ACKNOWLEDGED):
            step()

    fsync = os.fsync

    def counted_fsync(descriptor: Any) -> None:
        step()
        fsync(descriptor)
        step()

    os.fsync = counted_fsync  # type: ignore[assignment]
    sys.addaudithook(audit)
    event.listen(Engine, "before_cursor_execute", step)
    event.listen(Engine, "commit", step)
    event.listen(Engine, "checkin", step)


def main() -> None:
    for line in sys.stdin:
        home, kill_at, steps = line.split()
        child = os.fork()
        if child == 0:
            die_at(int(kill_at))
            asyncio.run(work(Path(home), int(steps)))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{status}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
