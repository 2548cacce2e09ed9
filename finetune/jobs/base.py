"""What a job is, and what jobs need of the server around them. It knows no HTTP, no process and no query.

States, and OpenAI's word for each:

    validating  validating_files   `prepare` runs: the data are read, checked and tokenised
    queued      queued             waits for a device
    running     running            a trainer works on it
    pausing     running            asked to pause; the trainer saves and ends
    paused      queued             waits for a person (`paused: true` on the wire: the SDK knows no such status)
    publishing  running            the trainer is done, its result is being made live
    succeeded, failed, cancelled   the end
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from ...adapters.base import AdapterVersion

State = Literal[
    "validating", "queued", "running", "pausing", "paused", "publishing", "succeeded", "failed", "cancelled"
]  # fmt: skip
ENDED: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})
ACTIVE: frozenset[str] = frozenset({"validating", "running", "pausing", "publishing"})  # a process works for it


class Publisher(Protocol):
    """Makes results live. The server implements it over its adapter and model services."""

    async def publish_adapter(
        self,
        folder: Path,
        *,
        name: str,
        base: str,
        source: str,
        metrics: Mapping[str, Any],
        metadata: Mapping[str, Any],
    ) -> AdapterVersion:
        """Publish a PEFT folder as the version of a new adapter `name` (the same content again gives the version that
        exists) and return when a request for it would be answered at once. Raises TuneloopError."""
        ...

    async def publish_model(self, folder: Path, *, name: str, metadata: Mapping[str, Any]) -> None:
        """Make a checkpoint folder, which stays where it is, a base model `name`. Raises TuneloopError."""
        ...

    async def withdraw_model(self, name: str) -> None:
        """Forget a base model whose folder is gone. Safe to repeat. Raises TuneloopError."""
        ...
