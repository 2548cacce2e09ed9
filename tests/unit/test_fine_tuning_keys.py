"""Who may tune what: scopes, and keys that are limited to some models."""

import openai
import pytest
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint

from .conftest import BASE, AppFactory, MakeAdapter
from .fine_tuning_support import Tuning, open_tuning, quicken, sdk_of


async def key(tuning: Tuning, *models: str) -> openai.AsyncOpenAI:
    keys = tuning.running.services.keys
    secret, _ = await keys.create("tuner", scopes=["tune"], allowed_models=list(models) or None)
    return sdk_of(tuning.running, secret)


async def test_a_limited_key_sees_the_jobs_of_its_models_only(
    app_factory: AppFactory, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    quicken(monkeypatch)
    async with open_tuning(app_factory, admin_key="root") as tuning:
        checkpoint = tuning.running.services.catalog.get(BASE).source
        await tuning.running.services.catalog.add("other", checkpoint)
        mine = await tuning.create()
        trainer = await tuning.launcher.trainer()
        trainer.write("started", step=0, total_steps=4)
        trainer.checkpoint(1, make_adapter(1))
        secret = [await tuning.create(model="other") for _ in range(3)]
        newest = await tuning.create()
        limited = await key(tuning, BASE)
        jobs = limited.fine_tuning.jobs

        assert [job.id async for job in jobs.list(limit=1)] == [newest.id, mine.id]
        page = await jobs.list(limit=2)
        assert page.has_more is False
        assert (await jobs.retrieve(mine.id)).id == mine.id
        for call in (jobs.retrieve, jobs.cancel, jobs.pause, jobs.resume, jobs.list_events, jobs.checkpoints.list):
            with pytest.raises(openai.NotFoundError):
                await call(secret[0].id)
        with pytest.raises(openai.PermissionDeniedError):
            await jobs.create(model="other", training_file=tuning.file)
        assert (await tuning.sdk.fine_tuning.jobs.retrieve(secret[0].id)).status != "cancelled"

        checkpoints: list[FineTuningJobCheckpoint] = []
        while not checkpoints:
            checkpoints = [each async for each in jobs.checkpoints.list(mine.id)]
        name = checkpoints[0].fine_tuned_model_checkpoint
        assert [p.project_id async for p in limited.fine_tuning.checkpoints.permissions.create(name, project_ids=["a"])]
        stranger = await key(tuning, "other")
        with pytest.raises(openai.NotFoundError):
            await stranger.fine_tuning.checkpoints.permissions.list(name)
