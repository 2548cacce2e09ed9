"""Opens job services over one app, one after the other, as a server that is started again; and waits for their jobs."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

from tuneloop.finetune.jobs.records import Job, NewJob
from tuneloop.finetune.jobs.service import JobService
from tuneloop.finetune.recipe.recipe import Recipe
from tuneloop.server.adapters.trained import TrainedModels
from tuneloop.server.services import Services

from .scripted_trainer import ScriptedLauncher, jsonl

BASE = "tiny"  # the base model of the unit tests' app
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


class OpenApp(Protocol):
    """What an office needs of an app that runs."""

    home: Path

    @property
    def services(self) -> Services: ...


class Office:
    """Opens job services over one app's database, one after the other: a server that is started again."""

    def __init__(self, running: OpenApp, launcher: ScriptedLauncher) -> None:
        self.running = running
        self.launcher = launcher

    @asynccontextmanager
    async def open(self, **options: Any) -> AsyncIterator[JobService]:
        services = self.running.services
        publisher = TrainedModels(store=services.adapters, registry=services.registry, catalog=services.catalog)
        values: dict[str, Any] = {"publisher": publisher, **options}
        jobs = JobService(
            services.database,
            files=services.files,
            catalog=services.catalog,
            adapters=services.adapters,
            launchers={"scripted": self.launcher},
            launcher="scripted",
            home=self.running.home,
            **values,
        )
        await jobs.start()
        try:
            yield jobs
        finally:
            await jobs.close()

    async def new(self, *, priority: int = 0, **recipe: Any) -> NewJob:
        files = self.running.services.files
        async with files.staging() as folder:
            path = folder / "data.jsonl"
            path.write_bytes(jsonl([CHAT]))
            file = await files.add(path, filename="data.jsonl", purpose="fine-tune")
        return NewJob(
            model=BASE,
            base=BASE,
            method="supervised",
            request={},
            recipe=Recipe.model_validate({"model_name_or_path": BASE} | recipe),
            training_file=file,
            suffix="mine",
            metadata={"team": "a"},
            priority=priority,
        )


async def reach(jobs: JobService, job: Job | str, *states: str) -> Job:
    """The job, once it is in one of these states and no process works for it unless one should."""
    job_id = job if isinstance(job, str) else job.id
    async with asyncio.timeout(10):
        while True:
            found = await jobs.get(job_id)
            if found.state in states and (found.launcher is None or found.state in ("running", "pausing")):
                return found
            await asyncio.sleep(0.01)


async def messages(jobs: JobService, job: Job) -> list[str]:
    events, _ = await jobs.events(job.id, limit=100)
    return [event.message for event in reversed(events)]
