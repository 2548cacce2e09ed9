"""kill -9 at every step of adding and deleting files: the next start has what was acknowledged, and nothing else."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

from tuneloop.storage import Database, ObjectStore
from tuneloop.storage.files import FileStore

STRIDE = 5  # 1 tries every step (passes too)
STATES = [[], ["1"], ["1", "2"], ["2"], ["2"]]  # the files before the first operation of the child, and after each


async def names_after_restart(home: Path) -> list[str]:
    """Start on what a kill left, check that nothing is left over, and tell which files there are."""
    database = Database(f"sqlite:///{home}/tuneloop.db")
    store = FileStore(database, ObjectStore(str(home / "blobs")), home=home)
    await store.start()
    files, _ = await store.list(order="asc")
    for file in files:
        assert b"".join([chunk async for chunk in store.open(file)]).decode() == file.filename
    stored = {f"files/{path.name}" for path in (home / "blobs").glob("files/*")}  # hidden leftovers included
    assert stored == {file.blob for file in files}
    assert list((home / "files").glob("notes/*")) == []
    assert [path.name for path in (home / "files" / "instances").iterdir() if path.suffix != ".lock"] == []
    await store.close()
    await database.close()
    return [file.filename for file in files]


async def test_killed_anywhere_just_what_was_acknowledged_is_there(tmp_path: Path) -> None:
    fresh = tmp_path / "fresh"
    database = Database(f"sqlite:///{fresh}/tuneloop.db")
    await database.migrate()
    await database.close()
    command = [sys.executable, "-m", "tests.unit.files_store_crash_child"]
    with subprocess.Popen(  # noqa: ASYNC220
        command, cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        kill_at, status = 1 - STRIDE, signal.SIGKILL.value
        while status == signal.SIGKILL:
            kill_at += STRIDE
            home = Path(shutil.copytree(fresh, tmp_path / f"killed-{kill_at}"))
            process.stdin.write(f"{home} {kill_at}\n")
            process.stdin.flush()
            status = int(process.stdout.readline())
            said = home / "acknowledged"
            done = len(said.read_text()) if said.exists() else 0
            assert await names_after_restart(home) in STATES[done : done + 2], (kill_at, done)
            shutil.rmtree(home)
        process.stdin.close()
        assert process.wait(timeout=30) == 0
    assert (status, done) == (0, len(STATES) - 1)
    assert kill_at > 50
