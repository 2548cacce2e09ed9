"""kill -9 at every step towards the disk: the next start is clean, and what was acknowledged is there."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from tuneloop.adapters import AdapterLimits, AdapterStore
from tuneloop.storage import Database, ObjectStore, tables

RunChild = Callable[[Path, int, int], int]
State = dict[str, tuple[dict[int, str], dict[str, dict[int, float]]]]

STRIDE = 5  # 1 tries every step (passes too; about a second for three steps)
ONE_STEP_BACK = {"default": {1: 1.0}, "prod": {1: 0.5, 2: 0.5}}
STATES: list[State] = [  # before the first operation of the child's list, and after each
    {},
    {"a": ({1: "one"}, {"default": {1: 1.0}})},
    {"a": ({1: "one", 2: "two"}, {"default": {2: 1.0}})},
    {"a": ({1: "one", 2: "two"}, {"default": {2: 1.0}, "prod": {1: 0.5, 2: 0.5}})},
    {"a": ({1: "one", 2: "two"}, ONE_STEP_BACK)},
    {"a": ({1: "one", 2: "two"}, ONE_STEP_BACK), "b": ({1: "one"}, {"default": {1: 1.0}})},
    {"a": ({1: "one", 2: "two"}, ONE_STEP_BACK), "b": ({1: "one", 2: "three"}, {"default": {2: 1.0}})},
    {"a": ({1: "one", 2: "two"}, ONE_STEP_BACK), "b": ({2: "three"}, {"default": {2: 1.0}})},
    {"b": ({2: "three"}, {"default": {2: 1.0}})},
    {"a": ({1: "one"}, {"default": {1: 1.0}}), "b": ({2: "three"}, {"default": {2: 1.0}})},
]


@pytest.fixture(scope="module")
def run_child() -> Iterator[RunChild]:
    script = Path(__file__).with_name("adapters_store_crash_child.py")
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def run(home: Path, kill_at: int, steps: int) -> int:
            stdin.write(f"{home} {kill_at} {steps}\n")
            stdin.flush()
            return int(stdout.readline())

        yield run
        stdin.close()
        assert process.wait(timeout=30) == 0


@pytest.fixture
async def fresh(tmp_path: Path) -> Path:
    home = tmp_path / "fresh"
    database = Database(f"sqlite:///{home}/tuneloop.db")
    await database.migrate()
    await database.close()
    return home


def copy_of(home: Path, name: str) -> Path:
    return Path(shutil.copytree(home, home.with_name(name)))


async def state_after_restart(home: Path) -> State:
    """Start on what a kill left, check that nothing is left over, and tell what there is."""
    database = Database(f"sqlite:///{home}/tuneloop.db")
    store = AdapterStore(database, ObjectStore(str(home / "blobs")), home=home, limits=AdapterLimits())
    await store.start()
    store.check_integrity()
    state: State = {}
    digests: set[str] = set()
    for adapter in store.list():
        texts = {}
        for version in adapter.versions:
            digests.add(version.digest)
            text = (version.path / "adapter_model.safetensors").read_text()
            texts[version.version] = text[: len(text) // 1000]
            assert text == texts[version.version] * 1000
            assert (version.path / "adapter_config.json").read_text() == "{}"
        state[adapter.name] = texts, {alias.alias: dict(alias.weights) for alias in adapter.aliases}
    async with database.transaction(read_only=True) as session:
        rows = set(await session.scalars(select(tables.AdapterBlob.digest)))
    assert rows == digests
    stored = {path.name for path in (home / "blobs").glob("adapters/*")}  # hidden leftovers included
    assert stored == {digest.removeprefix("sha256:") for digest in digests}
    working: list[Any] = [path for path in (home / "adapters" / "instances").iterdir() if path.suffix != ".lock"]
    assert working == []
    await store.close()
    await database.close()
    return state


def acknowledged(home: Path) -> int:
    path = home / "acknowledged"
    return len(path.read_text()) if path.exists() else 0


async def test_killed_anywhere_just_what_was_acknowledged_is_there(fresh: Path, run_child: RunChild) -> None:
    kill_at = 1 - STRIDE
    while True:
        kill_at += STRIDE
        home = copy_of(fresh, f"killed-{kill_at}")
        status = run_child(home, kill_at, len(STATES))
        done = acknowledged(home)
        state = await state_after_restart(home)
        assert state in STATES[done : done + 2], (kill_at, done)
        if status == 0:
            break
        assert status == signal.SIGKILL
        shutil.rmtree(home)
    assert state == STATES[-1]
    assert kill_at > 100


async def test_killed_while_it_recovers_the_next_start_recovers(fresh: Path, run_child: RunChild) -> None:
    crashed = copy_of(fresh, "crashed")
    # In the middle of storing the second version's files.
    kill_at = 1
    while acknowledged(crashed) < 1 or not list((crashed / "blobs").glob("adapters/.*.partial")):
        shutil.rmtree(crashed)
        assert run_child(copy_of(fresh, "crashed"), kill_at, 2) == signal.SIGKILL
        kill_at += 3
    kill_at = 1 - STRIDE
    status = signal.SIGKILL.value
    while status == signal.SIGKILL:
        kill_at += STRIDE
        home = copy_of(crashed, f"killed-{kill_at}")
        status = run_child(home, kill_at, 0)
        assert await state_after_restart(home) == STATES[1]
    assert status == 0
    assert kill_at > 10
