"""Fine-tuning jobs: made, ordered, paused, found again. The one face of this folder; it knows no HTTP.

Every job for which a process works has one `Watch` in this server. The queue is the database's; `_schedule` starts the
most urgent job for which devices are free.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from weakref import WeakValueDictionary

import structlog

from ...adapters.store import AdapterStore
from ...engines.catalog import ModelCatalog
from ...storage import Database
from ...storage.errors import Conflict, TuneloopError
from ...storage.files import FileStore
from ...storage.uninterrupted import finish
from ..launchers import Launcher
from ..run_folder import Wish
from ..training.trackers import check_trackers
from .base import ENDED, Publisher, State
from .creation import JobFolders, output_name
from .devices import DevicePool
from .records import Job, JobCheckpoint, JobEvent, NewJob, Permission
from .store import JobStore, event, new_id
from .watch import Surroundings, Watch

Events = list[JobEvent]
Checkpoints = list[JobCheckpoint]
Permissions = list[Permission]

log = structlog.get_logger(__name__)

_AT_ONCE = 2  # jobs whose data are read at the same time
_FOLLOW_SECONDS = 1.0  # until a follower looks by itself, for events that another server wrote
_RETRY_SECONDS = 5.0  # until the queue is looked at again after the database or a launcher failed


class JobService:
    """All jobs of one database. `start()` comes first, on a migrated database; `close()` leaves trainers running."""

    def __init__(
        self,
        database: Database,
        *,
        files: FileStore,
        catalog: ModelCatalog,
        adapters: AdapterStore,
        publisher: Publisher,
        launchers: Mapping[str, Launcher],
        home: Path,
        devices: Sequence[str] = (),
        launcher: str = "local",
        threads: int | None = None,
        nice: int = 10,
        count_tokens: Callable[[int], None] = lambda _: None,
        may_start: Callable[[], bool] = lambda: True,
    ) -> None:
        self._store = JobStore(database)
        self._folders = JobFolders(home, files=files, catalog=catalog, adapters=adapters, nice=nice)
        self._devices = DevicePool(devices)
        self._launcher = launcher
        self._threads = threads
        self._may_start = may_start
        self._around = Surroundings(
            store=self._store,
            files=files,
            publisher=publisher,
            launchers=launchers,
            changed=self._changed,
            count_tokens=count_tokens,
        )
        self._watches: dict[str, Watch] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._news: WeakValueDictionary[str, asyncio.Event] = WeakValueDictionary()  # as long as somebody waits
        self._states: dict[str, State] = {}
        self._making: set[str] = set()  # jobs whose folders are not given free yet
        self._closed = False

    async def start(self) -> None:
        """Find the jobs again that a server before this one left: with a living trainer, a dead one, or none."""
        await self._folders.clear_unborn(self._store.known)
        for job in await self._store.in_states({"validating", "queued", "running", "pausing", "paused", "publishing"}):
            self._states[job.id] = job.state
        for job in [
            *await self._store.with_process(),
            *await self._store.in_states({"running", "pausing", "publishing"}),
        ]:
            if job.id not in self._watches:
                if job.devices is not None:
                    self._devices.hold(job.id, job.devices)
                self._watch(job)
        self._background(self._schedule_always())
        self._wake.set()

    async def close(self) -> None:
        """Stop watching. Trainers go on; the next start finds them."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def create(self, new: NewJob) -> Job:
        """A job that is on its way. Raises InvalidInput for what can be known to fail, StorageFull, Unavailable."""
        return await finish(self._create(new))

    async def get(self, job_id: str) -> Job:
        """Raises NotFound."""
        return await self._store.get(job_id)

    async def list(
        self, *, after: str | None = None, limit: int = 20, metadata: Mapping[str, str] | None = None
    ) -> tuple[list[Job], bool]:
        """Newest first, and whether there are more. Raises NotFound for an unknown `after`."""
        return await self._store.page(after=after, limit=limit, metadata=metadata)

    async def cancel(self, job_id: str) -> Job:
        """End a job for good; checkpoints stay live. Raises NotFound, Conflict for a job that has ended."""
        said = [event("info", "The job was cancelled.")]
        waiting = await self._set(
            job_id, {"queued", "paused"}, events=said, state="cancelled", wanted="cancel", finished_at=datetime.now(UTC)
        )
        if waiting is not None:
            return waiting
        running = await self._set(
            job_id,
            {"validating", "running", "pausing"},
            events=said,
            state="cancelled",
            wanted="cancel",
            finished_at=datetime.now(UTC),
        )
        if running is None:
            job = await self.get(job_id)
            raise Conflict(f"The job '{job_id}' is {_word(job)} and cannot be cancelled any more.")
        await self._tell(running, "cancel")
        return running

    async def pause(self, job_id: str) -> Job:
        """Let a job stop after its step, with a checkpoint, and wait. Raises NotFound, Conflict."""
        waiting = await self._set(job_id, {"queued"}, events=[event("info", "The job is paused.")], state="paused")
        if waiting is not None:
            return waiting
        validating = await self._set(job_id, {"validating"}, wanted="pause")
        if validating is not None:
            await self._tell(validating, "pause")
            return validating
        running = await self._set(job_id, {"running"}, state="pausing", wanted="pause")
        if running is None:
            job = await self.get(job_id)
            if job.state in ("pausing", "paused"):
                return job
            raise Conflict(f"The job '{job_id}' is {_word(job)} and cannot be paused any more.")
        await self._tell(running, "pause")
        return running

    async def resume(self, job_id: str) -> Job:
        """Let a paused job go on; or one that failed or was cancelled, from its last checkpoint. Raises Conflict."""
        said = [event("info", "The job is resumed.")]
        resumed = await self._set(job_id, {"paused"}, events=said, state="queued", wanted=None)
        if resumed is not None:
            return resumed
        job = await self.get(job_id)
        if job.state in ("failed", "cancelled") and job.launcher is None and self._folders.of(job_id).steps():
            resumed = await self._set(
                job_id,
                {"failed", "cancelled"},
                events=said,
                state="queued",
                wanted=None,
                error=None,
                attempts=0,
                finished_at=None,
                result_files=[],
            )
            if resumed is not None:
                return resumed
        hint = "wait until it is paused" if job.state == "pausing" else "only paused jobs, and failed or cancelled ones"
        tail = "" if job.state == "pausing" else " that have a checkpoint, can be resumed"
        raise Conflict(f"The job '{job_id}' is {_word(job)}; {hint}{tail}.")

    async def events(self, job_id: str, *, after: str | None = None, limit: int = 20) -> tuple[Events, bool]:
        """Newest first."""
        return await self._store.events(job_id, after=after, limit=limit)

    async def follow(self, job_id: str, *, after_seq: int = 0) -> AsyncGenerator[JobEvent]:
        """Oldest first, then live until the job has ended. Raises NotFound at the first event."""
        while True:
            news = self._news.setdefault(job_id, asyncio.Event())
            job = await self.get(job_id)
            found = await self._store.events_behind(job_id, after_seq)
            for each in found:
                after_seq = each.seq
                yield each
            if found:
                continue
            if job.state in ENDED and job.launcher is None:
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), _FOLLOW_SECONDS)

    async def checkpoints(self, job_id: str, *, after: str | None = None, limit: int = 10) -> tuple[Checkpoints, bool]:
        """Newest first."""
        return await self._store.checkpoints(job_id, after=after, limit=limit)

    async def checkpoint_named(self, model: str) -> JobCheckpoint | None:
        """The checkpoint that is live under a model name."""
        return await self._store.checkpoint_named(model)

    async def grant(self, checkpoint: str, projects: Sequence[str]) -> Permissions:
        """Permissions for all these projects; those that have one keep it."""
        return await self._store.grant(checkpoint, projects)

    async def permissions(
        self,
        checkpoint: str,
        *,
        project: str | None = None,
        after: str | None = None,
        limit: int = 10,
        order: Literal["ascending", "descending"] = "descending",
    ) -> tuple[Permissions, bool]:
        """By age."""
        return await self._store.permissions(checkpoint, project=project, after=after, limit=limit, order=order)

    async def revoke(self, checkpoint: str, permission_id: str) -> None:
        """Raises NotFound."""
        await self._store.revoke(checkpoint, permission_id)

    def counts(self) -> Mapping[str, int]:
        """Jobs that have not ended, by state."""
        return Counter(list(self._states.values()))

    async def _create(self, new: NewJob) -> Job:
        job_id = new_id("ftjob-")
        self._making.add(job_id)
        try:
            job = await self._make(job_id, new)
        finally:
            self._making.discard(job_id)
        self._changed(job)
        return job

    async def _make(self, job_id: str, new: NewJob) -> Job:
        self._devices.check(new.recipe.num_processes)
        name = output_name(new.base, new.suffix, job_id)
        async with self._folders.making(job_id, new) as spec:
            check_trackers(spec.recipe.report_to, param="integrations")
            return await self._store.add(
                {
                    "id": job_id,
                    "state": "validating",
                    "wanted": None,
                    "priority": new.priority,
                    "model": new.model,
                    "base": new.base,
                    "method": new.method,
                    "request": dict(new.request),
                    "spec": spec.model_dump(mode="json"),
                    "job_metadata": dict(new.metadata),
                    "training_file": new.training_file.id,
                    "validation_file": None if new.validation_file is None else new.validation_file.id,
                    "output_name": name,
                    "attempts": 0,
                    "attempt_step": 0,
                    "log_offset": 0,
                },
                f"Created fine-tuning job: {job_id}",
            )

    async def _tell(self, job: Job, wish: Wish) -> None:
        watch = self._watches.get(job.id)
        if watch is not None:
            watch.hear(job)
            await watch.stop(wish)

    async def _set(self, job_id: str, states: Any, *, events: Any = (), **values: Any) -> Job | None:
        job = await self._store.change(job_id, states=states, events=events, **values)
        if job is not None:
            self._changed(job)
        return job

    def _changed(self, job: Job) -> None:
        """After each change: wake those who wait for it."""
        if job.state in ENDED:
            self._states.pop(job.id, None)
        else:
            self._states[job.id] = job.state
        news = self._news.pop(job.id, None)
        if news is not None:
            news.set()
        self._wake.set()

    async def _schedule_always(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._schedule()
            except TuneloopError as error:
                log.warning("the queue of fine-tuning jobs cannot be read", reason=error.message)
            except Exception:
                log.exception("the queue of fine-tuning jobs cannot be read")
            else:
                continue
            await asyncio.sleep(_RETRY_SECONDS)
            self._wake.set()

    async def _schedule(self) -> None:
        """Start what may start; nothing while the server is about to end.

        The most urgent job waits for devices and nobody overtakes it, so that it comes on.
        """
        if not self._may_start():
            return
        reading = sum(1 for watch in self._watches.values() if watch.job.state == "validating")
        for job in await self._store.in_states({"validating"}):
            if job.id not in self._watches and job.id not in self._making and reading < _AT_ONCE:
                reading += 1
                self._watch(job)
        for job in await self._store.in_states({"queued"}):
            if job.id in self._watches:  # its last process has not ended yet
                continue
            devices = self._devices.take(job.id, int(job.spec["recipe"]["num_processes"]))
            if devices is None:
                return
            started = None
            try:
                started = await self._set(job.id, {"queued"}, state="running", devices=list(devices), wanted=None)
            finally:
                if started is None:
                    self._devices.give_back(job.id)
            if started is not None:
                self._watch(started)

    def _watch(self, job: Job) -> None:
        watch = Watch(job, self._folders.of(job.id), self._around, launcher=self._launcher, threads=self._threads)
        self._watches[job.id] = watch
        self._background(self._follow_process(watch))

    async def _follow_process(self, watch: Watch) -> None:
        """To its end, whatever fails on the way."""
        job_id = watch.job.id
        while True:
            try:
                await watch.run()
                break
            except TuneloopError as error:
                log.warning("a fine-tuning job cannot be followed", job=job_id, reason=error.message)
            except Exception:
                log.exception("a fine-tuning job cannot be followed", job=job_id)
            await asyncio.sleep(_RETRY_SECONDS)
        del self._watches[job_id]
        self._devices.give_back(job_id)
        self._wake.set()

    def _background(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _word(job: Job) -> str:
    return {"publishing": "almost done", "pausing": "being paused"}.get(job.state, job.state)
