"""A tracker whose errors end the tracking and never the run. It knows no particular tracker."""

from collections.abc import Callable, Mapping
from typing import Any

from .base import Status, Tracker


class Guarded(Tracker):
    """Passes every call on until one fails; then says so once and does nothing more."""

    def __init__(self, tracker: Tracker, title: str) -> None:
        super().__init__(tracker.folder, tracker.options, tracker.warn)
        self._tracker = tracker
        self._title = title
        self._working = True

    def start(self, run_name: str, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        self._try(lambda: self._tracker.start(run_name, config, metadata))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._try(lambda: self._tracker.log(step, metrics))

    def finish(self, status: Status) -> None:
        self._try(lambda: self._tracker.finish(status))

    def _try(self, call: Callable[[], None]) -> None:
        if not self._working:
            return
        try:
            call()
        except Exception as error:  # noqa: BLE001  (three foreign packages may raise anything)
            self._working = False
            self.warn(
                f"{self._title} failed, so this run is not tracked there any more: {type(error).__name__}: {error}. "
                "Training goes on, and the run's own events have all metrics."
            )
