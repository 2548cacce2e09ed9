"""`tuneloop train` on this machine, with a scripted trainer: what is shown, exit statuses, Ctrl-C, folders, retries."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tuneloop.finetune.run_folder import RunFolder, RunSpec
from tuneloop.server.cli import main

Script = dict[str, list[list[Any]]]
CHILD = Path(__file__).parent / "scripted_trainer_child.py"
PREPARED = {
    "kind": "prepared",
    "rows": 50,
    "tokens": 1234,
    "total_steps": 3,
    "hyperparameters": {"learning_rate": 2e-4},
}
STARTED = {
    "kind": "started", "message": "Training starts.", "step": 0, "total_steps": 3, "parameters": 1000,
    "trainable_parameters": 10, "dtype": "float32", "devices": ["cpu"],
}  # fmt: skip
METRICS = {
    "kind": "metrics", "step": 3, "epoch": 1.0, "train_loss": 1.25, "learning_rate": 1e-4, "tokens_per_second": 1234.0,
    "eta_seconds": 61.0,
}  # fmt: skip
RESULT = {"kind": "result", "message": "The result is saved after step 3."}
FINISHED = {"kind": "finished", "message": "The run is complete."}
WELL: Script = {"prepare": [[PREPARED]], "train": [[STARTED, METRICS, RESULT, FINISHED]]}


class Trainer:
    """A home, a model, a recipe, and the command to try."""

    def __init__(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.home, self.model, self.out = tmp_path / "home", tmp_path / "model", tmp_path / "out"
        self.script = tmp_path / "script.json"
        self.run_folder = RunFolder(self.out / "run")
        self._capfd = capfd
        self.model.mkdir()
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            (self.model / name).write_text("{}")
        (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
        self.recipe = tmp_path / "recipe.yaml"
        self.recipe.write_text(
            f"model_name_or_path: {self.model}\ndataset: {tmp_path}/rows.jsonl\noutput_dir: {self.out}\nlora_rank: 4\n"
        )

    def plays(self, script: Script) -> None:
        self.script.write_text(json.dumps(script))

    def run(self, *words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_info:
            main(["train", str(self.recipe), *words, "--home", str(self.home)])
        out, err = self._capfd.readouterr()
        return int(exit_info.value.code or 0), out, err

    def interrupt_when(self, reached: Callable[[], bool]) -> threading.Thread:
        def wait() -> None:
            deadline = time.monotonic() + 20
            while not reached() and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(0.4)  # two signals in one moment would be one wish
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=wait)
        thread.start()
        return thread


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Trainer:
    made = Trainer(tmp_path, capfd)
    start = subprocess.Popen

    def scripted(command: list[str], *arguments: Any, **options: Any) -> Any:
        assert command[1:3] == ["-m", "tuneloop.finetune"]
        return start([sys.executable, str(CHILD), *command[3:], str(made.script)], *arguments, **options)

    monkeypatch.setattr("tuneloop.finetune.launchers.local.subprocess.Popen", scripted)
    monkeypatch.delenv("TUNELOOP_URL", raising=False)
    made.plays(WELL)
    return made


def test_a_run_is_shown_to_its_end(trainer: Trainer) -> None:
    status, out, err = trainer.run("seed=7")
    assert status == 0
    assert out == f"{trainer.out}\n"  # alone on stdout, for scripts
    assert err.splitlines() == [
        "Reading and checking the data ...",
        "Data: 50 rows, 1,234 tokens, 3 steps. Chosen by the data: learning_rate 0.0002.",
        "Training starts. 10 of 1,000 parameters, float32 on cpu.",
        "step 3/3  epoch 1.00  loss 1.2500  lr 1.00e-04  1,234 tokens/s  0:01:01 left",
        "The result is saved after step 3.",
        "The run is complete.",
        f"The result is in {trainer.out}. Serve it with: tuneloop adapters add NAME {trainer.out} --base model",
    ]
    spec = trainer.run_folder.spec()
    assert (spec.recipe.seed, spec.recipe.lora_rank, spec.base_name) == (7, 4, "model")
    assert (spec.model_path, spec.result, spec.home) == (trainer.model, trainer.out, trainer.home)


def test_paths_of_the_spec_are_absolute(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trainer.recipe.parent)
    assert trainer.run("dataset=rows.jsonl,identity", "dataset_dir=data", "logging_dir=tb", "output_dir=out")[0] == 0
    recipe = trainer.run_folder.spec().recipe
    here = trainer.recipe.parent
    assert recipe.dataset == (str(here / "rows.jsonl"), "identity")
    assert (recipe.dataset_dir, recipe.logging_dir, recipe.output_dir) == (f"{here}/data", f"{here}/tb", f"{here}/out")


def test_json_prints_the_events_and_nothing_else(trainer: Trainer) -> None:
    status, out, _ = trainer.run("--json")
    events = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [event["kind"] for event in events] == ["prepared", "started", "metrics", "result", "finished"]
    assert events[2]["data"]["train_loss"] == 1.25
    assert set(events[0]) == {"at", "kind", "level", "message", "data"}


def test_a_failure_is_told_in_one_line(trainer: Trainer) -> None:
    failed = {
        "kind": "failed",
        "message": "Line 3 of rows.jsonl is no JSON.",
        "level": "error",
        "code": "invalid_value",
    }
    trainer.plays({"prepare": [[failed]], "train": []})
    status, out, err = trainer.run()
    assert (status, out) == (1, "")
    assert err.splitlines()[-1] == "Error: Line 3 of rows.jsonl is no JSON."
    trainer.plays(WELL)  # nothing was trained, so nothing is lost by beginning anew
    assert trainer.run()[0] == 0


def test_a_trainer_that_dies_is_started_again(trainer: Trainer) -> None:
    dies = [STARTED, ["checkpoint", 2], ["kill"]]
    trainer.plays({"prepare": [[PREPARED]], "train": [dies, [STARTED, METRICS, FINISHED]]})
    status, _, err = trainer.run()
    assert status == 0
    assert "It is started again from its checkpoint at step 2." in err


def test_it_is_started_again_so_often_and_no_more(trainer: Trainer) -> None:
    trainer.plays({"prepare": [[PREPARED]], "train": [[STARTED, ["kill"]]]})
    status, _, err = trainer.run("max_retries=1")
    assert status == 1
    assert err.count("It is started again from the beginning.") == 1
    assert "Error: The trainer was killed (SIGKILL)" in err.splitlines()[-1]
    assert f"All that it printed is in {trainer.run_folder.log}." in err


def test_ctrl_c_saves_and_stops_and_the_run_goes_on(trainer: Trainer) -> None:
    trainer.plays({"prepare": [[PREPARED]], "train": [[STARTED, ["serve"]], [STARTED, METRICS, FINISHED]]})
    thread = trainer.interrupt_when(lambda: (trainer.run_folder.path / "train.attempt.0").exists())
    status, out, err = trainer.run()
    thread.join()
    assert (status, out) == (130, "")
    assert "Saving a checkpoint; press Ctrl-C again to end at once." in err
    assert "Stopped. The last checkpoint is of step 7. Go on with: tuneloop train --home" in err
    assert err.splitlines()[-1].endswith(f"{trainer.recipe} resume_from_checkpoint=true")

    status, _, err = trainer.run()
    assert status == 1
    assert "holds a run with a checkpoint of step 7. Add resume_from_checkpoint=true" in err
    status, _, err = trainer.run("resume_from_checkpoint=true", "lora_rank=16")
    assert status == 1
    assert "which has lora_rank 4 (now 16)" in err
    status, _, err = trainer.run("resume_from_checkpoint=true")
    assert status == 0, err
    assert "Reading and checking" not in err  # that was done
    assert "Data:" not in err


def test_ctrl_c_twice_ends_at_once(trainer: Trainer) -> None:
    trainer.plays({"prepare": [[PREPARED]], "train": [[STARTED, ["sleep", 60]]]})
    begin = time.monotonic()
    attempt = trainer.run_folder.path / "train.attempt.0"
    first = trainer.interrupt_when(attempt.exists)
    second = trainer.interrupt_when(lambda: trainer.run_folder.wanted() is not None)
    status, _, err = trainer.run()
    first.join()
    second.join()
    assert status == 130
    assert "No checkpoint was saved." in err
    assert time.monotonic() - begin < 30


def test_ctrl_c_while_data_are_read_ends_that(trainer: Trainer) -> None:
    trainer.plays({"prepare": [[["sleep", 60]]], "train": []})
    thread = trainer.interrupt_when(lambda: (trainer.run_folder.path / "prepare.attempt.0").exists())
    assert trainer.run()[0] == 130
    thread.join()
    assert not trainer.run_folder.alive()


def test_folders_that_hold_something_are_not_overwritten_unasked(trainer: Trainer) -> None:
    assert trainer.run()[0] == 0
    (trainer.out / "adapter_config.json").write_text("{}")
    (trainer.out / "notes.txt").write_text("mine")
    trainer.run_folder.result.mkdir()
    (trainer.run_folder.result / "adapter_config.json").write_text("{}")
    assert "holds a result already" in trainer.run()[2]
    assert "is complete, so it cannot go on" in trainer.run("resume_from_checkpoint=true")[2]
    status, _, err = trainer.run("overwrite_output_dir=true")
    assert status == 0, err
    assert not (trainer.out / "adapter_config.json").exists()
    assert (trainer.out / "notes.txt").read_text() == "mine"


def test_a_folder_where_a_process_trains_is_refused(trainer: Trainer) -> None:
    trainer.run()
    lock = trainer.run_folder.take_lock()
    try:
        assert "A process trains in" in trainer.run("overwrite_output_dir=true")[2]
    finally:
        os.close(lock)


def test_a_run_goes_on_from_a_named_checkpoint(trainer: Trainer) -> None:
    stops = [STARTED, ["checkpoint", 2], ["checkpoint", 4], {"kind": "stopped", "reason": "pause", "step": 4}]
    trainer.plays({"prepare": [[PREPARED]], "train": [stops, [STARTED, METRICS, FINISHED]]})
    assert trainer.run()[0] == 130
    assert "There is no checkpoint step-3" in trainer.run("resume_from_checkpoint=step-3")[2]
    assert trainer.run_folder.steps() == [2, 4]
    assert trainer.run("resume_from_checkpoint=step-2")[0] == 0
    assert trainer.run_folder.steps() == [2]
    assert (trainer.run_folder.checkpoints / "set-aside-4").is_dir()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dataset="], "The recipe names no data."),
        (["output_dir="], "The recipe does not say where the result goes; set output_dir."),
        (["lora_rnk=3"], "Did you mean lora_rank?"),
        (["early_stopping_steps=3"], "early_stopping_steps needs validation data"),
        (["model_name_or_path=/no/such"], "The model folder /no/such does not exist"),
        (["adapter_name_or_path=nobody"], "nobody"),
        (["resume_from_checkpoint=true"], "does not exist, so it cannot go on"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_starts(
    trainer: Trainer, words: list[str], message: str
) -> None:
    status, out, err = trainer.run(*words)
    assert (status, out) == (1, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not trainer.run_folder.path.exists()


def test_dry_run_prints_the_recipe_and_does_nothing(trainer: Trainer) -> None:
    status, out, err = trainer.run("learning_rate=auto", "template=qwen", "--dry-run")
    assert status == 0
    recipe = yaml.safe_load(out)
    assert (recipe["lora_rank"], recipe["learning_rate"], recipe["cutoff"]) == (4, "auto", "refuse")
    assert err == (
        "Note: template on the command line has no effect: the checkpoint's own chat template is used, the same that "
        "serves.\n"
    )
    assert not trainer.out.exists()


def test_a_spec_is_complete(trainer: Trainer) -> None:
    trainer.run("threads=2", "--device", "cpu", "learning_rate=auto")
    spec = RunSpec.model_validate_json((trainer.run_folder.path / "spec.json").read_text())
    assert (spec.threads, spec.device, spec.auto) == (2, "cpu", ("learning_rate",))
    assert spec.cache == trainer.home / "cache" / "tokens"
