"""Every fine-tuning call of the official SDK, answers checked strictly, over scripted trainers."""

import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint

from ..support.scripted_trainer import Process
from .conftest import BASE, AppFactory, MakeAdapter
from .fine_tuning_support import Tuning, extra, open_tuning, quicken

PREPARED = {"rows": 50, "tokens": 5000, "total_steps": 4, "digest": "abc"}


@pytest.fixture
async def tuning(app_factory: AppFactory, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Tuning]:
    quicken(monkeypatch)
    async with open_tuning(app_factory) as tuning:
        yield tuning


@pytest.fixture
def adapter(make_adapter: MakeAdapter) -> Path:
    return make_adapter(1)


async def first_process(tuning: Tuning) -> Process:
    await tuning.launcher.started.wait()
    return tuning.launcher.processes[0]


async def prepared(tuning: Tuning, **hyperparameters: Any) -> None:
    """Let the first phase end by hand, with what `auto` became."""
    process = await first_process(tuning)
    process.write("prepared", **PREPARED, hyperparameters=hyperparameters)
    process.die()


async def test_a_job_from_its_creation_to_its_model(tuning: Tuning, adapter: Path) -> None:
    tuning.launcher.prepares = False
    job = await tuning.create(
        suffix="support-v1",
        seed=7,
        metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
        integrations=[{"type": "wandb", "wandb": {"project": "p", "tags": ["x"]}}],
        tuning={"lora_rank": 4, "priority": 5},
    )
    assert (job.object, job.status, job.model, job.seed) == ("fine_tuning.job", "validating_files", BASE, 7)
    assert job.id.startswith("ftjob-")
    assert job.training_file == tuning.file
    assert (job.validation_file, job.fine_tuned_model, job.finished_at, job.error) == (None, None, None, None)
    assert (job.trained_tokens, job.estimated_finish, job.result_files) == (None, None, [])
    assert job.metadata == {"team": "a"}
    assert job.hyperparameters.model_dump() == {
        "batch_size": "auto",
        "learning_rate_multiplier": "auto",
        "n_epochs": 2,
    }
    assert job.method is not None
    assert job.method.type == "supervised"
    assert job.method.supervised is not None
    assert job.method.supervised.hyperparameters is not None
    assert job.method.supervised.hyperparameters.n_epochs == 2
    assert job.integrations is not None
    assert job.integrations[0].wandb.project == "p"
    assert (extra(job, "base_model"), extra(job, "paused"), extra(job, "priority")) == (BASE, False, 5)
    assert extra(job, "progress") is None
    assert extra(job, "tuning")["lora_rank"] == 4
    assert extra(job, "tuning")["per_device_train_batch_size"] == "auto"

    await prepared(
        tuning, per_device_train_batch_size=3, gradient_accumulation_steps=2, learning_rate=2e-4, warmup_ratio=0.1
    )
    trainer = await tuning.launcher.trainer()
    trainer.write("started", step=0, total_steps=4)
    trainer.step(1, 2.0)
    trainer.write("metrics", step=2, train_loss=1.0, tokens=20, tokens_per_second=50.0, eta_seconds=600.0, epoch=0.5)
    job = await tuning.reach(job.id, "running")
    while (extra(job, "progress") or {}).get("step") != 2:
        job = await tuning.sdk.fine_tuning.jobs.retrieve(job.id)
    assert job.hyperparameters.model_dump() == {"batch_size": 6, "learning_rate_multiplier": 1.0, "n_epochs": 2}
    assert extra(job, "tuning")["learning_rate"] == 2e-4
    assert extra(job, "progress") == {
        "step": 2,
        "total_steps": 4,
        "train_loss": 1.0,
        "tokens": 20,
        "tokens_per_second": 50.0,
        "eta_seconds": 600.0,
        "epoch": 0.5,
    }
    assert job.estimated_finish is not None
    assert 595 <= job.estimated_finish - job.created_at <= 620

    trainer.succeed(adapter)
    job = await tuning.reach(job.id, "succeeded")
    assert job.fine_tuned_model == f"ft:{BASE}:support-v1:{job.id.removeprefix('ftjob-')[:8]}"
    assert job.trained_tokens == 40
    assert job.finished_at is not None
    assert job.estimated_finish is None
    content = await tuning.sdk.files.content(job.result_files[0])
    assert content.text.startswith("step,train_loss")
    hello = [{"role": "user", "content": "Hi"}]
    answer = await tuning.sdk.chat.completions.create(model=job.fine_tuned_model, messages=hello)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == f"Hello from {job.fine_tuned_model}@1."


