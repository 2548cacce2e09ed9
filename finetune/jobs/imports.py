"""What an event of a trainer means for its job: columns to set and events to show, in OpenAI's words where it has them.

Pure: publishing results and starting processes is for `watch.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from ..events import Event
from .records import Job
from .store import event

_PROGRESS = ("step", "epoch", "train_loss", "valid_loss", "learning_rate", "tokens", "tokens_per_second", "eta_seconds")


@dataclass(kw_only=True)
class Changes:
    """Collected over several events of a log, written in one transaction."""

    values: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)

    def say(self, at: float, made: dict[str, Any]) -> None:
        self.events.append(made | {"created_at": datetime.fromtimestamp(at, UTC)})


def take(changes: Changes, job: Job, found: Event) -> None:
    """Add what one event changes. `log_offset` goes with it, so that no event counts twice."""
    changes.values["log_offset"] = found.end
    data = dict(found.data)
    match found.kind:
        case "prepared":
            changes.values["resolved"] = data
            changes.say(found.at, event("info", "Files validated, moving job to queued state.", **data))
        case "started":
            changes.values["attempt_step"] = int(data["step"])
            _progress(changes, job, {"step": data["step"], "total_steps": data["total_steps"]})
            text = "Fine-tuning job started." if not data["step"] else f"Training goes on after step {data['step']}."
            changes.say(found.at, event("info", text, **data))
        case "metrics":
            total = (changes.values.get("progress") or job.progress).get("total_steps")
            _progress(changes, job, {name: data[name] for name in _PROGRESS if name in data})
            changes.say(found.at, event("info", _step_text(data, total), kind="metrics", **data))
        case "message":
            changes.say(found.at, event(found.level, found.message, **data))
        case "result":
            changes.values["trained_tokens"] = int(data["trained_tokens"])
        case _:
            return


def _progress(changes: Changes, job: Job, news: Mapping[str, Any]) -> None:
    changes.values["progress"] = {**(changes.values.get("progress") or job.progress), **news}


def _step_text(data: Mapping[str, Any], total: int | None) -> str:
    losses = [f"{name.replace('_', ' ')}={data[key]:.4f}" for name, key in _SHOWN if data.get(key) is not None]
    of = f"/{total}" if total else ""
    return f"Step {data['step']}{of}: {', '.join(losses)}"


_SHOWN = (
    ("training_loss", "train_loss"),
    ("validation_loss", "valid_loss"),
    ("full_validation_loss", "full_valid_loss"),
)
