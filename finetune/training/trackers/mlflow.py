"""A run for MLflow, in a SQLite file of the run's folder; `mlflow ui --backend-store-uri sqlite:///...` shows it.

A tracking server named by MLFLOW_TRACKING_URI is used instead. MLflow's client is used directly: the module-level
API keeps an active run for the whole process.
"""

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .base import Status, Tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient

_STATES: Mapping[Status, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_LONGEST_VALUE = 6000  # characters of a parameter's value that MLflow's store takes


class MLflow(Tracker):
    _client: "MlflowClient"
    _run: str

    def start(self, run_name: str, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # to MLflow's makers; read when mlflow is imported
        from mlflow import MlflowClient

        self.folder.mkdir(parents=True, exist_ok=True)
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.folder / 'mlflow.db'}")
        known = self.folder / "run_id"
        if known.exists():
            self._run = known.read_text("utf-8")
            self._client.update_run(self._run, status="RUNNING")
            return
        tags = {"mlflow.runName": run_name, **dict.fromkeys(self.options.tags, "")}
        if self.options.entity is not None:
            tags["mlflow.user"] = self.options.entity
        self._run = self._client.create_run(self._experiment(), tags=tags).info.run_id
        self._describe(config, metadata)
        known.write_text(self._run, "utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        if metrics:
            now = int(time.time() * 1000)
            self._client.log_batch(self._run, [Metric(name, value, now, step) for name, value in metrics.items()])

    def finish(self, status: Status) -> None:
        self._client.set_terminated(self._run, _STATES[status])

    def _experiment(self) -> str:
        name = self.options.project or "tuneloop"
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        return str(self._client.create_experiment(name, artifact_location=(self.folder / "artifacts").as_uri()))

    def _describe(self, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        from mlflow.entities import Param, RunTag

        values = {name: str(value) for name, value in config.items() if value is not None and value != ""}
        self._client.log_batch(
            self._run,
            params=[Param(name, value[:_LONGEST_VALUE]) for name, value in values.items()],
            tags=[RunTag(name, str(value)[:_LONGEST_VALUE]) for name, value in metadata.items()],
        )
