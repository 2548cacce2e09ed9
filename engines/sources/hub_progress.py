"""A progress bar for huggingface_hub that draws nothing and reports bytes to a callback instead."""

import io
import threading
from typing import Any

from .base import FetchProgress, ProgressCallback


def reporting_bar(progress: ProgressCallback, message: str) -> Any:
    """A tqdm class. The hub opens several byte bars for one transfer (network, disk); the furthest one counts."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    furthest = 0
    lock = threading.Lock()

    class ReportingBar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            kwargs.update(file=io.StringIO(), disable=False)
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal furthest
            drawn: bool | None = super().update(n)
            with lock:
                if self.unit == "B" and self.n > furthest:
                    furthest = int(self.n)
                    total = int(self.total) if self.total else None
                    progress(FetchProgress(message=message, done_bytes=furthest, total_bytes=total))
            return drawn

    return ReportingBar
