"""The tables and nothing else: no query lives here, and no caller's rules. `migrations/` holds the same in steps.

Column values are plain data; folders above turn them into their own types. All times are UTC-aware datetimes,
on SQLite (which has no such type) as well as on PostgreSQL.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, DateTime, Dialect, Double, ForeignKey, ForeignKeyConstraint, Index, MetaData
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator


class UtcDateTime(TypeDecorator[datetime]):
    """A moment: takes aware datetimes only, gives them back in UTC."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value!r} has no time zone; use datetime.now(UTC).")
        moment = value.astimezone(UTC)
        return moment.replace(tzinfo=None) if dialect.name == "sqlite" else moment

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Table(DeclarativeBase):
    """Base of all tables. Constraints get predictable names, so that later migrations can change them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 (SQLAlchemy reads it from the class)
        datetime: UtcDateTime(),
        dict[str, Any]: JSON(),
        dict[str, float]: JSON(),
        list[str]: JSON(none_as_null=True),
    }


class ApiKey(Table):
    """An API key; only the hash of its secret is kept, `prefix` is what people recognise it by."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    prefix: Mapped[str]
    hash: Mapped[str] = mapped_column(unique=True)  # hex SHA-256
    scopes: Mapped[list[str]]
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    rpm_limit: Mapped[int | None]  # requests per minute; None: no limit
    allowed_models: Mapped[list[str] | None]  # None: all


class BaseModel(Table):
    """A base model that the server knows by `name`; `path` is None until it was pulled."""

    __tablename__ = "base_models"

    name: Mapped[str] = mapped_column(primary_key=True)
    source: Mapped[str]
    path: Mapped[str | None]
    pinned: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[datetime]
    detail: Mapped[dict[str, Any]] = mapped_column(default=dict)


class AdapterBlob(Table):
    """A blob that is stored or about to be: written before the blob is, so that none is ever lost track of.

    `writer` is the server process that last began to store it, at `touched_at`.
    """

    __tablename__ = "adapter_blobs"

    digest: Mapped[str] = mapped_column(primary_key=True)
    writer: Mapped[str]
    touched_at: Mapped[datetime]


class Adapter(Table):
    """An adapter's name. `next_version` only grows: a deleted version's number is never given out again."""

    __tablename__ = "adapters"

    name: Mapped[str] = mapped_column(primary_key=True)
    base: Mapped[str] = mapped_column(index=True)
    pinned: Mapped[bool] = mapped_column(default=False)
    next_version: Mapped[int] = mapped_column(default=1)
    created_at: Mapped[datetime]


