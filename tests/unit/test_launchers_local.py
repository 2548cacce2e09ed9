"""Real processes, started, found, stopped and killed; what they run is a stub without a model."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tuneloop.finetune.launchers import Handle, LocalLauncher, family
from tuneloop.finetune.run_folder import RunFolder
from tuneloop.storage.errors import Conflict, NotFound

SUPPORT = Path(__file__).parents[1] / "support"
RELATIVE = os.path.relpath(SUPPORT)


@pytest.fixture
async def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RunFolder]:
    monkeypatch.setenv("PYTHONPATH", RELATIVE)
    folder = tmp_path / "run"
    folder.mkdir()
    yield RunFolder(folder)
    family.kill(folder)


@pytest.fixture
def launcher() -> LocalLauncher:
    return LocalLauncher("stub_phase")


async def begin(launcher: LocalLauncher, run: RunFolder, mode: str, **options: Any) -> Handle:
    (run.path / "mode").write_text(mode)
    return await launcher.start(run, "train", **options)


async def there(path: Path) -> int:
    async with asyncio.timeout(60):
        while not (text := await asyncio.to_thread(written, path)):
            await asyncio.sleep(0.02)
    return int(text)


def written(path: Path) -> str:
    return path.read_text() if path.exists() else ""


async def gone(launcher: LocalLauncher, run: RunFolder, handle: Handle) -> None:
    async with asyncio.timeout(20):
        while await launcher.alive(run, handle):
            await asyncio.sleep(0.02)


async def test_a_phase_is_alive_until_it_ends_and_leaves_no_zombie(launcher: LocalLauncher, run: RunFolder) -> None:
    handle = await begin(launcher, run, "polite")
    await there(run.path / "ready.0")
    assert await launcher.alive(run, handle)
    with pytest.raises(Conflict, match="already"):
        await launcher.start(run, "train")
    assert os.getsid(handle["pid"]) == handle["pid"]
    await launcher.stop(run, handle)
    await gone(launcher, run, handle)
    assert not psutil.pid_exists(handle["pid"])
    assert "exit status 0" in await launcher.exit_reason(run, handle)
    await launcher.stop(run, handle)
    await launcher.stop(run, handle, force=True)


async def test_another_server_finds_it_again_and_can_stop_it(launcher: LocalLauncher, run: RunFolder) -> None:
    assert await launcher.find(run) is None
    handle = await begin(launcher, run, "polite")
    await there(run.path / "ready.0")
    other = LocalLauncher("stub_phase")
    assert await other.alive(run, handle)
    found = await other.find(run)  # it was never told the handle
    assert found is not None
    assert found["pid"] == handle["pid"]
    await other.stop(run, found)
    await gone(launcher, run, handle)
    assert await other.find(run) is None
    stranger = {**handle, "pid": 0}  # as to a server process that did not start it
    assert "without a word" in await other.exit_reason(run, stranger)


async def test_how_it_ended(launcher: LocalLauncher, run: RunFolder) -> None:
    handle = await begin(launcher, run, "fail")
    await gone(launcher, run, handle)
    reason = await launcher.exit_reason(run, handle)
    assert "exit status 3" in reason
    assert "the last words" in reason
    handle = await begin(launcher, run, "wait")
    await there(run.path / "ready.0")
    os.kill(handle["pid"], signal.SIGKILL)
    await gone(launcher, run, handle)
    assert "SIGKILL" in await launcher.exit_reason(run, handle)


@pytest.mark.parametrize("kills", [0, 1])
async def test_the_memory_is_blamed_only_if_the_kernel_has_killed(
    launcher: LocalLauncher, run: RunFolder, monkeypatch: pytest.MonkeyPatch, kills: int
) -> None:
    handle = await begin(launcher, run, "wait")
    await launcher.stop(run, handle, force=True)
    await gone(launcher, run, handle)
    monkeypatch.setattr("tuneloop.finetune.launchers.local._kernel_kills", lambda: handle["kernel_kills"] + kills)
    assert ("perhaps the memory" in await launcher.exit_reason(run, handle)) == bool(kills)


async def test_output_never_blocks_and_goes_to_the_log(launcher: LocalLauncher, run: RunFolder) -> None:
    handle = await begin(launcher, run, "flood")
    await gone(launcher, run, handle)
    assert run.log.stat().st_size > 400_000
    assert "exit status 0" in await launcher.exit_reason(run, handle)


async def test_a_child_that_outlives_its_parent_ends_too(launcher: LocalLauncher, run: RunFolder) -> None:
    handle = await begin(launcher, run, "heir")
    await there(run.path / "ready.0")
    heir = await there(run.path / "heir")
    os.kill(handle["pid"], signal.SIGKILL)
    await gone(launcher, run, handle)
    assert not psutil.pid_exists(heir) or psutil.Process(heir).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("by", ["force", "start"])
async def test_what_left_the_session_is_ended_by_force_and_before_a_new_start(
    launcher: LocalLauncher, run: RunFolder, by: str
) -> None:
    handle = await begin(launcher, run, "detached")
    heir = psutil.Process(await there(run.path / "heir"))
    await there(run.path / "ready.0")
    if by == "force":
        await launcher.stop(run, handle, force=True)
    else:
        os.kill(handle["pid"], signal.SIGKILL)
        await gone(launcher, run, handle)
        assert heir.is_running()
        await begin(launcher, run, "wait")
    assert not heir.is_running() or heir.status() == psutil.STATUS_ZOMBIE


async def test_a_number_that_somebody_else_has_by_now_is_never_signalled(
    launcher: LocalLauncher, run: RunFolder
) -> None:
    me = psutil.Process()
    recycled = {"pid": me.pid, "started": me.create_time() - 100}
    lock = run.take_lock()  # it even looks alive
    try:
        assert await launcher.alive(run, recycled)
        await launcher.stop(run, recycled)
        await launcher.stop(run, recycled, force=True)
    finally:
        os.close(lock)
    assert not await launcher.alive(run, recycled)


async def test_a_clock_that_was_set_meanwhile_makes_no_stranger_of_a_trainer(
    launcher: LocalLauncher, run: RunFolder
) -> None:
    handle = await begin(launcher, run, "polite")
    await there(run.path / "ready.0")
    moved = {**handle, "started": handle["started"] - 3600}
    assert await launcher.alive(run, moved)
    assert await launcher.alive(run, handle)
    await launcher.stop(run, moved)
    await gone(launcher, run, handle)


async def test_what_a_phase_finds_in_its_environment(
    launcher: LocalLauncher, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    handle = await begin(launcher, run, "environment", threads=3)
    await gone(launcher, run, handle)
    lines = (run.path / "environment").read_text().splitlines()
    assert {"OMP_NUM_THREADS=3", "HF_HUB_OFFLINE=1", str(SUPPORT)} <= set(lines)
    assert str(run.path) not in lines  # as a place to import from


async def test_a_folder_that_is_gone_is_said(launcher: LocalLauncher, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="gone"):
        await launcher.start(RunFolder(tmp_path / "nowhere"), "train")


async def test_the_package_is_found_from_any_folder(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH")
    launcher = LocalLauncher()
    handle = await launcher.start(run, "prepare")  # without a spec it fails, and by its own words
    await gone(launcher, run, handle)
    assert "spec.json" in run.events.read_text()
    assert "No module" not in run.log.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="torchrun of the test environment")
async def test_workers_of_a_torchrun_that_was_killed_do_not_live_on(launcher: LocalLauncher, run: RunFolder) -> None:
    handle = await begin(launcher, run, "wait", processes=2)
    workers = [psutil.Process(await there(run.path / f"ready.{rank}")) for rank in (0, 1)]
    assert len(family.members(run.path)) >= 3
    os.kill(handle["pid"], signal.SIGKILL)
    await gone(launcher, run, handle)
    (run.path / "mode").write_text("fail")
    again = await launcher.start(run, "prepare")
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    await gone(launcher, run, again)


async def test_a_torchrun_that_is_asked_to_end_passes_it_on(launcher: LocalLauncher, run: RunFolder) -> None:
    handle = await begin(launcher, run, "polite", processes=2)
    workers = [psutil.Process(await there(run.path / f"ready.{rank}")) for rank in (0, 1)]
    await launcher.stop(run, handle)
    await gone(launcher, run, handle)
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
