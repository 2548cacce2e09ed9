"""Follows the process of one job from its start to its end: reads its event log, makes results live, starts it again
when it dies. It decides no order between jobs.

Whatever an event asks for is done before the log's offset moves past it, and is safe to do twice; so a server that is
killed at any moment does the rest when it starts again, and no event is lost or counted twice.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...storage.errors import Conflict, StorageFull, TuneloopError, Unavailable
from ...storage.files import FileStore
from ..events import Event, read_events
from ..launchers import Launcher
from ..run_folder import Phase, RunFolder, Wish
from .base import ACTIVE, ENDED, Publisher, State
from .cleanup import tidy
from .imports import Changes, take
from .records import Job, JobCheckpoint
from .results import result_csv
from .store import JobStore, event, new_id

_POLL_SECONDS = 0.05
_CHECK_SECONDS = 1.0  # between looks at whether the process lives
_PATIENCE_SECONDS = 30.0  # for a process to save and end, until it is killed
_CLOSING_SECONDS = 300.0  # the same for one that has succeeded and closes its trackers
_OF_THE_LOG = frozenset({"log_offset", "resolved", "progress"})
_BEGUN: frozenset[State] = frozenset({"validating", "running", "pausing"})


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a watch works with; the same for all jobs."""

    store: JobStore
    files: FileStore
    publisher: Publisher
    launchers: Mapping[str, Launcher]
    changed: Callable[[Job], None]  # told after each committed change
    count_tokens: Callable[[int], None]


