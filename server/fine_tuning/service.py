"""What callers may see and do with fine-tuning jobs, beside making them (`intake.py`). It knows no HTTP.

A key that is limited to some models sees the jobs of those models only; the others do not exist for it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

from ...finetune.jobs.records import Job, JobEvent
from ...finetune.jobs.service import JobService
from ...finetune.run_folder import RunFolder
from ...storage.errors import NotFound
from .cards import MetricsCard, SeriesCard
from .log_tail import tail
from .resolved import finite

MayUse = Callable[[str], bool]
_PAGE = 1000


class FineTuningService:
    """`may_use` is the caller's: whether it may name a model."""

    def __init__(self, jobs: JobService, home: Path, may_use: MayUse) -> None:
        self._jobs = jobs
        self._home = home
        self._may_use = may_use

    async def get(self, job_id: str) -> Job:
        """Raises NotFound, also for a job whose model the caller may not use."""
        job = await self._jobs.get(job_id)
        if not self._may_use(job.model):
            raise NotFound(
                f"There is no fine-tuning job '{job_id}'. GET /v1/fine_tuning/jobs lists them.",
                param="fine_tuning_job_id",
            )
        return job

    async def list(
        self, *, after: str | None, limit: int, metadata: Mapping[str, str] | None, without_metadata: bool
    ) -> tuple[list[Job], bool]:
        """Newest first. `without_metadata` keeps only jobs that have none."""
        found: list[Job] = []
        while True:
            jobs, more = await self._jobs.list(after=after, limit=limit, metadata=metadata)
            for job in jobs:
                if self._may_use(job.model) and not (without_metadata and job.metadata):
                    if len(found) == limit:
                        return found, True
                    found.append(job)
            if not more or not jobs:
                return found, False
            after = jobs[-1].id

    async def check_checkpoint(self, model: str) -> None:
        """Raises NotFound unless there is a checkpoint of this name, of a job that the caller may see."""
        checkpoint = await self._jobs.checkpoint_named(model)
        if checkpoint is None:
            raise NotFound(f"There is no checkpoint '{model}'.", param="fine_tuned_model_checkpoint")
        await self.get(checkpoint.job)

    async def metrics(self, job_id: str) -> MetricsCard:
        """Every point of every curve, in the order of steps. A point that is no number (a diverged loss) is null."""
        curves: dict[str, dict[int, float | None]] = {}
        async for event in self._newest_first(job_id):
            for name, value in finite(event.data).items() if event.type == "metrics" else ():
                if name != "step" and (value is None or type(value) in (int, float)):
                    # A trainer that was killed computes steps again: the newest point of a step counts.
                    curves.setdefault(name, {}).setdefault(event.data["step"], value)
        series = {}
        for name, curve in curves.items():
            steps = sorted(curve)
            series[name] = SeriesCard(step=steps, value=[curve[step] for step in steps])
        return MetricsCard(fine_tuning_job_id=job_id, series=series)

    async def log(self, job_id: str, lines: int) -> str:
        """The last lines of what the job's processes printed; none before they began."""
        return await asyncio.to_thread(tail, RunFolder(self._home / "runs" / job_id).log, lines)

    async def _newest_first(self, job_id: str) -> AsyncIterator[JobEvent]:
        after, more = None, True
        while more:
            events, more = await self._jobs.events(job_id, after=after, limit=_PAGE)
            for event in events:
                yield event
            after = events[-1].id if events else None
