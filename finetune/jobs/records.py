"""Jobs as values: what the database holds of them, without the database."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from ...adapters.base import AdapterVersion
from ...storage.files import StoredFile
from ..recipe.recipe import Recipe
from .base import State


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """What a job is made of, checked as far as that goes without reading the data."""

    model: str  # as it was asked for: a base model, or an adapter to go on from
    base: str
    method: str
    request: Mapping[str, Any]
    recipe: Recipe
    auto: tuple[str, ...] = ()
    learning_rate_multiplier: float = 1.0
    training_file: StoredFile
    validation_file: StoredFile | None = None
    adapter: AdapterVersion | None = None
    suffix: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    integrations: Sequence[Mapping[str, Any]] = ()
    priority: int = 0


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job as it is now; `storage/tables.py` says what the fields mean."""

    id: str
    created_at: datetime
    updated_at: datetime
    state: State
    wanted: str | None
    priority: int
    model: str
    base: str
    method: str
    request: Mapping[str, Any]
    spec: Mapping[str, Any]
    resolved: Mapping[str, Any]
    progress: Mapping[str, Any]
    metadata: Mapping[str, str]
    training_file: str
    validation_file: str | None
    output_name: str
    fine_tuned_model: str | None
    result_files: tuple[str, ...]
    trained_tokens: int | None
    error: Mapping[str, Any] | None
    attempts: int
    attempt_step: int
    devices: tuple[str, ...] | None
    launcher: str | None
    handle: Mapping[str, Any] | None
    log_offset: int
    started_at: datetime | None
    finished_at: datetime | None


@dataclass(frozen=True, kw_only=True)
class JobEvent:
    """`seq` counts a job's events from 1; `type` is `message` or `metrics`."""

    seq: int
    id: str
    created_at: datetime
    level: Literal["info", "warn", "error"]
    type: Literal["message", "metrics"]
    message: str
    data: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class JobCheckpoint:
    """A checkpoint that is live under the name `model`."""

    id: str
    job: str
    step: int
    model: str
    created_at: datetime
    metrics: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Permission:
    id: str
    checkpoint: str
    project: str
    created_at: datetime