async def test_jobs_are_listed_page_by_page_and_filtered_by_metadata(tuning: Tuning) -> None:
    made = [await tuning.create(metadata={"n": str(n), "odd": str(n % 2)}) for n in range(5)]
    bare = await tuning.create()
    newest_first = [bare.id, *(job.id for job in reversed(made))]
    jobs = tuning.sdk.fine_tuning.jobs
    assert [job.id async for job in jobs.list()] == newest_first
    page = await jobs.list(limit=4)
    assert (len(page.data), page.has_more) == (4, True)
    assert [job.id async for job in jobs.list(limit=2)] == newest_first
    assert [job.id async for job in jobs.list(after=made[2].id)] == [made[1].id, made[0].id]
    assert [job.id async for job in jobs.list(metadata={"odd": "1"}, limit=1)] == [made[3].id, made[1].id]
    assert [job.id async for job in jobs.list(metadata={"odd": "1", "n": "3"})] == [made[3].id]
    assert [job.id async for job in jobs.list(metadata={"n": ""})] == []
    assert [job.id async for job in jobs.list(extra_query={"metadata": "null"})] == [bare.id]
    with pytest.raises(openai.NotFoundError):
        await jobs.list(after="ftjob-none")
    assert bare.metadata is None


@pytest.mark.parametrize("query", ["metadata=x", "metadata=null&metadata[a]=1", "metadata[a]=1&metadata[a]=2"])
async def test_a_filter_that_makes_no_sense_is_refused(tuning: Tuning, query: str) -> None:
    response = await tuning.running.client.get(f"/v1/fine_tuning/jobs?{query}")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "metadata")


async def test_pause_resume_cancel(tuning: Tuning) -> None:
    jobs = tuning.sdk.fine_tuning.jobs
    job = await tuning.create()
    trainer = await tuning.launcher.trainer()
    trainer.write("started", step=0, total_steps=4)
    paused = await jobs.pause(job.id)
    assert (paused.status, extra(paused, "paused")) == ("running", False)  # until the step is done and saved
    trainer.stop("pause", 1)
    paused = await tuning.reach(job.id, "queued")
    assert extra(paused, "paused") is True
    resumed = await jobs.resume(job.id)
    assert extra(resumed, "paused") is False
    await tuning.launcher.trainer(1)
    cancelled = await jobs.cancel(job.id)
    assert cancelled.status == "cancelled"
    assert cancelled.finished_at is not None
    for call in (jobs.cancel, jobs.pause, jobs.resume):
        with pytest.raises(openai.ConflictError) as caught:
            await call(job.id)
        assert "cancelled" in caught.value.message


async def test_a_failed_job_says_why(tuning: Tuning) -> None:
    tuning.launcher.prepares = False
    job = await tuning.create()
    process = await first_process(tuning)
    process.write("failed", "data.jsonl, line 3: no assistant message.", code="bad_row", param="training_file", line=3)
    process.die()
    job = await tuning.reach(job.id, "failed")
    assert job.error is not None
    assert job.error.model_dump() == {
        "code": "bad_row",
        "message": "data.jsonl, line 3: no assistant message.",
        "param": "training_file",
        "line": 3,
    }


