"""`tuneloop train --url` and `tuneloop jobs` against a real server on a socket, whose trainers are scripts."""

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from safetensors.numpy import save_file
from structlog.testing import capture_logs
from tuneloop.engines.base import Engine
from tuneloop.engines.fake import FakeEngine
from tuneloop.engines.fake_checkpoint import write_fake_checkpoint
from tuneloop.engines.tokenizer import ChatTokenizer
from tuneloop.finetune.launchers import Handle
from tuneloop.finetune.recipe.read import read_recipe
from tuneloop.finetune.run_folder import Phase, RunFolder
from tuneloop.server.app import create_app
from tuneloop.server.cli import main
from tuneloop.server.cli.train_remote import tuning_of
from tuneloop.server.settings import Settings

from ..support.scripted_trainer import Process, ScriptedLauncher

MakeAdapter = Callable[..., Path]
ROWS = [
    {"instruction": "Who are you?", "input": "", "output": "Tuna."},
    {"instruction": "Who made you?", "input": "", "output": "We did."},
    {"instruction": "Hi", "input": "", "output": "Hello."},
]


@dataclass
class PlayingLauncher(ScriptedLauncher):
    """Its trainers do what `play` says as soon as they are started."""

    play: Callable[[Process], None] = lambda _: None

    async def start(self, run: RunFolder, phase: Phase, *, processes: int = 1, threads: int | None = None) -> Handle:
        handle = await super().start(run, phase, processes=processes, threads=threads)
        if phase == "train":
            self.play(self.processes[-1])
        return handle


class Shell:
    """Runs commands against the server and looks at what they print."""

    def __init__(self, url: str, launcher: PlayingLauncher, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self.url = url
        self.launcher = launcher
        self.recipe = folder / "recipe.yaml"
        self._home = folder / "own"
        self._capsys = capsys

    def run(self, *arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_info:
            main([*arguments, "--url", self.url])
        captured = self._capsys.readouterr()
        return int(exit_info.value.code or 0), captured.out, captured.err

    def train(self, *words: str) -> tuple[int, str, str]:
        return self.run("train", str(self.recipe), *words, "--home", str(self._home))

    def ok(self, *arguments: str) -> str:
        status, out, err = self.run(*arguments)
        assert status == 0, err
        return out

    def jobs(self) -> list[dict[str, Any]]:
        jobs: list[dict[str, Any]] = json.loads(self.ok("jobs", "list", "--json"))
        return jobs


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.delenv("TUNELOOP_API_KEY", raising=False)
    checkpoint = write_fake_checkpoint(tmp_path / "checkpoint")
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"weight": np.zeros(1, np.float32)}, checkpoint / "model.safetensors")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    (tmp_path / "recipe.yaml").write_text(f"model_name_or_path: tiny\ndataset: {tmp_path}/rows.json\nlora_rank: 4\n")

    def build(name: str, path: Path, tokenizer: ChatTokenizer) -> Engine:
        return FakeEngine(tokenizer)

    launcher = PlayingLauncher()
    settings = Settings(home=tmp_path / "home", models=(f"tiny={checkpoint}",))
    app = create_app(settings, engine_factory=build, launcher=launcher)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
    listener = server.config.bind_socket()
    listener.listen()
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    with capture_logs():
        thread.start()
        yield Shell(f"http://127.0.0.1:{listener.getsockname()[1]}", launcher, capsys, tmp_path)
        server.should_exit = True
        thread.join()


def succeeding(adapter: Path) -> Callable[[Process], None]:
    def play(process: Process) -> None:
        process.write("started", "Training starts.", step=0, total_steps=4)
        process.step(1, 2.0)
        process.checkpoint(2, adapter)
        process.step(4, 0.5)
        process.succeed(adapter)

    return play


def failing(process: Process) -> None:
    process.write("failed", "Out of luck.", level="error", code="x")
    process.die()


