"""One training run as a process, with its memory sampled: Tuneloop's trainer, or a peer in its own environment."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from tuneloop.finetune.events import read_events
from tuneloop.finetune.recipe.recipe import Recipe
from tuneloop.finetune.run_folder import DataFile, RunFolder, RunSpec

from .setting import Setting
from .tuning_data import Row

PEERS = Path(__file__).parent / "peers"
SAMPLE_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class Trained:
    """`tokens` are those of the rows, without padding; `seconds` are the loop's, from its begin to its last step."""

    losses: Sequence[float]
    tokens: int
    seconds: float
    peak_bytes: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def float32_copy(model: Path, folder: Path) -> Path:
    """The checkpoint in float32: LLaMA-Factory trains in the type that it finds."""
    program = (
        "import sys, torch, transformers as t\n"
        "source, dest = sys.argv[1:]\n"
        "t.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).save_pretrained(dest)\n"
        "t.AutoTokenizer.from_pretrained(source).save_pretrained(dest)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(model), str(folder)], check=True, capture_output=True)
    return folder


def train_tuneloop(
    rows: Sequence[Row], setting: Setting, folder: Path, *, batch: int, steps: int, seed: int
) -> Trained:
    folder.mkdir(parents=True)
    file = folder / "rows.json"
    file.write_text(json.dumps(rows), "utf-8")
    recipe = Recipe(
        model_name_or_path=str(setting.model),
        lora_rank=8,
        lora_alpha=16,
        cutoff_len=512,
        cutoff="truncate",
        per_device_train_batch_size=batch,
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        num_train_epochs=1,
        max_steps=steps,
        seed=seed,
        fp32=True,
        save_strategy="no",
        threads=setting.tuning.threads,
    )
    run = RunFolder(folder / "run")
    run.create(
        RunSpec(
            recipe=recipe,
            base_name="smollm2-135m",
            model_path=setting.model,
            train_files=(DataFile(path=str(file), name=file.name),),
            threads=setting.tuning.threads,
        )
    )
    for phase in ("prepare", "train"):
        command = [sys.executable, "-m", "tuneloop.finetune", str(run.path), phase]
        peak = _run(command, run.log, threads=setting.tuning.threads)
    events = list(read_events(run.events))
    (began,) = (event.at for event in events if event.kind == "started")
    metrics = [event for event in events if event.kind == "metrics" and "train_loss" in event.data]
    return Trained(
        losses=[event.data["train_loss"] for event in metrics],
        tokens=metrics[-1].data["tokens"],
        seconds=metrics[-1].at - began,
        peak_bytes=peak,
    )


def train_peer(
    name: str,
    python: Path,
    rows: Sequence[Row],
    model: Path,
    folder: Path,
    setting: Setting,
    *,
    batch: int,
    steps: int,
    seed: int,
) -> Trained:
    """Run peers/<name>_sft.py by the peer's own Python; it writes result.json."""
    folder.mkdir(parents=True)
    (folder / "rows.json").write_text(json.dumps(rows), "utf-8")
    task = {"model": str(model), "batch": batch, "steps": steps, "rows": len(rows), "seed": seed}
    (folder / "task.json").write_text(json.dumps(task), "utf-8")
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "cache"),
        "PYTHONPATH": str(PEERS / "stand_ins"),
        "DO_NOT_TRACK": "1",
    }
    command = [str(python), str(PEERS / f"{name}_sft.py"), str(folder)]
    peak = _run(command, folder / "log.txt", threads=setting.tuning.threads, **environment)
    return Trained(**json.loads((folder / "result.json").read_text("utf-8")), peak_bytes=peak)


def _run(command: Sequence[str], log: Path, *, threads: int, **environment: str) -> int:
    """Wait for the process; returns the most memory that it and its children held, in bytes."""
    variables: Mapping[str, str] = {**os.environ, **environment, "OMP_NUM_THREADS": str(threads)}
    peak = 0
    with log.open("ab") as output:
        process = subprocess.Popen(command, env=variables, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, _resident(watched))
            time.sleep(SAMPLE_SECONDS)
    if process.returncode != 0:
        raise RuntimeError(f"{command} ended with {process.returncode}:\n{log.read_text('utf-8', 'replace')[-3000:]}")
    return peak


def _resident(process: psutil.Process) -> int:
    total = 0
    try:
        for member in [process, *process.children(recursive=True)]:
            total += member.memory_info().rss
    except psutil.NoSuchProcess:  # it ended between the question and the answer
        return total
    return total
