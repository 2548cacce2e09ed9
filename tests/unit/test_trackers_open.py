"""Trackers are refused by name before anything starts, and fail without ending a run."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tuneloop.finetune.training.trackers import TRACKERS, check_trackers, open_trackers
from tuneloop.finetune.training.trackers.base import Options, Status, Tracker
from tuneloop.finetune.training.trackers.guarded import Guarded
from tuneloop.storage.errors import InvalidInput


class Failing(Tracker):
    """Raises at the call that its folder's name says."""

    def _fail_at(self, call: str) -> None:
        with (self.folder.parent / "calls").open("a") as calls:
            calls.write(f"{call}\n")
        if self.folder.name == call:
            raise ConnectionError("no route")

    def start(self, run_name: str, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        self._fail_at("start")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._fail_at("log")

    def finish(self, status: Status) -> None:
        self._fail_at("finish")


@pytest.mark.parametrize(
    ("call", "calls"),
    [
        ("start", ["start"]),
        ("log", ["start", "log"]),
        ("finish", ["start", "log", "log", "finish"]),
        ("never", ["start", "log", "log", "finish"]),
    ],
)
def test_a_tracker_that_fails_warns_once_and_is_left_alone(tmp_path: Path, call: str, calls: list[str]) -> None:
    warnings: list[str] = []
    tracker = Guarded(Failing(tmp_path / call, Options(), warnings.append), "A tracker")
    tracker.start("run", {}, {})
    tracker.log(1, {"train_loss": 1.0})
    tracker.log(2, {"train_loss": 1.0})
    tracker.finish("finished")
    assert (tmp_path / "calls").read_text().split() == calls
    assert (
        warnings
        == [
            "A tracker failed, so this run is not tracked there any more: ConnectionError: no route. "
            "Training goes on, and the run's own events have all metrics."
        ][: call != "never"]
    )


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(InvalidInput, match="There is no tracker 'neptune'") as refusal:
        check_trackers(["tensorboard", "neptune"])
    assert refusal.value.param == "report_to"
    assert "tensorboard, wandb, mlflow and swanlab" in refusal.value.message


@pytest.mark.parametrize(
    ("name", "package"),
    [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow-skinny"), ("swanlab", "swanlab")],
)
def test_a_missing_package_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InvalidInput, match=f"`pip install {package}`") as refusal:
        check_trackers([name], param="integrations")
    assert refusal.value.param == "integrations"
    with pytest.raises(InvalidInput):
        open_trackers([name], folder=tmp_path, run_name="run", config={}, options={}, warn=print)
    assert list(tmp_path.iterdir()) == []


def test_checking_imports_none_of_them() -> None:
    program = (
        "import sys\n"
        "from tuneloop.finetune.training.trackers import TRACKERS, check_trackers\n"
        "check_trackers(TRACKERS)\n"
        "print([name for name in ('torch', *TRACKERS) if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert TRACKERS == ("tensorboard", "wandb", "mlflow", "swanlab")