def test_a_job_from_the_recipe_to_the_model(shell: Shell, make_adapter: MakeAdapter) -> None:
    shell.launcher.play = succeeding(make_adapter(1))
    status, out, err = shell.train("val_size=1", "seed=5", "--suffix", "who", "output_dir=saves/x")
    assert status == 0, err
    name = out.strip()  # alone on stdout, for scripts
    assert name.startswith("ft:tiny:who:")
    assert f"tuneloop chat --model {name}" in err
    assert "output_dir has no effect on a server" in err
    assert "step 1/4" in err
    assert "step 4/4  loss 0.5000" in err
    (job,) = shell.jobs()
    assert (job["status"], job["seed"], job["fine_tuned_model"]) == ("succeeded", 5, name)
    assert (job["tuning"]["lora_rank"], job["tuning"]["learning_rate"]) == (4, 1e-4)
    assert job["hyperparameters"]["n_epochs"] == 3  # the recipe's, not the server's choice
    assert job["validation_file"] is not None

    table = shell.ok("jobs", "list").splitlines()
    assert table[0].split() == ["JOB", "STATUS", "MODEL", "STEP", "RESULT", "CREATED"]
    assert table[1].split()[:5] == [job["id"], "succeeded", "tiny", "4/4", name]
    shown = shell.ok("jobs", "show", job["id"])
    assert shown.startswith(f"{job['id']}: succeeded, trains tiny\n  result: {name}\n  step: 4/4\n")
    assert "lora_rank=4" in shown
    logs = shell.ok("jobs", "logs", job["id"]).splitlines()
    assert "loss 2.0000" in next(line for line in logs if "step 1 " in line)
    events = [json.loads(line) for line in shell.ok("jobs", "logs", job["id"], "--json").splitlines()]
    assert [event["seq"] for event in events] == sorted(event["seq"] for event in events)
    assert len(json.loads(shell.ok("jobs", "events", job["id"], "--limit", "2", "--json"))) == 2
    assert "metrics" in shell.ok("jobs", "events", job["id"])
    assert shell.ok("jobs", "checkpoints", job["id"]).splitlines()[1].split()[:3] == [
        "2",
        f"{name}:ckpt-step-2",
        "0.5000",
    ]
    assert shell.ok("jobs", "logs", "-f", job["id"]) == f"{name}\n"  # an ended job is shown from its beginning


def test_rows_are_sent_in_openais_form(shell: Shell) -> None:
    shell.launcher.play = failing
    status, out, err = shell.train("max_samples=2")
    assert (status, out) == (1, "")
    assert err.splitlines()[-1] == "Error: Out of luck."
    (job,) = shell.jobs()
    spec = shell.launcher.processes[0].run.spec()
    (file,) = spec.train_files
    lines = [json.loads(line) for line in Path(file.path).read_text().splitlines()]
    assert [line["messages"][-1]["content"] for line in lines] == ["Tuna.", "We did."]
    assert job["error"]["message"] == "Out of luck."
    assert "error: Out of luck." in shell.ok("jobs", "show", job["id"])


def test_bad_rows_are_refused_before_anything_is_sent(shell: Shell) -> None:
    rows = shell.recipe.parent / "bad.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    status, _, err = shell.train(f"dataset={rows}")
    assert status == 1
    assert "bad.jsonl" in err.splitlines()[-1]
    assert "streaming reads rows while it trains" in shell.train("streaming=true", "max_steps=3", "save_strategy=no")[2]
    assert shell.jobs() == []


def test_what_the_server_refuses_is_told(shell: Shell) -> None:
    status, _, err = shell.train("model_name_or_path=nobody")
    assert status == 1
    assert "There is no model 'nobody'" in err.splitlines()[-1]


def test_json_prints_the_events_of_the_server(shell: Shell, make_adapter: MakeAdapter) -> None:
    shell.launcher.play = succeeding(make_adapter(1))
    status, out, _ = shell.train("--json")
    events = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert {event["object"] for event in events} == {"fine_tuning.job.event"}
    assert [event["data"]["step"] for event in events if event["type"] == "metrics"] == [1, 4]


def test_ctrl_c_ends_the_watching_only(shell: Shell) -> None:
    def interrupt() -> None:
        deadline = time.monotonic() + 20
        while not shell.launcher.trainers and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    status, out, err = shell.train()
    thread.join()
    assert (status, out) == (130, "")
    (job,) = shell.jobs()
    assert job["status"] == "running"
    assert f"`tuneloop jobs logs -f {job['id']}` shows it again" in err.splitlines()[-1]

    assert shell.ok("jobs", "pause", job["id"]) == f"{job['id']}: running\n"  # until its checkpoint is saved
    shell.launcher.trainers[0].stop("pause", 1)
    deadline = time.monotonic() + 10
    while not shell.jobs()[0]["paused"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert f"{job['id']}  paused" in shell.ok("jobs", "list")
    assert shell.ok("jobs", "resume", job["id"]).startswith(f"{job['id']}: ")
    assert json.loads(shell.ok("jobs", "cancel", job["id"], "--json"))["id"] == job["id"]


def test_jobs_that_are_not_there(shell: Shell) -> None:
    assert shell.run("jobs", "list") == (0, "", "The server has no jobs.\n")
    for command in ("show", "logs", "events", "checkpoints", "cancel", "pause", "resume"):
        status, out, err = shell.run("jobs", command, "ftjob-none")
        assert (status, out) == (1, "")
        assert err.startswith("Error: ")
        assert "ftjob-none" in err
        assert err.count("\n") == 1


def test_tuning_says_what_differs_and_what_a_server_would_choose() -> None:
    words = ["model_name_or_path=m", "dataset=a,b", "max_samples=5", "cutoff=drop", "learning_rate=auto", "threads=2"]
    recipe, auto, _ = read_recipe(None, words)
    tuning, notices = tuning_of(recipe, auto)
    assert tuning == {
        "cutoff": "drop",
        "learning_rate": "auto",
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 8,
    }
    assert notices == ["threads has no effect on a server: the server shares its processors out."]
