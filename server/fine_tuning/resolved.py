"""What a job's recipe and progress say in the terms of the wire: "auto" before the data are validated, numbers after.

It reads records of jobs only, and knows no request.
"""

import math
from collections.abc import Mapping
from typing import Any

from ...finetune.jobs.records import Job
from ...finetune.recipe.recipe import Recipe
from ...finetune.recipe.request import FORBIDDEN
from .wire import AUTO

_ALWAYS_SHOWN = frozenset({
    "stage", "finetuning_type", "learning_rate", "lr_scheduler_type", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "cutoff_len", "cutoff", "packing",
})  # fmt: skip
_OF_LORA = frozenset({"lora_rank", "lora_alpha", "lora_dropout", "lora_target", "use_dora", "use_rslora"})
DEFAULT_PROJECT = "tuneloop"  # the trackers' own default
_DEFAULTS = {name: field.get_default(call_default_factory=True) for name, field in Recipe.model_fields.items()}


def tuning(job: Job) -> dict[str, Any]:
    """The recipe's keys that matter: the central ones, and all that differ from their defaults.

    What a request may not set is not among them, so that a new job can be given what this one shows.
    """
    recipe = Recipe.model_validate(job.spec["recipe"]).model_dump(mode="json") | _chosen(job)
    open_keys = _open(job)
    always = _ALWAYS_SHOWN | _OF_LORA if recipe["finetuning_type"] == "lora" else _ALWAYS_SHOWN
    shown = {}
    for name, value in recipe.items():
        default = _DEFAULTS.get(name)
        differs = value != (list(default) if isinstance(default, tuple) else default)
        if name not in FORBIDDEN and (name in always or differs):
            shown[name] = AUTO if name in open_keys else value
    return shown


def hyperparameters(job: Job) -> dict[str, Any]:
    """OpenAI's three. A share of an epoch cannot be told as their whole number and is None."""
    recipe = dict(job.spec["recipe"]) | _chosen(job)
    epochs, open_keys = recipe["num_train_epochs"], _open(job)
    return {
        "batch_size": AUTO if "per_device_train_batch_size" in open_keys else _batch_size(job, recipe),
        "learning_rate_multiplier": _multiplier(job),
        "n_epochs": AUTO if "num_train_epochs" in open_keys else int(epochs) if epochs == int(epochs) else None,
    }


def seed(job: Job) -> int:
    return int(job.spec["recipe"]["seed"])


def trackers(job: Job) -> list[dict[str, Any]]:
    """The integrations as the request gave them, with the project that is taken where it names none."""
    return [
        {"type": asked["type"], asked["type"]: {"project": DEFAULT_PROJECT} | dict(asked.get(asked["type"]) or {})}
        for asked in job.request.get("integrations") or ()
    ]


def progress(job: Job) -> dict[str, Any] | None:
    """The newest step's measures, with the number of steps in all; None before there is any."""
    if not job.progress:
        return None
    total = job.resolved.get("total_steps")
    return finite({**({} if total is None else {"total_steps": total}), **job.progress})


def estimated_finish(job: Job) -> int | None:
    """By the trainer's own estimate, while it runs."""
    eta = job.progress.get("eta_seconds")
    if job.state not in ("running", "publishing") or eta is None or not math.isfinite(eta):
        return None
    return int(job.updated_at.timestamp() + eta)


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: such a measure (a loss that diverged) is null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }


def _batch_size(job: Job, recipe: Mapping[str, Any]) -> int:
    """What was asked for; else the examples of a step, which an `auto` may have cut into several batches."""
    asked = _asked(job).get("batch_size")
    if asked is not None and asked != AUTO:
        return int(asked)
    return int(recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"])


def _multiplier(job: Job) -> float | str | None:
    """What was asked for; of an `auto` 1 once the data were read; None where `tuning` gives the learning rate."""
    asked = _asked(job).get("learning_rate_multiplier")
    if asked is not None and asked != AUTO:
        return float(asked)
    if "learning_rate" not in job.spec["auto"]:
        return None
    return float(job.spec["learning_rate_multiplier"]) if job.resolved else AUTO


def _asked(job: Job) -> Mapping[str, Any]:
    method = job.request.get("method") or {}
    within: Mapping[str, Any] = (method.get(job.method) or {}).get("hyperparameters") or {}
    return within or job.request.get("hyperparameters") or {}


def _chosen(job: Job) -> dict[str, Any]:
    """Recipe keys that were `auto` and have become a number."""
    values = job.resolved.get("hyperparameters") or {}
    return {name: value for name, value in values.items() if name in _DEFAULTS}


def _open(job: Job) -> set[str]:
    """Recipe keys that are still `auto`."""
    return set() if job.resolved else set(job.spec["auto"])
