"""Jobs at the moments in between: two who want different things at once, and servers that die between two writes."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
from tuneloop.finetune.jobs import watch as watching
from tuneloop.finetune.jobs.records import Job
from tuneloop.finetune.jobs.service import JobService
from tuneloop.finetune.jobs.store import JobStore, event
from tuneloop.server.adapters.trained import TrainedModels
from tuneloop.storage.errors import Conflict, InvalidInput, StorageFull, Unavailable
from tuneloop.storage.files import FileStore

from ..support.jobs_office import Office, messages, reach
from ..support.scripted_trainer import ScriptedLauncher, until
from .conftest import BASE, MakeAdapter, Running

pytestmark = pytest.mark.usefixtures("quick_jobs")


def store(office: Office) -> JobStore:
    return JobStore(office.running.services.database)


async def die_at(office: Office, monkeypatch: pytest.MonkeyPatch, which: int) -> None:
    """The `which`-th change of the database from now on is the last: the server is gone right before it."""
    real, count = JobStore.change, 0

    async def change(self: JobStore, *arguments: Any, **options: Any) -> Job | None:
        nonlocal count
        count += 1
        if count >= which:
            await asyncio.Event().wait()
        return await real(self, *arguments, **options)

    monkeypatch.setattr(JobStore, "change", change)


@pytest.mark.parametrize("which", range(1, 12))
async def test_a_server_killed_before_any_write_of_a_jobs_life_ends_it_well_after_a_restart(
    office: Office,
    launcher: ScriptedLauncher,
    adapter: Path,
    make_adapter: MakeAdapter,
    monkeypatch: pytest.MonkeyPatch,
    which: int,
) -> None:
    with monkeypatch.context() as patch:
        async with office.open() as jobs:
            await die_at(office, patch, which)
            job = await jobs.create(await office.new())
            await asyncio.sleep(0.25)
            if launcher.trainers:
                trainer = launcher.trainers[0]
                trainer.write("started", step=0, total_steps=4)
                trainer.step(1)
                trainer.checkpoint(2, make_adapter(2))
                trainer.succeed(adapter)
                await asyncio.sleep(0.4)
    async with office.open() as jobs:
        if not launcher.trainers:
            trainer = await launcher.trainer()
            trainer.write("started", step=0, total_steps=4)
            trainer.step(1)
            trainer.checkpoint(2, make_adapter(2))
            trainer.succeed(adapter)
        done = await reach(jobs, job, "succeeded")
        said = await messages(jobs, job)
        assert len(said) == len(set(said)), said
        assert said[0].startswith("Created")
        assert said[-1] == "The job has successfully completed."
        assert len([line for line in said if line.startswith("Step ")]) == 1
        assert [c.step for c in (await jobs.checkpoints(job.id))[0]] == [2]
        assert done.fine_tuned_model == job.output_name
        assert len(launcher.trainers) == 1
        assert len(done.result_files) == 1
        adapters = office.running.services.adapters
        assert len(adapters.get(job.output_name).versions) == 1


async def test_two_servers_that_follow_one_log_count_each_event_once(
    office: Office, launcher: ScriptedLauncher, adapter: Path
) -> None:
    async with office.open() as jobs:
        job = await jobs.create(await office.new())
        trainer = await launcher.trainer()
        await reach(jobs, job, "running")
        async with office.open() as other:
            for step in range(1, 40):
                trainer.step(step)
                await asyncio.sleep(0.005)
            trainer.succeed(adapter)
            await reach(other, job, "succeeded")
            said = [line for line in await messages(jobs, job) if line.startswith("Step ")]
    assert len(said) == len(set(said)) == 39


async def test_a_stale_record_does_not_move_the_log_back(
    office: Office, jobs: JobService, launcher: ScriptedLauncher
) -> None:
    job = await jobs.create(await office.new())
    trainer = await launcher.trainer()
    stale = await reach(jobs, job, "running")
    trainer.step(1)
    async with asyncio.timeout(5):
        while (await jobs.get(job.id)).progress.get("step") != 1:
            await asyncio.sleep(0.01)
    jobs._watches[job.id].job = stale  # as if a pause had read it before
    trainer.step(2)
    await asyncio.sleep(0.2)
    assert [line for line in await messages(jobs, job) if line.startswith("Step ")] == [
        "Step 1: training loss=1.0000",
        "Step 2: training loss=1.0000",
    ]


async def test_a_job_cancelled_while_its_result_comes_stays_cancelled(
    office: Office, jobs: JobService, launcher: ScriptedLauncher, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await jobs.create(await office.new())
    trainer = await launcher.trainer()
    await reach(jobs, job, "running")
    await store(office).change(job.id, state="cancelled", wanted="cancel")  # and the watch has not heard of it
    trainer.succeed(adapter)
    await reach(jobs, job, "cancelled")
    assert not office.running.services.adapters.known(job.output_name)


async def test_a_pause_that_was_noted_but_not_told_is_told_by_the_next_server(
    office: Office, launcher: ScriptedLauncher
) -> None:
    async with office.open() as jobs:
        job = await jobs.create(await office.new())
        trainer = await launcher.trainer()
        await reach(jobs, job, "running")
    await store(office).change(job.id, state="pausing", wanted="pause")
    assert trainer.run.wanted() is None
    async with office.open() as jobs:
        await until(lambda: trainer.run.wanted() == "pause")
        trainer.stop("pause", 1)
        await reach(jobs, job, "paused")


async def test_a_cancellation_that_was_noted_but_not_told_is_told_by_the_next_server(
    office: Office, launcher: ScriptedLauncher
) -> None:
    async with office.open() as jobs:
        job = await jobs.create(await office.new())
        trainer = await launcher.trainer()
        await reach(jobs, job, "running")
    await store(office).change(job.id, state="cancelled", wanted="cancel")
    async with office.open() as jobs:
        await until(lambda: trainer.asked_to_stop)
        assert trainer.run.wanted() == "cancel"
        trainer.die()
        await reach(jobs, job, "cancelled")


async def test_a_trainer_that_dies_while_it_is_to_pause_leaves_a_paused_job(
    office: Office, jobs: JobService, launcher: ScriptedLauncher, adapter: Path
) -> None:
    job = await jobs.create(await office.new())
    trainer = await launcher.trainer()
    await reach(jobs, job, "running")
    await jobs.pause(job.id)
    trainer.die()
    await reach(jobs, job, "paused")
    await jobs.resume(job.id)
    (await launcher.trainer(1)).succeed(adapter)
    await reach(jobs, job, "succeeded")


async def test_data_are_read_again_when_that_process_dies_even_if_a_pause_waits(
    office: Office, jobs: JobService, launcher: ScriptedLauncher, adapter: Path
) -> None:
    launcher.prepares = False
    job = await jobs.create(await office.new())
    await until(lambda: launcher.processes)
    await reach_handle(jobs, job)
    await jobs.pause(job.id)
    launcher.prepares = True
    launcher.processes[0].die()
    await reach(jobs, job, "paused")
    assert (await jobs.get(job.id)).resolved["total_steps"] == 4
    await jobs.resume(job.id)
    (await launcher.trainer()).succeed(adapter)
    await reach(jobs, job, "succeeded")


async def reach_handle(jobs: JobService, job: Job) -> None:
    async with asyncio.timeout(5):
        while (await jobs.get(job.id)).handle is None:
            await asyncio.sleep(0.01)


async def test_a_validating_job_can_be_cancelled(office: Office, jobs: JobService, launcher: ScriptedLauncher) -> None:
    launcher.prepares = False
    job = await jobs.create(await office.new())
    await until(lambda: launcher.processes)
    await reach_handle(jobs, job)
    assert (await jobs.cancel(job.id)).state == "cancelled"
    await until(lambda: launcher.processes[0].asked_to_stop)
    launcher.processes[0].write("prepared", rows=1, total_steps=1, digest="d", hyperparameters={})  # too late
    launcher.processes[0].die()
    await reach(jobs, job, "cancelled")
    await asyncio.sleep(0.1)
    assert launcher.trainers == []


async def test_a_trainer_found_without_a_handle_is_not_started_again(
    office: Office, launcher: ScriptedLauncher, adapter: Path
) -> None:
    async with office.open() as jobs:
        job = await jobs.create(await office.new())
        trainer = await launcher.trainer()
        await reach(jobs, job, "running")
    await store(office).change(job.id, handle=None, launcher=None)
    async with office.open() as jobs:
        trainer.succeed(adapter)
        await reach(jobs, job, "succeeded")
        assert len(launcher.trainers) == 1


async def test_a_folder_that_somebody_removed_fails_the_job(
    office: Office, jobs: JobService, launcher: ScriptedLauncher
) -> None:
    first = await jobs.create(await office.new())
    await launcher.trainer()
    second = await jobs.create(await office.new())
    await reach(jobs, second, "queued")
    await asyncio.to_thread(shutil.rmtree, office.running.home / "runs" / second.id)
    await jobs.cancel(first.id)
    launcher.trainers[0].die()
    failed = await reach(jobs, second, "failed")
    assert failed.error is not None
    assert "is gone" in failed.error["message"]


@pytest.mark.parametrize("error", [Unavailable, StorageFull])
async def test_a_result_waits_for_a_store_that_comes_back_and_not_for_a_full_disk(
    office: Office, launcher: ScriptedLauncher, adapter: Path, error: type[Unavailable]
) -> None:
    services = office.running.services
    calls = 0

    class Away(TrainedModels):
        async def publish_adapter(self, *arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls < 3:
                raise error("It is away.")
            return await super().publish_adapter(*arguments, **options)

    away = Away(store=services.adapters, registry=services.registry, catalog=services.catalog)
    async with office.open(publisher=away) as jobs:
        job = await jobs.create(await office.new())
        (await launcher.trainer()).succeed(adapter)
        done = await reach(jobs, job, "failed" if error is StorageFull else "succeeded")
        assert (done.error is None) == (error is Unavailable)
        assert launcher.trainers[0].run.result.is_dir()


async def test_a_full_disk_at_the_result_file_does_not_hold_a_job_up(
    office: Office, jobs: JobService, launcher: ScriptedLauncher, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await jobs.create(await office.new())
    trainer = await launcher.trainer()
    trainer.step(1)

    async def full(self: FileStore, *arguments: Any, **options: Any) -> Any:
        raise StorageFull("The disk is full.")

    monkeypatch.setattr(FileStore, "add", full)
    trainer.succeed(adapter)
    done = await reach(jobs, job, "succeeded")
    assert done.result_files == ()
    assert any("metrics cannot be stored" in line for line in await messages(jobs, job))


@pytest.mark.parametrize("fault", [StorageFull("full"), asyncio.CancelledError()])
async def test_creation_that_fails_leaves_nothing(
    office: Office, jobs: JobService, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    new = await office.new()

    async def fail(self: FileStore, *arguments: Any, **options: Any) -> Any:
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(FileStore, "local_path", fail)
        with pytest.raises(type(fault)):
            await jobs.create(new)
    assert (await jobs.list())[0] == []
    assert not list((office.running.home / "runs").glob("*"))


async def test_a_client_that_leaves_during_the_creation_leaves_a_whole_job(
    office: Office, jobs: JobService, launcher: ScriptedLauncher, adapter: Path
) -> None:
    creation = asyncio.create_task(jobs.create(await office.new()))
    await asyncio.sleep(0)  # it has begun
    creation.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creation
    [job] = (await jobs.list())[0]
    (await launcher.trainer()).succeed(adapter)
    await reach(jobs, job, "succeeded")


async def test_folders_of_jobs_that_were_never_born_are_removed_at_the_next_start(
    office: Office, launcher: ScriptedLauncher, adapter: Path
) -> None:
    runs = office.running.home / "runs"
    async with office.open() as jobs:
        born = await jobs.create(await office.new())
        await launcher.trainer()
        (runs / born.id / ".unborn").touch()  # the server was killed right behind the row
        unborn, strange = runs / "ftjob-unborn", runs / "ftjob-of-another-database"
        for folder in (unborn, strange):
            folder.mkdir()
        (unborn / ".unborn").touch()
    async with office.open() as jobs:
        assert not unborn.exists()
        assert strange.exists()
        assert not (runs / born.id / ".unborn").exists()
        (await launcher.trainer()).succeed(adapter)
        await reach(jobs, born, "succeeded")


async def test_nothing_starts_while_the_server_is_about_to_end(office: Office, launcher: ScriptedLauncher) -> None:
    ending = False
    async with office.open(may_start=lambda: not ending) as jobs:
        job = await jobs.create(await office.new())
        trainer = await launcher.trainer()
        ending = True
        trainer.stop("interrupted", 1)
        await reach(jobs, job, "queued")
        await asyncio.sleep(0.1)
        assert len(launcher.trainers) == 1
    async with office.open():
        await launcher.trainer(1)


async def test_a_device_comes_back_when_the_database_fails_at_the_start(
    office: Office, jobs: JobService, launcher: ScriptedLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failures = JobStore.change, 0

    async def change(self: JobStore, *arguments: Any, **options: Any) -> Job | None:
        nonlocal failures
        if options.get("state") == "running" and failures < 2:
            failures += 1
            raise Unavailable("The database is away.")
        return await real(self, *arguments, **options)

    monkeypatch.setattr(JobStore, "change", change)
    await jobs.create(await office.new())
    await launcher.trainer()
    assert failures == 2


async def test_a_job_that_failed_late_is_resumed_and_gets_new_curves(
    office: Office, jobs: JobService, launcher: ScriptedLauncher, adapter: Path, make_adapter: MakeAdapter
) -> None:
    job = await jobs.create(await office.new())
    trainer = await launcher.trainer()
    trainer.step(1)
    trainer.checkpoint(1, make_adapter(2))
    trainer.write("failed", "The memory did not suffice.", level="error", code="out_of_memory")
    trainer.die()
    failed = await reach(jobs, job, "failed")
    assert len(failed.result_files) == 1
    resumed = await jobs.resume(job.id)
    assert (resumed.state, resumed.error, resumed.finished_at) == ("queued", None, None)
    second = await launcher.trainer(1)
    second.step(2)
    second.succeed(adapter)
    done = await reach(jobs, job, "succeeded")
    file = await office.running.services.files.get(done.result_files[0])
    content = b"".join([chunk async for chunk in office.running.services.files.open(file)]).decode()
    assert [line.split(",")[0] for line in content.splitlines()] == ["step", "1", "2"]


async def test_a_result_is_published_without_loading_its_base(
    office: Office, jobs: JobService, launcher: ScriptedLauncher, adapter: Path
) -> None:
    registry = office.running.services.registry
    await registry.unload(BASE)
    job = await jobs.create(await office.new())
    (await launcher.trainer()).succeed(adapter)
    await reach(jobs, job, "succeeded")
    assert registry.status(BASE).state == "unloaded"
    async with registry.lease(job.output_name) as lease:
        assert lease.adapter is not None


async def test_a_result_that_the_engine_refuses_leaves_no_name(
    running: Running,
    office: Office,
    jobs: JobService,
    launcher: ScriptedLauncher,
    adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def refuse(*arguments: Any) -> None:
        raise InvalidInput("The engine will not have it.")

    monkeypatch.setattr(running.engine, "load_adapter", refuse)
    job = await jobs.create(await office.new())
    (await launcher.trainer()).succeed(adapter)
    failed = await reach(jobs, job, "failed")
    assert failed.error is not None
    assert "will not have it" in failed.error["message"]
    assert not office.running.services.adapters.known(job.output_name)


async def test_steps_are_seen_within_a_tenth_of_a_second(
    office: Office, jobs: JobService, launcher: ScriptedLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert watching._POLL_SECONDS <= 0.05
    job = await jobs.create(await office.new())
    trainer = await launcher.trainer()
    await reach(jobs, job, "running")
    stream = jobs.follow(job.id)
    clock = asyncio.get_running_loop().time
    waits = []
    for step in range(1, 6):
        await asyncio.sleep(0.03)
        begin = clock()
        trainer.step(step)
        async for heard in stream:
            if heard.data.get("step") == step:
                break
        waits.append(clock() - begin)
    await stream.aclose()
    assert sorted(waits)[2] < 0.2, waits  # the median: other tests share this machine


@pytest.mark.parametrize(
    ("call", "state"),
    [
        ("pause", "publishing"), ("pause", "succeeded"), ("pause", "failed"), ("pause", "cancelled"),
        ("cancel", "publishing"), ("cancel", "succeeded"), ("cancel", "failed"), ("cancel", "cancelled"),
        ("resume", "validating"), ("resume", "queued"), ("resume", "running"), ("resume", "pausing"),
        ("resume", "publishing"), ("resume", "succeeded"), ("resume", "failed"), ("resume", "cancelled"),
    ],
)  # fmt: skip
async def test_what_cannot_be_done_in_a_state_is_refused_and_changes_nothing(
    office: Office, launcher: ScriptedLauncher, call: str, state: Any
) -> None:
    launcher.prepares = False
    async with office.open() as jobs:
        job = await jobs.create(await office.new())
        await reach_handle(jobs, job)
    await store(office).change(job.id, state=state, launcher=None, events=[event("info", "forced")])
    before = await jobs.get(job.id)  # closed, so that no watch changes the state meanwhile
    with pytest.raises(Conflict, match=job.id):
        await getattr(jobs, call)(job.id)
    assert await jobs.get(job.id) == before
