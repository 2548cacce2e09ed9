"""Follows the process of one job from its start to its end: reads its event log, makes results live, starts it again
when it dies. It decides no order between jobs.

Whatever an event asks for is done before the log's offset moves past it, and is safe to do twice; so a server that is
killed at any moment does the rest when it starts again, and no event is lost or counted twice.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...storage.errors import TuneloopError
from ...storage.files import FileStore
from ..events import Event, read_events
from ..launchers import Launcher
from ..run_folder import Phase, RunFolder, Wish
from .base import ACTIVE, ENDED, Publisher
from .cleanup import tidy
from .imports import Changes, take
from .records import Job, JobCheckpoint
from .results import result_csv
from .store import JobStore, event, new_id

_POLL_SECONDS = 0.05
_CHECK_SECONDS = 1.0  # between looks at whether the process lives
_PATIENCE_SECONDS = 30.0  # for a process to save and end, until it is killed


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

    async def run(self) -> None:
        """Start the phase that the job's state asks for, unless its process is there already, and follow it."""
        if self.job.handle is None:
            await self._start()
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
                elif ending is not None and clock() - ending > _PATIENCE_SECONDS:
                    await self._kill()
                self.job = await self._around.store.get(self.job.id)  # another server may have changed it
            await asyncio.sleep(_POLL_SECONDS)

    async def stop(self, wish: Wish) -> None:
        """Ask the process to end between two steps; one that is to be cancelled need not save."""
        await asyncio.to_thread(self._run_folder.want, wish)
        if wish == "cancel" and self.job.handle is not None:
            await self._launcher.stop(self._run_folder, self.job.handle)

    async def _start(self) -> None:
        phase: Phase = "prepare" if self.job.state == "validating" else "train"
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
        if self.job.wanted == "cancel":  # it came while the process was being started
            await self.stop("cancel")

    async def _alive(self) -> bool:
        return self.job.handle is not None and await self._launcher.alive(self._run_folder, self.job.handle)

    async def _kill(self) -> None:
        if self.job.handle is not None:
            await self._launcher.stop(self._run_folder, self.job.handle, force=True)

    async def _read(self) -> bool:
        """Take in what is new in the log; whether there was anything."""
        path = self._run_folder.events
        try:
            if path.stat().st_size <= self.job.log_offset:  # a stat is quicker than a thread
                return False
        except FileNotFoundError:
            return False
        found = await asyncio.to_thread(lambda: list(read_events(path, self.job.log_offset)))
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
                state = "paused" if self.job.wanted == "pause" else "queued"
                await self._write(changes, from_states={"validating"}, state=state, attempts=0, wanted=None)
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
        except TuneloopError as error:  # the training is none the worse for it
            changes.say(
                found.at, event("warn", f"The checkpoint of step {step} cannot be served: {error.message}", step=step)
            )
        await self._write(changes, checkpoint=checkpoint)

    async def _result(self, found: Event, changes: Changes) -> None:
        """Live first, then told: nobody hears of a model that cannot answer yet."""
        if self.job.state in ENDED:
            await self._write(changes)
            return
        await self._change(from_states={"running", "pausing"}, state="publishing")
        name, step = self.job.output_name, int(found.data["step"])
        folder = self._run_folder.path / str(found.data["path"])
        try:
            await self._publish(found.data["kind"], folder, name, step, found.data["metrics"])
        except TuneloopError as error:
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
        elif found.data["reason"] == "pause" or self.job.wanted == "pause":
            changes.say(found.at, event("info", f"The job is paused after step {step}."))
            await self._write(changes, from_states={"running", "pausing"}, state="paused", wanted=None, attempts=0)
        elif found.data["reason"] == "cancel":
            await self._write(changes, from_states=ACTIVE, state="cancelled", finished_at=datetime.now(UTC))
        else:
            changes.say(found.at, event("info", f"The trainer was asked to end after step {step}; it will go on."))
            await self._write(changes, from_states={"running", "pausing"}, state="queued", attempts=0)

    async def _fail(self, changes: Changes, error: Mapping[str, Any]) -> None:
        changes.events.append(
            event("error", str(error["message"]), **{k: v for k, v in error.items() if k != "message"})
        )
        await self._write(changes, from_states=ACTIVE, state="failed", error=dict(error), finished_at=datetime.now(UTC))

    async def _gone(self) -> None:
        """No process lives, and its log is read to the end."""
        if self.job.state in ACTIVE:
            await self._died()
        if self.job.state in ENDED:
            await self._add_result_file()
        await self._change(handle=None, launcher=None, devices=None)
        if self.job.state in ENDED:
            await asyncio.to_thread(tidy, self._run_folder, succeeded=self.job.state == "succeeded")

    async def _died(self) -> None:
        """Without a last word: killed, by whomever. It goes on from its last checkpoint, if that leads anywhere."""
        assert self.job.handle is not None
        reason = await self._launcher.exit_reason(self._run_folder, self.job.handle)
        if self.job.wanted == "cancel":
            await self._change(from_states=ACTIVE, state="cancelled", finished_at=datetime.now(UTC))
            return
        steps = await asyncio.to_thread(self._run_folder.steps)
        newest = steps[-1] if steps else 0
        attempts = 0 if newest > self.job.attempt_step else self.job.attempts
        if attempts > int(self.job.spec["recipe"]["max_retries"]):
            message = f"{reason} That were {attempts} attempts without a new checkpoint; no more are made."
            await self._fail(Changes(), {"code": "trainer_died", "message": message, "param": None})
            return
        where = f"from step {newest}" if newest else "from the beginning"
        state = "validating" if self.job.state == "validating" else "queued"
        if self.job.state == "pausing" or self.job.wanted == "pause":
            state = "paused"
        await self._change(
            from_states=ACTIVE,
            state=state,
            wanted=None,
            attempts=attempts,
            attempt_step=newest,
            events=[event("warn", f"{reason} It goes on {where}.", step=newest)],
        )

    async def _add_result_file(self) -> None:
        """The curves as a file. A job that ended without a step has none."""
        if self.job.result_files:
            return
        path = self._run_folder.events
        text = await asyncio.to_thread(lambda: result_csv(read_events(path)))
        if text.count("\n") < 2:
            return
        async with self._around.files.staging() as folder:
            file = folder / "step_metrics.csv"
            await asyncio.to_thread(file.write_text, text, "utf-8")
            stored = await self._around.files.add(file, filename="step_metrics.csv", purpose="fine-tune-results")
        await self._change(result_files=[stored.id])

    async def _write(
        self,
        changes: Changes,
        *,
        from_states: Any = None,
        checkpoint: JobCheckpoint | None = None,
        **values: Any,
    ) -> None:
        if not changes.values and not changes.events and not values:
            return
        merged = changes.values | values
        changed = await self._around.store.change(
            self.job.id, states=from_states, events=changes.events, checkpoint=checkpoint, **merged
        )
        if changed is None:  # somebody else has changed the state meanwhile: the log goes on all the same
            kept = {name: value for name, value in merged.items() if name in ("log_offset", "resolved", "progress")}
            changed = await self._around.store.change(self.job.id, events=changes.events, **kept)
        if changed is not None:
            self._took(changed)

    async def _change(self, *, from_states: Any = None, events: Any = (), **values: Any) -> Job | None:
        changed = await self._around.store.change(self.job.id, states=from_states, events=events, **values)
        if changed is not None:
            self._took(changed)
        return changed

    def _took(self, changed: Job) -> None:
        self.job = changed
        self._around.changed(changed)
