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
