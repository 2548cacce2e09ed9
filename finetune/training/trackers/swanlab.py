"""A run for SwanLab: sent where the user has logged in, else written for `swanlab sync`.

SWANLAB_API_KEY (or `swanlab login`), SWANLAB_MODE and SwanLab's other variables are swanlab's own to read.
"""

import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .base import Status, Tracker

if TYPE_CHECKING:
    import swanlab

_STATES: Mapping[Status, str] = {"finished": "success", "stopped": "aborted", "failed": "crashed"}


class SwanLab(Tracker):
    _run: "swanlab.Run"

    def start(self, run_name: str, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        import swanlab

        self.folder.mkdir(parents=True, exist_ok=True)
        values = {**config, "metadata": dict(metadata)} if metadata else dict(config)
        configured = swanlab.Settings()
        if configured.mode != "online" or configured.api_key is None:
            self._init(run_name, values, "offline" if configured.mode == "online" else configured.mode)
            return
        try:
            self._init(run_name, values, "online")
        except Exception as error:  # noqa: BLE001  (its errors have no common base)
            self.warn(
                f"SwanLab could not be reached ({error}), so the run is written to {self.folder} instead. "
                f"`swanlab sync {self.folder}/run-*` sends it later."
            )
            self._init(run_name, values, "offline")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if metrics:
            self._run.log(dict(metrics), step=step)

    def finish(self, status: Status) -> None:
        self._run.finish(state=_STATES[status])

    def _init(self, run_name: str, config: Mapping[str, Any], mode: Any) -> None:
        import swanlab

        settings = swanlab.Settings(
            interactive=False,
            terminal=swanlab.Settings.Terminal(proxy_type="none"),
            # what is on the machine beside the run is nobody's business
            probe=swanlab.Settings.Probe(requirements=False, git=False, runtime=False),
        )
        with _own_hooks():
            self._run = swanlab.init(
                project=self.options.project or "tuneloop",
                workspace=self.options.entity,
                name=run_name,
                tags=list(self.options.tags) or None,
                config=dict(config),
                log_dir=str(self.folder),
                mode=mode,
                settings=settings,
            )


@contextmanager
def _own_hooks() -> Iterator[None]:
    """SwanLab takes SIGINT and the hook for uncaught exceptions, which are the trainer's."""
    interrupt, uncaught = signal.getsignal(signal.SIGINT), sys.excepthook
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, interrupt)
        sys.excepthook = uncaught