class Watch:
    """One job's. `run` ends when no process works for the job any more: it ended, is paused, or queued again."""

    def __init__(self, job: Job, run: RunFolder, around: Surroundings, *, launcher: str, threads: int | None) -> None:
        self.job = job
        self._run_folder = run
        self._around = around
        self._launcher = around.launchers[job.launcher or launcher]
        self._threads = threads
        self._finished = False  # the trainer has said its last word
        self._offset = job.log_offset  # nobody else's to move

    async def run(self) -> None:
        """Start the phase that the job's state asks for, unless its process is there already, and follow it.

        After a failure (of the database, say) it can be called again, and goes on.
        """
        self._finished = False
        self._took(await self._around.store.get(self.job.id))
        if self.job.handle is None:
            await self._read()  # of a process whose starter was killed before it could note the handle
            if not self._finished and self.job.state in _BEGUN:
                await self._start()
        elif self.job.wanted is not None:  # whoever wanted it may have been killed before the process heard of it
            await self.stop("pause" if self.job.wanted == "pause" else "cancel")
        clock = asyncio.get_running_loop().time
        checked = clock()
        ending: float | None = None  # since when the process has nothing left to do
        while True:
            busy = await self._read()
            if ending is None and (self._finished or self.job.state in ENDED):
                ending = clock()
            if not busy and clock() - checked >= (_CHECK_SECONDS if ending is None else _POLL_SECONDS):
                checked = clock()
                if not await self._alive():
                    if not await self._read():
                        await self._gone()
                        return
                elif ending is not None and clock() - ending > self._patience:
                    await self._kill()
                self.job = await self._around.store.get(self.job.id)  # another server may have changed it
            await asyncio.sleep(_POLL_SECONDS)

    @property
    def _patience(self) -> float:
        return _CLOSING_SECONDS if self.job.state == "succeeded" and not self._finished else _PATIENCE_SECONDS

    def hear(self, job: Job) -> None:
        """The job was changed by somebody else."""
        if job.updated_at >= self.job.updated_at:
            self.job = job

    async def stop(self, wish: Wish) -> None:
        """Ask the process to end between two steps; one that is to be cancelled need not save."""
        with suppress(FileNotFoundError):  # somebody removed the folder
            await asyncio.to_thread(self._run_folder.want, wish)
        if wish == "cancel" and self.job.handle is not None:
            await self._launcher.stop(self._run_folder, self.job.handle)

    async def _start(self) -> None:
        phase: Phase = "prepare" if self.job.state == "validating" else "train"
        if not await asyncio.to_thread((self._run_folder.path / "spec.json").is_file):
            message = f"The folder of the job, {self._run_folder.path}, is gone. Create the job again."
            await self._fail(Changes(), {"code": "run_folder_missing", "message": message, "param": None})
            return
        handle = await self._launcher.find(self._run_folder)
        if handle is not None:
            await self._change(handle=dict(handle), launcher=self._launcher.name)
            return
        if phase == "train":
            await asyncio.to_thread(self._run_folder.want, "pause" if self.job.wanted == "pause" else None)
            await asyncio.to_thread(self._run_folder.place, self.job.devices or ())
        processes = int(self.job.spec["recipe"]["num_processes"])
        handle = await self._launcher.start(self._run_folder, phase, processes=processes, threads=self._threads)
        await self._change(
            handle=dict(handle),
            launcher=self._launcher.name,
            attempts=self.job.attempts + 1,
            started_at=datetime.now(UTC),
        )
        if self.job.wanted is not None:  # it came while the process was being started
            await self.stop("pause" if self.job.wanted == "pause" else "cancel")

    async def _alive(self) -> bool:
        return self.job.handle is not None and await self._launcher.alive(self._run_folder, self.job.handle)

    async def _kill(self) -> None:
        if self.job.handle is not None:
            await self._launcher.stop(self._run_folder, self.job.handle, force=True)

    async def _read(self) -> bool:
        """Take in what is new in the log; whether there was anything."""
        path = self._run_folder.events
        try:
            if path.stat().st_size <= self._offset:  # a stat is quicker than a thread
                return False
        except FileNotFoundError:
            return False
        found = await asyncio.to_thread(lambda: list(read_events(path, self._offset)))
        changes = Changes()
        for each in found:
            if each.kind in ("metrics", "message", "started"):
                take(changes, self.job, each)
                continue
            await self._write(changes)
            changes = Changes()
            take(changes, self.job, each)
            await self._act(each, changes)
            changes = Changes()
        await self._write(changes)
        return bool(found)

    async def _act(self, found: Event, changes: Changes) -> None:
        """Events that change the job's state or make something live."""
        match found.kind:
            case "prepared":
                await self._prepared(changes)
            case "checkpoint":
                await self._checkpoint(found, changes)
            case "result":
                await self._result(found, changes)
            case "finished":
                self._finished = True
                await self._write(changes)
            case "stopped":
                self._finished = True
                await self._stopped(found, changes)
            case "failed":
                self._finished = True
                error = {"code": found.data.get("code") or "training_failed", "message": found.message}
                param = found.data.get("param")
                await self._fail(changes, error | {"param": param, "line": found.data.get("line")})

    async def _prepared(self, changes: Changes) -> None:
        """Queued; or paused, if somebody asked for that meanwhile, be it in this very moment."""
        wishes: tuple[tuple[str | None, State], ...] = ((None, "queued"), ("pause", "paused"))
        for wanted, state in wishes:
            if await self._try(
                changes,
                from_states={"validating"},
                expected={"wanted": wanted},
                state=state,
                attempts=0,
                wanted=None,
            ):
                return
        await self._write(changes)

    async def _checkpoint(self, found: Event, changes: Changes) -> None:
        step = int(found.data["step"])
        name = f"{self.job.output_name}:ckpt-step-{step}"
        folder = self._run_folder.path / str(found.data["path"])
        checkpoint = None
        try:
            if await asyncio.to_thread(folder.is_dir):
                await self._publish(found.data["kind"], folder, name, step, found.data["metrics"])
                checkpoint = JobCheckpoint(
                    id=new_id("ftckpt_"),
                    job=self.job.id,
                    step=step,
                    model=name,
                    created_at=datetime.fromtimestamp(found.at, UTC),
                    metrics=dict(found.data["metrics"]),
                )
                changes.say(
                    found.at, event("info", f"Checkpoint created at step {step}: {name}", step=step, model=name)
                )
            if found.data["kind"] == "model":  # adapters are copies; a model is served from the run's own folder
                await self._withdraw(found.data.get("gone", ()))
        except TuneloopError as error:  # the training is none the worse for it
            changes.say(
                found.at, event("warn", f"The checkpoint of step {step} cannot be served: {error.message}", step=step)
            )
        await self._write(changes, checkpoint=checkpoint)

    async def _withdraw(self, steps: Sequence[int]) -> None:
        for step in steps:
            name = f"{self.job.output_name}:ckpt-step-{step}"
            await self._around.publisher.withdraw_model(name)
            await self._around.store.drop_checkpoint(name)

    async def _result(self, found: Event, changes: Changes) -> None:
        """Live first, then told: nobody hears of a model that cannot answer yet."""
        if not await self._change(from_states={"running", "pausing", "publishing"}, state="publishing"):
            await self._write(changes)  # it was cancelled
            return
        name, step = self.job.output_name, int(found.data["step"])
        folder = self._run_folder.path / str(found.data["path"])
        try:
            await self._publish(found.data["kind"], folder, name, step, found.data["metrics"])
        except TuneloopError as error:
            if isinstance(error, Unavailable) and not isinstance(error, StorageFull):
                raise  # a database or bucket that is out of reach comes back: the event is taken up again
            message = f"The training succeeded, and its result cannot be served: {error.message}"
            await self._fail(changes, {"code": error.code, "message": message, "param": error.param})
            return
        await self._add_result_file()
        changes.say(found.at, event("info", f"New fine-tuned model created: {name}", model=name))
        changes.events.append(event("info", "The job has successfully completed."))
        await self._write(
            changes, state="succeeded", wanted=None, fine_tuned_model=name, error=None, finished_at=datetime.now(UTC)
        )
        self._around.count_tokens(int(found.data["trained_tokens"]))

    async def _publish(self, kind: str, folder: Path, name: str, step: int, metrics: Mapping[str, Any]) -> None:
        lineage = {
            "job": self.job.id,
            "step": step,
            "training_file": self.job.training_file,
            "data_digest": self.job.resolved.get("digest"),
            "hyperparameters": self.job.resolved.get("hyperparameters"),
        }
        publisher = self._around.publisher
        if kind == "adapter":
            await publisher.publish_adapter(
                folder, name=name, base=self.job.base, source=self.job.id, metrics=metrics, metadata=lineage
            )
        else:
            await publisher.publish_model(folder, name=name, metadata=lineage)

    async def _stopped(self, found: Event, changes: Changes) -> None:
        step = found.data["step"]
        if self.job.state in ENDED:
            await self._write(changes)
        elif found.data["reason"] == "cancel":
            await self._write(changes, from_states=ACTIVE, state="cancelled", finished_at=datetime.now(UTC))
        else:
            again = event("info", f"The trainer was asked to end after step {step}; it will go on.")
            goes_on = Changes(values=dict(changes.values))
            goes_on.say(found.at, again)
            if found.data["reason"] == "interrupted" and await self._try(
                goes_on, from_states={"running"}, state="queued", attempts=0
            ):
                return
            changes.say(found.at, event("info", f"The job is paused after step {step}."))
            await self._write(changes, from_states={"running", "pausing"}, state="paused", wanted=None, attempts=0)

    async def _fail(self, changes: Changes, error: Mapping[str, Any]) -> None:
        changes.events.append(
            event("error", str(error["message"]), **{k: v for k, v in error.items() if k != "message"})
        )
        await self._write(changes, from_states=ACTIVE, state="failed", error=dict(error), finished_at=datetime.now(UTC))

    async def _gone(self) -> None:
        """No process lives, and its log is read to the end."""
        while self.job.state in ACTIVE and not await self._died():
            self.job = await self._around.store.get(self.job.id)  # somebody wanted something in this very moment
        if self.job.state in ENDED:
            await self._add_result_file()
            await asyncio.to_thread(tidy, self._run_folder, succeeded=self.job.state == "succeeded")
        await self._change(handle=None, launcher=None, devices=None)

    async def _died(self) -> bool:
        """Without a last word: killed, by whomever. It goes on from its last checkpoint, if that leads anywhere.

        False if the job's state is another by now.
        """
        assert self.job.handle is not None
        before = self.job.state
        reason = await self._launcher.exit_reason(self._run_folder, self.job.handle)
        steps = await asyncio.to_thread(self._run_folder.steps)
        newest = steps[-1] if steps else 0
        attempts = 0 if newest > self.job.attempt_step else self.job.attempts
        if attempts > int(self.job.spec["recipe"]["max_retries"]):
            message = f"{reason} That were {attempts} attempts without a new checkpoint; no more are made."
            await self._fail(Changes(), {"code": "trainer_died", "message": message, "param": None})
            return True
        where = f"from step {newest}" if newest else "from the beginning"
        after: dict[str, State] = {"validating": "validating", "pausing": "paused"}
        values: dict[str, Any] = {"wanted": None} if before == "pausing" else {}
        changed = await self._change(
            from_states={before},
            state=after.get(before, "queued"),
            attempts=attempts,
            attempt_step=newest,
            events=[event("warn", f"{reason} It goes on {where}.", step=newest)],
            **values,
        )
        return changed is not None

    async def _add_result_file(self) -> None:
        """The curves as a file. A job that ended without a step has none; one on a full disk says so and goes on."""
        if self.job.result_files:
            return
        path = self._run_folder.events
        text = await asyncio.to_thread(lambda: result_csv(read_events(path)))
        if text.count("\n") < 2:
            return
        files = self._around.files
        try:
            async with files.staging() as folder:
                file = folder / "step_metrics.csv"
                await asyncio.to_thread(file.write_text, text, "utf-8")
                stored = await files.add(file, filename="step_metrics.csv", purpose="fine-tune-results")
        except StorageFull as error:
            await self._change(events=[event("warn", f"The file of all metrics cannot be stored: {error.message}")])
            return
        await self._change(result_files=[stored.id])

    async def _try(
        self,
        changes: Changes,
        *,
        from_states: Collection[State] | None = None,
        expected: Mapping[str, Any] | None = None,
        checkpoint: JobCheckpoint | None = None,
        **values: Any,
    ) -> bool:
        """Write what was read and what follows from it; False, and nothing, if the job is not as expected.

        The log's offset moves from where this watch left it only: what another has taken in counts once.
        """
        if not changes.values and not changes.events and not values:
            return True
        mine = {"log_offset": self._offset} if "log_offset" in changes.values else {}
        changed = await self._around.store.change(
            self.job.id,
            states=from_states,
            expected={**mine, **(expected or {})},
            events=changes.events,
            checkpoint=checkpoint,
            **changes.values,
            **values,
        )
        if changed is not None:
            self._took(changed)
        return changed is not None

    async def _write(self, changes: Changes, **values: Any) -> None:
        """The same, where the log goes on even if the job's state has become another: then the rest is left out."""
        if await self._try(changes, **values):
            return
        kept = {name: value for name, value in changes.values.items() if name in _OF_THE_LOG}
        if not await self._try(Changes(values=kept, events=changes.events)):
            raise Conflict(f"Another server follows the job '{self.job.id}' too.")

    async def _change(self, *, from_states: Any = None, events: Any = (), **values: Any) -> Job | None:
        changed = await self._around.store.change(self.job.id, states=from_states, events=events, **values)
        if changed is not None:
            self._took(changed)
        return changed

    def _took(self, changed: Job) -> None:
        self.job, self._offset = changed, changed.log_offset
        self._around.changed(changed)
