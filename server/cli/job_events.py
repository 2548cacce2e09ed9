"""Follows a job's event stream over HTTP, and shows it. A connection that breaks is made again."""

import time
from collections.abc import Mapping
from typing import Any

from .client import Client, Disconnected, path_of
from .train_display import TrainDisplay

_RECONNECT_SECONDS = 60.0  # a server that restarts is back by then; its trainers go on meanwhile
_PAUSE_SECONDS = 1.0


def follow(client: Client, job_id: str, display: TrainDisplay) -> None:
    """Show a job's events, from its first, until it ends. Raises CliError when the server stays away."""
    seen = 0
    deadline: float | None = None
    told = TotalSteps(client, job_id)
    while True:
        try:
            path = path_of("fine_tuning", "jobs", job_id, "events", "stream")
            for event in client.stream_events(path, params={"after_seq": seen}):
                deadline = None
                seen = event["seq"]
                show(event, display, told)
            return
        except Disconnected as error:
            now = time.monotonic()
            if deadline is None:
                deadline = now + _RECONNECT_SECONDS
                display.message(f"{error} Trying again; the job goes on.", "warn")
            if now > deadline:
                raise
            time.sleep(_PAUSE_SECONDS)


class TotalSteps:
    """A job's number of steps: asked for once training has begun, when nothing has told it before."""

    def __init__(self, client: Client, job_id: str) -> None:
        self._client = client
        self._job_id = job_id
        self._known: int | None = None

    def tell(self, data: Mapping[str, Any], display: TrainDisplay) -> None:
        if self._known is not None:
            return
        total = data.get("total_steps")
        if total is None and "step" in data:
            job = self._client.call("GET", path_of("fine_tuning", "jobs", self._job_id))
            total = (job.get("progress") or {}).get("total_steps")
        if total is not None:
            self._known = int(total)
            display.total(self._known)


def show(event: Mapping[str, Any], display: TrainDisplay, total: TotalSteps) -> None:
    display.raw(event)
    data = event.get("data") or {}
    if event["type"] == "metrics":
        total.tell(data, display)
        display.metrics(data)
    else:
        display.message(event["message"], event["level"])
