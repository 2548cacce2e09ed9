"""The real packages, offline: what is logged lies in the run's folder and nowhere else, also after a resume."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

# One attempt of a run: a process of its own, as a trainer is, with an empty home and no login.
PROGRAM = """
import json, signal, sys
from pathlib import Path
from tuneloop.finetune.training.trackers import open_trackers

name, folder, first = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
before = signal.getsignal(signal.SIGINT), sys.excepthook
warnings = []
(tracker,) = open_trackers(
    [name], folder=folder, run_name="a run", config={"learning_rate": 1e-4, "lora_target": ["all"], "suffix": None},
    options={name: {"project": "identity", "name": None, "tags": ["first", "second"]}}, warn=warnings.append,
    metadata={"base": "smollm2-135m"},
)
assert (signal.getsignal(signal.SIGINT), sys.excepthook)[0] is before[0]
if first > 1:
    tracker.log(first - 1, {})
for step in range(first, first + 3):
    tracker.log(step, {"train_loss": 10 / first + step, "learning_rate": 0.5})
tracker.finish("finished")
(folder / "warnings.json").write_text(json.dumps(warnings))
"""


class Attempts:
    def __init__(self, folder: Path) -> None:
        self.folder = folder / "run" / "trackers"
        self.home = folder / "home"
        self.home.mkdir()
        self.away = folder / "away"  # the working folder
        self.away.mkdir()

    def run(self, name: str, *, first: int = 1, **environment: str) -> list[str]:
        """Log steps `first` to `first + 2`; returns the warnings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = {"HOME": str(self.home), "TMPDIR": str(self.home), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, name, str(self.folder), str(first)],
            cwd=self.away,
            env={**path, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert [path for place in (self.home, self.away) for path in place.rglob("*") if path.is_file()] == []
        warnings: list[str] = json.loads((self.folder / "warnings.json").read_text())
        return warnings


@pytest.fixture
def attempts(tmp_path: Path) -> Attempts:
    return Attempts(tmp_path)


def test_tensorboard_gives_way_to_the_resumed_steps(attempts: Attempts) -> None:
    assert attempts.run("tensorboard") == attempts.run("tensorboard", first=3) == []
    scalars = _tensorboard(attempts.folder / "tensorboard")
    assert set(scalars) == {"train_loss", "learning_rate"}
    assert scalars["train_loss"] == {
        1: 11.0,
        2: 12.0,
        **{step: pytest.approx(10 / 3 + step, abs=1e-5) for step in (3, 4, 5)},
    }


def test_mlflow_goes_on_in_the_same_run(attempts: Attempts) -> None:
    assert attempts.run("mlflow") == attempts.run("mlflow", first=4) == []
    folder = attempts.folder / "mlflow"
    (run,) = _query(folder / "mlflow.db", "select run_uuid, name, status from runs")
    assert run[1:] == ["a run", "FINISHED"]
    assert _query(folder / "mlflow.db", "select step from metrics where key = 'train_loss' order by step") == [
        [step] for step in range(1, 7)
    ]
    assert dict(_query(folder / "mlflow.db", "select key, value from params")) == {
        "learning_rate": "0.0001",
        "lora_target": "['all']",
    }
    tags = dict(_query(folder / "mlflow.db", "select key, value from tags"))
    assert {"first", "second"} < set(tags)
    assert tags["base"] == "smollm2-135m"
    assert ["identity"] in _query(folder / "mlflow.db", "select name from experiments")


def test_wandb_without_a_login_is_written_for_sync(attempts: Attempts) -> None:
    assert attempts.run("wandb") == []
    (log,) = (attempts.folder / "wandb" / "wandb").glob("offline-run-*/run-*.wandb")
    content = log.read_bytes()
    assert all(text in content for text in (b"identity", b"a run", b"second", b"smollm2-135m", b"train_loss"))


def test_wandb_that_cannot_be_reached_is_written_for_sync(attempts: Attempts) -> None:
    (warning,) = attempts.run(
        "wandb", WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_INIT_TIMEOUT="3"
    )
    assert "could not be reached" in warning
    assert "wandb sync" in warning
    assert list((attempts.folder / "wandb" / "wandb").glob("offline-run-*/run-*.wandb"))


def test_wandb_offline_by_its_own_variable(attempts: Attempts) -> None:
    assert attempts.run("wandb", WANDB_API_KEY="0" * 40, WANDB_MODE="offline") == []
    assert list((attempts.folder / "wandb" / "wandb").glob("offline-run-*/run-*.wandb"))


def test_swanlab_without_a_login_is_written_for_sync(attempts: Attempts) -> None:
    assert attempts.run("swanlab") == []
    (log,) = (attempts.folder / "swanlab").glob("run-*/run-*.swanlab")
    assert b"train_loss" in log.read_bytes()
    assert "smollm2-135m" in (log.parent / "files" / "config.yaml").read_text()


def test_swanlab_that_cannot_be_reached_is_written_for_sync(attempts: Attempts) -> None:
    (warning,) = attempts.run("swanlab", SWANLAB_API_KEY="0" * 20, SWANLAB_API_HOST="http://127.0.0.1:9")
    assert "could not be reached" in warning
    assert list((attempts.folder / "swanlab").glob("run-*/run-*.swanlab"))


def _query(database: Path, sql: str) -> list[list[Any]]:
    import sqlite3

    connection = sqlite3.connect(database)
    try:
        return [list(row) for row in connection.execute(sql)]
    finally:
        connection.close()


def _tensorboard(folder: Path) -> Mapping[str, Mapping[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