class AdapterVersion(Table):
    """One immutable version; several versions may share one blob."""

    __tablename__ = "adapter_versions"

    adapter: Mapped[str] = mapped_column(ForeignKey("adapters.name", ondelete="CASCADE"), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    digest: Mapped[str] = mapped_column(ForeignKey("adapter_blobs.digest", ondelete="RESTRICT"), index=True)
    rank: Mapped[int]
    alpha: Mapped[float] = mapped_column(Double)
    targets: Mapped[list[str]]
    use_dora: Mapped[bool]
    use_rslora: Mapped[bool]
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    origin: Mapped[str]
    source: Mapped[str | None]
    metrics: Mapped[dict[str, Any]] = mapped_column(default=dict)
    created_at: Mapped[datetime]


class AdapterAlias(Table):
    """Where an alias points: version numbers (as JSON's string keys) with their shares of the traffic."""

    __tablename__ = "adapter_aliases"

    adapter: Mapped[str] = mapped_column(ForeignKey("adapters.name", ondelete="CASCADE"), primary_key=True)
    alias: Mapped[str] = mapped_column(primary_key=True)
    weights: Mapped[dict[str, float]]
    updated_at: Mapped[datetime]


class AdapterAliasHistory(Table):
    """Where an alias pointed before: a stack, newest on top (`id`), that rollback takes from."""

    __tablename__ = "adapter_alias_history"
    __table_args__ = (
        ForeignKeyConstraint(
            ["adapter", "alias"], ["adapter_aliases.adapter", "adapter_aliases.alias"], ondelete="CASCADE"
        ),
        Index("ix_adapter_alias_history_alias", "adapter", "alias"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    adapter: Mapped[str]
    alias: Mapped[str]
    weights: Mapped[dict[str, float]]
    updated_at: Mapped[datetime]  # when the alias began to point there


class File(Table):
    """A file of /v1/files. Its bytes are the object `blob`, which is stored before the row is written."""

    __tablename__ = "files"

    id: Mapped[str] = mapped_column(primary_key=True)  # file-...
    filename: Mapped[str]
    purpose: Mapped[str] = mapped_column(index=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    digest: Mapped[str]  # "sha256:..." of the bytes
    blob: Mapped[str]  # key in the object store
    created_at: Mapped[datetime] = mapped_column(index=True)
    expires_at: Mapped[datetime | None]


class TuningJob(Table):
    """A fine-tuning job. `request` is what was asked for, `spec` what the trainer gets; neither ever changes.

    `state` is one of finetune/jobs/base.py's. `wanted` is what a person last asked of it (`pause`, `cancel`).
    `log_offset` says how many bytes of the trainer's event log are in `tuning_events`; both change in one transaction.
    `handle` is the launcher's, by which a restarted server finds the trainer again.
    """

    __tablename__ = "tuning_jobs"

    id: Mapped[str] = mapped_column(primary_key=True)  # ftjob-...
    created_at: Mapped[datetime] = mapped_column(index=True)
    updated_at: Mapped[datetime]
    state: Mapped[str] = mapped_column(index=True)
    wanted: Mapped[str | None]
    priority: Mapped[int] = mapped_column(default=0)
    model: Mapped[str]  # as the request names it: a base model, or an adapter to go on from
    base: Mapped[str]
    method: Mapped[str]
    request: Mapped[dict[str, Any]]
    spec: Mapped[dict[str, Any]]
    resolved: Mapped[dict[str, Any]] = mapped_column(default=dict)  # what `auto` became, row and token counts
    progress: Mapped[dict[str, Any]] = mapped_column(default=dict)  # the newest step's metrics, tokens/s, ETA
    job_metadata: Mapped[dict[str, Any]] = mapped_column(default=dict)
    training_file: Mapped[str]
    validation_file: Mapped[str | None]
    output_name: Mapped[str]  # ft:<base>:<suffix>:<id>: the name of the result
    fine_tuned_model: Mapped[str | None]
    result_files: Mapped[list[str]]
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    attempts: Mapped[int] = mapped_column(default=0)
    attempt_step: Mapped[int] = mapped_column(default=0)  # the last checkpoint's step when the running attempt began
    devices: Mapped[list[str] | None]
    launcher: Mapped[str | None]
    handle: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    log_offset: Mapped[int] = mapped_column(BigInteger, default=0)
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class TuningEvent(Table):
    """One event of a job, in the order of `seq`; `type` is OpenAI's (`message`, `metrics`)."""

    __tablename__ = "tuning_events"

    job: Mapped[str] = mapped_column(ForeignKey("tuning_jobs.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    id: Mapped[str] = mapped_column(unique=True)  # ftevent-...
    created_at: Mapped[datetime]
    level: Mapped[str]
    type: Mapped[str]
    message: Mapped[str]
    data: Mapped[dict[str, Any]] = mapped_column(default=dict)


class TuningCheckpoint(Table):
    """A checkpoint that can be served by its `model` name (`...:ckpt-step-N`)."""

    __tablename__ = "tuning_checkpoints"

    id: Mapped[str] = mapped_column(primary_key=True)  # ftckpt_...
    job: Mapped[str] = mapped_column(ForeignKey("tuning_jobs.id", ondelete="CASCADE"), index=True)
    step: Mapped[int]
    model: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[datetime]
    metrics: Mapped[dict[str, Any]] = mapped_column(default=dict)


class CheckpointPermission(Table):
    """A project that may use a checkpoint; kept for OpenAI's own calls."""

    __tablename__ = "checkpoint_permissions"

    id: Mapped[str] = mapped_column(primary_key=True)  # cp_...
    checkpoint: Mapped[str] = mapped_column(index=True)  # the checkpoint's model name
    project: Mapped[str]
    created_at: Mapped[datetime]
