"""The answers of the fine-tuning endpoints: OpenAI's objects, and our further fields beside theirs.

What is ours: `base_model`, `paused`, `priority`, `progress`, `trackers` and `tuning` of a job, `seq` of an event.
Times are seconds since the epoch.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel

from ...finetune.jobs.base import State
from ...finetune.jobs.records import Job, JobCheckpoint, JobEvent, Permission
from . import resolved

ORGANIZATION = "org-tuneloop"  # OpenAI's clients want one; there are none here

Status = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
_STATUS: dict[State, Status] = {
    "validating": "validating_files",
    "queued": "queued",
    "running": "running",
    "pausing": "running",
    "paused": "queued",
    "publishing": "running",
    "succeeded": "succeeded",
    "failed": "failed",
    "cancelled": "cancelled",
}
_METRICS = (
    "train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy", "full_valid_loss",
    "full_valid_mean_token_accuracy",
)  # fmt: skip


class HyperparametersCard(BaseModel):
    """ "auto" until the data were validated. `n_epochs` is null where the passes are no whole number."""

    batch_size: int | Literal["auto"] | None
    learning_rate_multiplier: float | Literal["auto"] | None
    n_epochs: int | Literal["auto"] | None


class ErrorCard(BaseModel):
    """`line` is that of the data, where one is to blame."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class JobCard(BaseModel):
    """`model` is what the request named. `paused` tells a job that waits for a person from one that waits its turn."""

    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    id: str
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    status: Status
    error: ErrorCard | None
    model: str
    fine_tuned_model: str | None
    organization_id: str = ORGANIZATION
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    seed: int
    hyperparameters: HyperparametersCard
    method: dict[str, Any]
    metadata: dict[str, str] | None
    integrations: list[dict[str, Any]] | None
    base_model: str
    paused: bool
    priority: int
    progress: dict[str, Any] | None
    trackers: list[dict[str, Any]]
    tuning: dict[str, Any]


class EventCard(BaseModel):
    """`seq` counts a job's events from 1; a stream goes on behind the one it is given."""

    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    id: str
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]
    seq: int


class CheckpointCard(BaseModel):
    """`fine_tuned_model_checkpoint` can be used as a model name, while the job goes on too."""

    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    id: str
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, float]


class PermissionCard(BaseModel):
    object: Literal["checkpoint.permission"] = "checkpoint.permission"
    id: str
    created_at: int
    project_id: str


class PermissionDeleted(BaseModel):
    object: Literal["checkpoint.permission"] = "checkpoint.permission"
    id: str
    deleted: bool = True


class MetricsCard(BaseModel):
    """All points of a job's curves: for each measure two lists of the same length."""

    object: Literal["fine_tuning.job.metrics"] = "fine_tuning.job.metrics"
    fine_tuning_job_id: str
    series: dict[str, "SeriesCard"]


class SeriesCard(BaseModel):
    step: list[int]
    value: list[float | None]


Card = TypeVar("Card", JobCard, EventCard, CheckpointCard, PermissionCard)


class Page(BaseModel, Generic[Card]):
    """One page; the next one is asked for with `after` = the last id."""

    object: Literal["list"] = "list"
    data: list[Card]
    has_more: bool
    first_id: str | None
    last_id: str | None


def page(cards: Sequence[Card], has_more: bool) -> Page[Card]:
    first, last = (cards[0].id, cards[-1].id) if cards else (None, None)
    return Page(data=list(cards), has_more=has_more, first_id=first, last_id=last)


def job_card(job: Job) -> JobCard:
    hyperparameters = HyperparametersCard(**resolved.hyperparameters(job))
    trackers = resolved.trackers(job)
    wandb = [tracker for tracker in trackers if tracker["type"] == "wandb"]  # the SDK's type knows no other
    return JobCard(
        id=job.id,
        created_at=seconds(job.created_at),
        finished_at=None if job.finished_at is None else seconds(job.finished_at),
        estimated_finish=resolved.estimated_finish(job),
        status=_STATUS[job.state],
        error=ErrorCard.model_validate(job.error) if job.error else None,
        model=job.model,
        fine_tuned_model=job.fine_tuned_model,
        training_file=job.training_file,
        validation_file=job.validation_file,
        result_files=list(job.result_files),
        trained_tokens=job.trained_tokens,
        seed=resolved.seed(job),
        hyperparameters=hyperparameters,
        method={"type": job.method, job.method: {"hyperparameters": hyperparameters.model_dump()}},
        metadata=dict(job.metadata) or None,
        integrations=wandb or None,
        base_model=job.base,
        paused=job.state == "paused",
        priority=job.priority,
        progress=resolved.progress(job),
        trackers=trackers,
        tuning=resolved.tuning(job),
    )


def event_card(event: JobEvent) -> EventCard:
    return EventCard(
        id=event.id,
        created_at=seconds(event.created_at),
        level=event.level,
        message=event.message,
        type=event.type,
        data=resolved.finite(event.data),
        seq=event.seq,
    )


def checkpoint_card(checkpoint: JobCheckpoint) -> CheckpointCard:
    metrics = resolved.finite(checkpoint.metrics)
    known = {name: metrics[name] for name in _METRICS if metrics.get(name) is not None}
    return CheckpointCard(
        id=checkpoint.id,
        created_at=seconds(checkpoint.created_at),
        fine_tuned_model_checkpoint=checkpoint.model,
        fine_tuning_job_id=checkpoint.job,
        step_number=checkpoint.step,
        metrics={"step": checkpoint.step, **known},
    )


def permission_card(permission: Permission) -> PermissionCard:
    return PermissionCard(id=permission.id, created_at=seconds(permission.created_at), project_id=permission.project)


def seconds(moment: datetime) -> int:
    return int(moment.timestamp())
