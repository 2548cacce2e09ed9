"""Jobs, events, checkpoints and permissions in the database: every query about them, and no decision.

A change of state names the states that it may start from, so that of two who change a job only one does.
"""

import secrets
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import delete, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from ...storage import Database, tables
from ...storage.errors import NotFound
from .base import State
from .records import Job, JobCheckpoint, JobEvent, Permission

_SCAN = 500


def new_id(prefix: str) -> str:
    return f"{prefix}{secrets.token_hex(12)}"


class JobStore:
    """Queries over one database. Raises Unavailable if it fails."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, values: Mapping[str, Any], message: str) -> Job:
        """A new job, with its first event."""
        now = datetime.now(UTC)
        row = tables.TuningJob(created_at=now, updated_at=now, resolved={}, progress={}, result_files=[], **values)
        async with self._database.transaction() as session:
            session.add(row)
            await session.flush()
            await _add_events(session, row.id, [_event("info", "message", message, {})])
        return _job(row)

    async def get(self, job_id: str) -> Job:
        """Raises NotFound."""
        async with self._database.transaction(read_only=True) as session:
            row = await session.get(tables.TuningJob, job_id)
        if row is None:
            raise NotFound(
                f"There is no fine-tuning job '{job_id}'. GET /v1/fine_tuning/jobs lists them.",
                param="fine_tuning_job_id",
            )
        return _job(row)

    async def in_states(self, states: Collection[State]) -> list[Job]:
        """The most urgent first, then the oldest."""
        table = tables.TuningJob
        query = select(table).where(table.state.in_(states)).order_by(table.priority.desc(), table.created_at, table.id)
        async with self._database.transaction(read_only=True) as session:
            return [_job(row) for row in (await session.scalars(query)).all()]

    async def known(self, job_ids: Collection[str]) -> set[str]:
        """Those of the ids that are jobs."""
        async with self._database.transaction(read_only=True) as session:
            found = [job_id for job_id in job_ids if await session.get(tables.TuningJob, job_id) is not None]
        return set(found)

    async def with_process(self) -> list[Job]:
        """Jobs for which a process was started whose end nobody has seen yet."""
        async with self._database.transaction(read_only=True) as session:
            rows = (await session.scalars(select(tables.TuningJob).where(tables.TuningJob.launcher.is_not(None)))).all()
            return [_job(row) for row in rows]

    async def page(
        self, *, after: str | None, limit: int, metadata: Mapping[str, str] | None
    ) -> tuple[list[Job], bool]:
        """Newest first, those behind `after`; with `metadata` only jobs that have all of it."""
        table = tables.TuningJob
        found: list[Job] = []
        async with self._database.transaction(read_only=True) as session:
            query = select(table).order_by(table.created_at.desc(), table.id.desc())
            if after is not None:
                last = await session.get(table, after)
                if last is None:
                    raise NotFound(f"There is no fine-tuning job '{after}' to go on behind.", param="after")
                query = query.where(
                    (table.created_at < last.created_at)
                    | ((table.created_at == last.created_at) & (table.id < last.id))
                )
            offset = 0
            while rows := (await session.scalars(query.offset(offset).limit(_SCAN))).all():
                offset += len(rows)
                for row in rows:
                    if metadata is None or metadata.items() <= row.job_metadata.items():
                        if len(found) == limit:
                            return found, True
                        found.append(_job(row))
        return found, False

    async def change(
        self,
        job_id: str,
        *,
        states: Collection[State] | None = None,
        expected: Mapping[str, Any] | None = None,
        events: Sequence[Mapping[str, Any]] = (),
        checkpoint: JobCheckpoint | None = None,
        **values: Any,
    ) -> Job | None:
        """Set columns and append events in one transaction.

        None, and nothing is changed, if the state is none of `states` or a column is not as `expected`.
        """
        table = tables.TuningJob
        query = update(table).where(table.id == job_id)
        if states is not None:
            query = query.where(table.state.in_(states))
        for name, value in (expected or {}).items():
            query = query.where(getattr(table, name).is_not_distinct_from(value))
        async with self._database.transaction() as session:
            result = await session.execute(query.values(updated_at=datetime.now(UTC), **values))
            if result.rowcount == 0:  # type: ignore[attr-defined]
                return None
            await _add_events(session, job_id, events)
            if checkpoint is not None:
                await _add_checkpoint(session, checkpoint)
            row = await session.get(table, job_id, populate_existing=True)
            return None if row is None else _job(row)

    async def events(self, job_id: str, *, after: str | None, limit: int) -> tuple[list[JobEvent], bool]:
        """Newest first, those older than the event `after`."""
        table = tables.TuningEvent
        async with self._database.transaction(read_only=True) as session:
            query = select(table).where(table.job == job_id).order_by(table.seq.desc())
            if after is not None:
                last = (await session.scalars(select(table).where(table.job == job_id, table.id == after))).first()
                if last is None:
                    raise NotFound(f"The job '{job_id}' has no event '{after}' to go on behind.", param="after")
                query = query.where(table.seq < last.seq)
            rows = (await session.scalars(query.limit(limit + 1))).all()
        return [_job_event(row) for row in rows[:limit]], len(rows) > limit

    async def events_behind(self, job_id: str, seq: int, *, limit: int = _SCAN) -> list[JobEvent]:
        """Oldest first."""
        table = tables.TuningEvent
        query = select(table).where(table.job == job_id, table.seq > seq).order_by(table.seq).limit(limit)
        async with self._database.transaction(read_only=True) as session:
            return [_job_event(row) for row in (await session.scalars(query)).all()]

    async def checkpoints(self, job_id: str, *, after: str | None, limit: int) -> tuple[list[JobCheckpoint], bool]:
        """Newest first."""
        table = tables.TuningCheckpoint
        async with self._database.transaction(read_only=True) as session:
            query = select(table).where(table.job == job_id).order_by(table.step.desc())
            if after is not None:
                last = await session.get(table, after)
                if last is None or last.job != job_id:
                    raise NotFound(f"The job '{job_id}' has no checkpoint '{after}' to go on behind.", param="after")
                query = query.where(table.step < last.step)
            rows = (await session.scalars(query.limit(limit + 1))).all()
        return [_checkpoint(row) for row in rows[:limit]], len(rows) > limit

    async def checkpoint_named(self, model: str) -> JobCheckpoint | None:
        """The checkpoint that is live under this name."""
        table = tables.TuningCheckpoint
        async with self._database.transaction(read_only=True) as session:
            row = (await session.scalars(select(table).where(table.model == model))).first()
        return None if row is None else _checkpoint(row)

    async def drop_checkpoint(self, model: str) -> None:
        """Forget a checkpoint that is served no more. Safe to repeat."""
        table = tables.TuningCheckpoint
        async with self._database.transaction() as session:
            await session.execute(delete(table).where(table.model == model))

    async def grant(self, checkpoint: str, projects: Sequence[str]) -> list[Permission]:
        """A permission for each project; one that has it keeps the one it has."""
        table = tables.CheckpointPermission
        async with self._database.transaction() as session:
            rows = (await session.scalars(select(table).where(table.checkpoint == checkpoint))).all()
            held = {row.project: row for row in rows}
            for project in projects:
                if project not in held:
                    held[project] = table(
                        id=new_id("cp_"), checkpoint=checkpoint, project=project, created_at=datetime.now(UTC)
                    )
                    session.add(held[project])
            return [_permission(held[project]) for project in projects]

    async def permissions(
        self,
        checkpoint: str,
        *,
        project: str | None = None,
        after: str | None = None,
        limit: int = 10,
        order: Literal["ascending", "descending"] = "descending",
    ) -> tuple[list[Permission], bool]:
        """By age; those of one project if it is given."""
        table = tables.CheckpointPermission
        query = select(table).where(table.checkpoint == checkpoint).order_by(table.created_at, table.id)
        if project is not None:
            query = query.where(table.project == project)
        async with self._database.transaction(read_only=True) as session:
            found = [_permission(row) for row in (await session.scalars(query)).all()]
        if order == "descending":
            found.reverse()
        if after is not None:
            place = next((i for i, permission in enumerate(found) if permission.id == after), None)
            if place is None:
                raise NotFound(f"The checkpoint '{checkpoint}' has no permission '{after}'.", param="after")
            found = found[place + 1 :]
        return found[:limit], len(found) > limit

    async def revoke(self, checkpoint: str, permission_id: str) -> None:
        """Raises NotFound."""
        async with self._database.transaction() as session:
            row = await session.get(tables.CheckpointPermission, permission_id)
            if row is None or row.checkpoint != checkpoint:
                raise NotFound(
                    f"The checkpoint '{checkpoint}' has no permission '{permission_id}'.", param="permission_id"
                )
            await session.delete(row)


def event(level: str, message: str, *, kind: str = "message", **data: Any) -> dict[str, Any]:
    """An event to append with `JobStore.change`."""
    return _event(level, kind, message, data)


def _event(level: str, kind: str, message: str, data: Mapping[str, Any]) -> dict[str, Any]:
    return {"level": level, "type": kind, "message": message, "data": dict(data)}


async def _add_events(session: AsyncSession, job_id: str, events: Sequence[Mapping[str, Any]]) -> None:
    if not events:
        return
    table = tables.TuningEvent
    query = select(table.seq).where(table.job == job_id).order_by(table.seq.desc()).limit(1)
    last = (await session.scalars(query)).first() or 0
    now = datetime.now(UTC)
    for number, values in enumerate(events, last + 1):
        created = values.get("created_at", now)
        rest = {name: value for name, value in values.items() if name != "created_at"}
        session.add(table(job=job_id, seq=number, id=new_id("ftevent-"), created_at=created, **rest))


async def _add_checkpoint(session: AsyncSession, checkpoint: JobCheckpoint) -> None:
    table = tables.TuningCheckpoint
    if (await session.scalars(select(table).where(table.model == checkpoint.model))).first() is None:
        session.add(
            table(
                id=checkpoint.id,
                job=checkpoint.job,
                step=checkpoint.step,
                model=checkpoint.model,
                created_at=checkpoint.created_at,
                metrics=dict(checkpoint.metrics),
            )
        )


def _job(row: tables.TuningJob) -> Job:
    values = {name: getattr(row, name) for name in Job.__dataclass_fields__ if name not in ("metadata",)}
    values["result_files"] = tuple(row.result_files)
    values["devices"] = None if row.devices is None else tuple(row.devices)
    return Job(metadata=row.job_metadata, **values)


def _job_event(row: tables.TuningEvent) -> JobEvent:
    return JobEvent(**{name: getattr(row, name) for name in JobEvent.__dataclass_fields__})


def _checkpoint(row: tables.TuningCheckpoint) -> JobCheckpoint:
    return JobCheckpoint(**{name: getattr(row, name) for name in JobCheckpoint.__dataclass_fields__})


def _permission(row: tables.CheckpointPermission) -> Permission:
    return Permission(**{name: getattr(row, name) for name in Permission.__dataclass_fields__})
