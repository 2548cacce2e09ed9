"""Jobs from creation to their end, over scripted trainers: states, queue, results, crashes of either side."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tuneloop.finetune.jobs.service import JobService
from tuneloop.server.adapters.trained import TrainedModels
from tuneloop.storage.errors import Conflict, InvalidInput, NotFound, Unavailable

from ..support.jobs_office import Office, messages, reach
from ..support.scripted_trainer import ScriptedLauncher, until
from .conftest import BASE, MakeAdapter, write_checkpoint

pytestmark = pytest.mark.usefixtures("quick_jobs")


async def test_a_job_is_validated_trained_and_live_when_it_has_succeeded(
    office: Office, jobs: JobService, launcher: ScriptedLauncher, adapter: Path
) -> None:
    job = await jobs.create(await office.new())
    assert job.state == "validating"
    assert job.output_name == f"ft:{BASE}:mine:{job.id.removeprefix('ftjob-')[:8]}"
    trainer = await launcher.trainer()
    trainer.write("started", step=0, total_steps=4)
    for step in range(1, 5):
        trainer.step(step, 1 / step)
    trainer.succeed(adapter)
    done = await reach(jobs, job, "succeeded")
    assert done.fine_tuned_model == job.output_name
    assert done.trained_tokens == 40
    assert done.progress["step"] == 4
    assert done.progress["total_steps"] == 4
    version = office.running.services.adapters.resolve(job.output_name)
    assert version.origin == "job"
    assert version.source == job.id
    assert version.metrics["train_loss"] == 0.1
    assert version.metrics["data_digest"] == "abc"
    assert await messages(jobs, job) == [
        f"Created fine-tuning job: {job.id}",
        "Files validated, moving job to queued state.",
        "Fine-tuning job started.",
        "Step 1/4: training loss=1.0000",
        "Step 2/4: training loss=0.5000",
        "Step 3/4: training loss=0.3333",
        "Step 4/4: training loss=0.2500",
        f"New fine-tuned model created: {job.output_name}",
        "The job has successfully completed.",
    ]
    file = await office.running.services.files.get(done.result_files[0])
    assert file.purpose == "fine-tune-results"
    content = b"".join([chunk async for chunk in office.running.services.files.open(file)]).decode()
    assert content.splitlines()[0].startswith("step,train_loss,train_accuracy,valid_loss")
    assert len(content.splitlines()) == 5
    assert not trainer.run.data.exists()
    assert (trainer.run.path / "spec.json").exists()


async def test_the_model_is_live_before_the_job_says_so(
    office: Office, launcher: ScriptedLauncher, adapter: Path
) -> None:
    gate = asyncio.Event()
    services = office.running.services

    class Slow(TrainedModels):
        async def publish_adapter(self, *arguments: Any, **options: Any) -> Any:
            await gate.wait()
            return await super().publish_adapter(*arguments, **options)

    slow = Slow(store=services.adapters, registry=services.registry, catalog=services.catalog)
    async with office.open(publisher=slow) as jobs:
        job = await jobs.create(await office.new())
        (await launcher.trainer()).succeed(adapter)
        async with asyncio.timeout(5):
            while (await jobs.get(job.id)).state != "publishing":
                await asyncio.sleep(0.01)
        assert (await jobs.get(job.id)).fine_tuned_model is None
        gate.set()
        await reach(jobs, job, "succeeded")


async def test_checkpoints_are_live_while_the_training_goes_on(
    office: Office, jobs: JobService, launcher: ScriptedLauncher, adapter: Path, make_adapter: MakeAdapter
) -> None:
    job = await jobs.create(await office.new())
    trainer = await launcher.trainer()
    trainer.checkpoint(2, make_adapter(2))
    async with asyncio.timeout(5):
        while not (await jobs.checkpoints(job.id))[0]:
            await asyncio.sleep(0.01)
    [checkpoint], more = await jobs.checkpoints(job.id)
    assert (checkpoint.step, checkpoint.model, more) == (2, f"{job.output_name}:ckpt-step-2", False)
    assert office.running.services.adapters.resolve(checkpoint.model).metrics["step"] == 2
    assert (await jobs.get(job.id)).state == "running"
    assert await jobs.checkpoint_named(checkpoint.model) == checkpoint
    trainer.succeed(adapter)
    await reach(jobs, job, "succeeded")


async def test_a_model_checkpoint_that_made_room_is_no_model_any_more(
    office: Office, jobs: JobService, launcher: ScriptedLauncher, adapter: Path
) -> None:
    services = office.running.services
    job = await jobs.create(await office.new(finetuning_type="full"))
    trainer = await launcher.trainer()
    for step, gone in ((1, []), (2, [1])):
        folder = write_checkpoint(trainer.run.checkpoint(step))
        trainer.write("checkpoint", step=step, path=f"checkpoints/{folder.name}", kind="model", metrics={}, gone=gone)
    async with asyncio.timeout(5):
        while [c.step for c in (await jobs.checkpoints(job.id))[0]] != [2]:
            await asyncio.sleep(0.01)
    assert not services.catalog.known(f"{job.output_name}:ckpt-step-1")
    assert services.catalog.known(f"{job.output_name}:ckpt-step-2")


async def test_bad_data_fail_the_job_with_the_reason(
    office: Office, jobs: JobService, launcher: ScriptedLauncher
) -> None:
    launcher.prepares = False
    job = await jobs.create(await office.new())
    await until(lambda: launcher.processes)
    launcher.processes[0].write(
        "failed", "data.jsonl, line 3: broken.", level="error", code="invalid_data", param="training_file", line=3
    )
    launcher.processes[0].die()
    failed = await reach(jobs, job, "failed")
    assert failed.error == {
        "code": "invalid_data",
        "message": "data.jsonl, line 3: broken.",
        "param": "training_file",
        "line": 3,
    }
    assert launcher.trainers == []
    assert failed.finished_at is not None
    with pytest.raises(Conflict, match="failed"):
        await jobs.resume(job.id)


async def test_the_most_urgent_job_is_next_and_each_waits_for_the_device(
    office: Office, jobs: JobService, launcher: ScriptedLauncher, adapter: Path
) -> None:
    first = await jobs.create(await office.new())
    trainer = await launcher.trainer()
    late = await jobs.create(await office.new())
    urgent = await jobs.create(await office.new(priority=5))
    await reach(jobs, urgent, "queued")
    await reach(jobs, late, "queued")
    assert len(launcher.trainers) == 1
    trainer.succeed(adapter)
    await reach(jobs, first, "succeeded")
    second = await launcher.trainer(1)
    assert second.run.path.name == urgent.id
    second.succeed(adapter)
    assert (await launcher.trainer(2)).run.path.name == late.id


async def test_named_devices_are_shared_out(office: Office, launcher: ScriptedLauncher) -> None:
    async with office.open(devices=("gpu:0", "gpu:1", "gpu:2")) as jobs:
        one = await jobs.create(await office.new(num_processes=2))
        two = await jobs.create(await office.new(num_processes=2))
        three = await jobs.create(await office.new())
        await reach(jobs, one, "running")
        await reach(jobs, two, "queued")
        await reach(jobs, three, "queued")
        assert (await jobs.get(one.id)).devices == ("gpu:0", "gpu:1")
        assert launcher.trainers[0].run.placement() == ("gpu:0", "gpu:1")
        with pytest.raises(InvalidInput, match="3"):
            await jobs.create(await office.new(num_processes=4))


async def test_a_trainer_that_was_killed_goes_on_from_its_checkpoint(
    office: Office, jobs: JobService, launcher: ScriptedLauncher, adapter: Path, make_adapter: MakeAdapter
) -> None:
    job = await jobs.create(await office.new())
    first = await launcher.trainer()
    first.write("started", step=0, total_steps=4)
    first.step(1)
    first.checkpoint(2, make_adapter(2))
    first.die()
    second = await launcher.trainer(1)
    second.write("started", step=2, total_steps=4)
    second.step(3)
    second.succeed(adapter)
    await reach(jobs, job, "succeeded")
    said = await messages(jobs, job)
    assert "The trainer was killed (SIGKILL). It goes on from step 2." in said
    assert "Training goes on after step 2." in said


async def test_retries_without_progress_are_bounded(
    office: Office, jobs: JobService, launcher: ScriptedLauncher
) -> None:
    job = await jobs.create(await office.new(max_retries=2))
    for number in range(3):
        (await launcher.trainer(number)).die()
    failed = await reach(jobs, job, "failed")
    assert failed.error is not None
    assert failed.error["code"] == "trainer_died"
    assert "3 attempts" in failed.error["message"]
    assert len(launcher.trainers) == 3


@pytest.mark.parametrize("moment", ["validating", "started", "step", "checkpoint", "result"])
async def test_a_server_that_is_killed_finds_its_job_again_and_counts_nothing_twice(
    office: Office, launcher: ScriptedLauncher, adapter: Path, make_adapter: MakeAdapter, moment: str
) -> None:
    launcher.prepares = moment != "validating"
    async with office.open() as jobs:
        job = await jobs.create(await office.new())
        if moment == "validating":
            await until(lambda: launcher.processes)
        else:
            trainer = await launcher.trainer()
            trainer.write("started", step=0, total_steps=4)
            if moment != "started":
                trainer.step(1)
                async with asyncio.timeout(5):
                    while not (await jobs.get(job.id)).progress.get("train_loss"):
                        await asyncio.sleep(0.01)
    # No server now; the trainer goes on.
    if moment == "validating":
        launcher.processes[0].write("prepared", rows=4, total_steps=4, digest="abc", hyperparameters={})
        launcher.processes[0].die()
    else:
        trainer.step(2)
        if moment in ("checkpoint", "result"):
            trainer.checkpoint(2, make_adapter(2))
        if moment == "result":
            trainer.succeed(adapter)
    async with office.open() as jobs:
        if moment != "result":
            current = await launcher.trainer()
            current.succeed(adapter)
        done = await reach(jobs, job, "succeeded")
        assert done.fine_tuned_model == job.output_name
        said = await messages(jobs, job)
        assert len([line for line in said if line.startswith("Step 1/")]) == (moment not in ("validating", "started"))
        assert len(said) == len(set(said)), said
        assert len(launcher.trainers) == 1


async def test_publishing_that_was_interrupted_is_done_again(
    office: Office, launcher: ScriptedLauncher, adapter: Path
) -> None:
    services = office.running.services

    class Stuck(TrainedModels):
        async def publish_adapter(self, *arguments: Any, **options: Any) -> Any:
            await super().publish_adapter(*arguments, **options)
            await asyncio.Event().wait()

    stuck = Stuck(store=services.adapters, registry=services.registry, catalog=services.catalog)
    async with office.open(publisher=stuck) as jobs:
        job = await jobs.create(await office.new())
        (await launcher.trainer()).succeed(adapter)
        await until(lambda: services.adapters.known(job.output_name))
    async with office.open() as jobs:
        await reach(jobs, job, "succeeded")
        assert len(services.adapters.get(job.output_name).versions) == 1


async def test_a_result_that_cannot_be_served_fails_the_job_and_stays(
    office: Office, launcher: ScriptedLauncher, jobs: JobService, make_adapter: MakeAdapter
) -> None:
    job = await jobs.create(await office.new())
    broken = make_adapter(1)
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")
    (await launcher.trainer()).succeed(broken)
    failed = await reach(jobs, job, "failed")
    assert failed.error is not None
    assert "cannot be served" in failed.error["message"]
    assert launcher.trainers[0].run.result.is_dir()


async def test_a_publisher_that_is_out_of_order_is_asked_again_after_a_restart(
    office: Office, launcher: ScriptedLauncher, adapter: Path
) -> None:
    class Broken:
        async def publish_adapter(self, *arguments: Any, **options: Any) -> Any:
            raise RuntimeError("a bug")

        async def publish_model(self, *arguments: Any, **options: Any) -> None:
            raise RuntimeError("a bug")

    async with office.open(publisher=Broken()) as jobs:
        job = await jobs.create(await office.new())
        (await launcher.trainer()).succeed(adapter)
        await asyncio.sleep(0.3)
    async with office.open() as jobs:
        await reach(jobs, job, "succeeded")


async def test_pause_and_resume(
    office: Office, jobs: JobService, launcher: ScriptedLauncher, adapter: Path, make_adapter: MakeAdapter
) -> None:
    job = await jobs.create(await office.new())
    trainer = await launcher.trainer()
    await reach(jobs, job, "running")
    assert (await jobs.pause(job.id)).state == "pausing"
    assert trainer.run.wanted() == "pause"
    with pytest.raises(Conflict, match="wait until it is paused"):
        await jobs.resume(job.id)
    trainer.checkpoint(1, make_adapter(2))
    trainer.stop("pause", 1)
    assert (await reach(jobs, job, "paused")).devices is None
    assert (await jobs.pause(job.id)).state == "paused"
    await jobs.resume(job.id)
    second = await launcher.trainer(1)
    assert second.run.wanted() is None
    second.succeed(adapter)
    await reach(jobs, job, "succeeded")


async def test_a_queued_or_validating_job_can_be_paused(
    office: Office, jobs: JobService, launcher: ScriptedLauncher
) -> None:
    await jobs.create(await office.new())
    await launcher.trainer()
    queued = await jobs.create(await office.new())
    await reach(jobs, queued, "queued")
    assert (await jobs.pause(queued.id)).state == "paused"
    launcher.prepares = False
    validating = await jobs.create(await office.new())
    await until(lambda: len(launcher.processes) == 4)
    await jobs.pause(validating.id)
    launcher.processes[-1].write("prepared", rows=1, total_steps=1, digest="d", hyperparameters={})
    launcher.processes[-1].die()
    await reach(jobs, validating, "paused")


async def test_a_running_job_is_cancelled_at_once_and_its_trainer_told(
    office: Office, jobs: JobService, launcher: ScriptedLauncher
) -> None:
    job = await jobs.create(await office.new())
    trainer = await launcher.trainer()
    await reach(jobs, job, "running")
    assert (await jobs.cancel(job.id)).state == "cancelled"
    await until(lambda: trainer.asked_to_stop)
    trainer.stop("cancel", 1)
    await reach(jobs, job, "cancelled")
    with pytest.raises(Conflict, match="cancelled"):
        await jobs.cancel(job.id)
    with pytest.raises(Conflict, match="cancelled"):
        await jobs.pause(job.id)


async def test_a_trainer_that_does_not_listen_is_killed(
    office: Office, jobs: JobService, launcher: ScriptedLauncher
) -> None:
    job = await jobs.create(await office.new())
    trainer = await launcher.trainer()
    await reach(jobs, job, "running")
    await jobs.cancel(job.id)
    await until(lambda: not trainer.living)
    await reach(jobs, job, "cancelled")


async def test_a_trainer_that_was_told_to_end_by_the_machine_goes_on_later(
    office: Office, jobs: JobService, launcher: ScriptedLauncher, adapter: Path
) -> None:
    job = await jobs.create(await office.new())
    (await launcher.trainer()).stop("interrupted", 2)
    (await launcher.trainer(1)).succeed(adapter)
    await reach(jobs, job, "succeeded")


async def test_followers_hear_everything_once_and_end_with_the_job(
    office: Office, jobs: JobService, launcher: ScriptedLauncher, adapter: Path
) -> None:
    job = await jobs.create(await office.new())

    async def heard(after: int = 0) -> list[int]:
        return [event.seq async for event in jobs.follow(job.id, after_seq=after)]

    early = asyncio.create_task(heard())
    trainer = await launcher.trainer()
    for step in range(1, 5):
        trainer.step(step)
        await asyncio.sleep(0.02)
    trainer.succeed(adapter)
    seqs = await asyncio.wait_for(early, 10)
    assert seqs == list(range(1, len(seqs) + 1))
    assert await heard(after=3) == seqs[3:]
    with pytest.raises(NotFound):
        await anext(jobs.follow("ftjob-none"))


async def test_lists_are_paged_and_filtered(office: Office, jobs: JobService) -> None:
    made = [(await jobs.create(await office.new())).id for _ in range(3)]
    first, more = await jobs.list(limit=2)
    assert ([job.id for job in first], more) == (made[:0:-1], True)
    rest, more = await jobs.list(after=first[-1].id, limit=2)
    assert ([job.id for job in rest], more) == (made[:1], False)
    assert len((await jobs.list(metadata={"team": "a"}))[0]) == 3
    assert (await jobs.list(metadata={"team": "b"}))[0] == []
    with pytest.raises(NotFound):
        await jobs.list(after="ftjob-none")


async def test_permissions_of_checkpoints(jobs: JobService) -> None:
    granted = await jobs.grant("ft:x:ckpt-step-1", ["a", "b"])
    again = await jobs.grant("ft:x:ckpt-step-1", ["b"])
    assert again[0].id == granted[1].id
    found, more = await jobs.permissions("ft:x:ckpt-step-1", limit=1, order="ascending")
    assert (found[0].id, more) == (granted[0].id, True)
    await jobs.revoke("ft:x:ckpt-step-1", granted[0].id)
    assert [each.project for each in (await jobs.permissions("ft:x:ckpt-step-1"))[0]] == ["b"]
    with pytest.raises(NotFound):
        await jobs.revoke("ft:x:ckpt-step-1", granted[0].id)


async def test_a_launcher_that_cannot_start_is_tried_again(
    office: Office, jobs: JobService, launcher: ScriptedLauncher, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = launcher.start, 0

    async def start(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Unavailable("No process can be started.")
        return await real(*arguments, **options)

    monkeypatch.setattr(launcher, "start", start)
    job = await jobs.create(await office.new())
    (await launcher.trainer()).succeed(adapter)
    await reach(jobs, job, "succeeded")


async def test_a_suffix_that_makes_too_long_a_name_is_refused_and_nothing_is_left(
    office: Office, jobs: JobService
) -> None:
    new = await office.new()
    from dataclasses import replace

    with pytest.raises(InvalidInput, match="too long"):
        await jobs.create(replace(new, suffix="x" * 120))
    assert (await jobs.list())[0] == []
    assert not list((office.running.home / "runs").glob("*"))