async def test_events_newest_first(tuning: Tuning) -> None:
    job = await tuning.create()
    trainer = await tuning.launcher.trainer()
    trainer.write("started", step=0, total_steps=4)
    trainer.step(1, 2.0)
    trainer.step(2, float("nan"))
    while not extra(job, "progress") or extra(job, "progress")["step"] != 2:
        job = await tuning.sdk.fine_tuning.jobs.retrieve(job.id)
    assert extra(job, "progress")["train_loss"] is None  # JSON has no NaN
    events = [event async for event in tuning.sdk.fine_tuning.jobs.list_events(job.id, limit=2)]
    assert [extra(event, "seq") for event in events] == [5, 4, 3, 2, 1]
    assert events[1].type == "metrics"
    assert events[1].message == "Step 1/4: training loss=2.0000"
    assert events[1].data == {"step": 1, "train_loss": 2.0, "tokens": 10, "eta_seconds": 3.0}
    assert events[-1].message == f"Created fine-tuning job: {job.id}"
    with pytest.raises(openai.NotFoundError):
        await tuning.sdk.fine_tuning.jobs.list_events(job.id, after="ftevent-none")


async def test_checkpoints_are_models_and_have_permissions(tuning: Tuning, make_adapter: MakeAdapter) -> None:
    job = await tuning.create()
    trainer = await tuning.launcher.trainer()
    trainer.write("started", step=0, total_steps=4)
    for step in (1, 2, 3):
        trainer.checkpoint(step, make_adapter(step))
    api = tuning.sdk.fine_tuning
    found: list[FineTuningJobCheckpoint] = []
    while len(found) < 3:
        found = [checkpoint async for checkpoint in api.jobs.checkpoints.list(job.id, limit=2)]
    assert [checkpoint.step_number for checkpoint in found] == [3, 2, 1]
    name = found[0].fine_tuned_model_checkpoint
    assert name == f"ft:{BASE}::{job.id.removeprefix('ftjob-')[:8]}:ckpt-step-3"
    assert found[0].fine_tuning_job_id == job.id
    assert found[0].metrics.model_dump(exclude_none=True) == {"step": 3.0, "train_loss": 0.5}

    permissions = api.checkpoints.permissions
    granted = [each async for each in permissions.create(name, project_ids=["proj_a", "proj_b"])]
    assert [each.project_id for each in granted] == ["proj_a", "proj_b"]
    assert {each.id async for each in permissions.create(name, project_ids=["proj_a"])} == {granted[0].id}
    assert {each.id async for each in permissions.list(name, limit=1)} == {each.id for each in granted}
    assert [each.id async for each in permissions.list(name, project_id="proj_b")] == [granted[1].id]
    ascending = [each.id async for each in permissions.list(name, order="ascending")]
    assert ascending == [each.id async for each in permissions.list(name)][::-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        page = await permissions.retrieve(name)
    assert (page.object, page.has_more, len(page.data)) == ("list", False, 2)
    assert (page.first_id, page.last_id) == (page.data[0].id, page.data[1].id)
    deleted = await permissions.delete(granted[0].id, fine_tuned_model_checkpoint=name)
    assert (deleted.id, deleted.deleted) == (granted[0].id, True)
    assert [each.id async for each in permissions.list(name)] == [granted[1].id]
    with pytest.raises(openai.NotFoundError):
        await permissions.delete(granted[0].id, fine_tuned_model_checkpoint=name)
    with pytest.raises(openai.NotFoundError):
        await permissions.create("ft:nobody", project_ids=["proj_a"])


async def test_an_unknown_job_is_not_found_by_any_call(tuning: Tuning) -> None:
    one = "/v1/fine_tuning/jobs/ftjob-none"
    for path in ("", "/events", "/events/stream", "/events?stream=true", "/checkpoints", "/metrics", "/log"):
        response = await tuning.running.client.get(one + path)
        assert (response.status_code, response.json()["error"]["param"]) == (404, "fine_tuning_job_id"), path
    for path in ("/cancel", "/pause", "/resume"):
        assert (await tuning.running.client.post(one + path)).status_code == 404
