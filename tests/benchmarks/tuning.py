"""Supervised tuning beside TRL's SFTTrainer and LLaMA-Factory: loss of each step, trained tokens a second, memory.

The same rows in the same steps, float32, two threads, LoRA of rank 8 on all linear layers; each trainer is a process
of its own, one after another, in as many rounds as asked for.
"""

import statistics

from .report import Report
from .setting import Setting
from .tuning_data import in_order, load_rows, peers_order, places_of_steps
from .tuning_runs import Trained, float32_copy, train_peer, train_tuneloop

BATCH = 8
SEED = 42
TRAINERS = {"tuneloop": "Tuneloop", "trl": "TRL", "llamafactory": "LLaMA-Factory"}


async def run(setting: Setting, report: Report) -> object:
    rows = load_rows(setting.tuning.data)
    steps = min(setting.tuning.steps or len(rows), -(-len(rows) // BATCH))
    where = setting.tuning.data or "generated rows"
    report.say(f"{where}: {len(rows)} rows, {steps} steps of {BATCH}, float32, {setting.tuning.threads} threads")
    folder = setting.scratch / "tuning"
    folder.mkdir()
    ordered = [rows[i] for i in peers_order(len(rows), SEED)]
    ours = in_order(ordered, places_of_steps(len(rows), batch=BATCH, seed=SEED))
    model = float32_copy(setting.model, folder / "model")
    peers = {"trl": setting.tuning.trl, "llamafactory": setting.tuning.llamafactory}
    found: dict[str, list[Trained]] = {}
    for turn in range(setting.tuning.rounds):
        place = folder / f"round{turn}"
        made = train_tuneloop(ours, setting, place / "tuneloop", batch=BATCH, steps=steps, seed=SEED)
        found.setdefault("tuneloop", []).append(made)
        for name, python in peers.items():
            if python is None:
                continue
            made = train_peer(name, python, ordered, model, place / name, setting, batch=BATCH, steps=steps, seed=SEED)
            found.setdefault(name, []).append(made)
    _show_losses(report, found, steps)
    _show_speed(report, found)
    return {name: [one.__dict__ for one in runs] for name, runs in found.items()}


def _show_losses(report: Report, found: dict[str, list[Trained]], steps: int) -> None:
    losses = {name: runs[0].losses for name, runs in found.items()}
    rows = [[str(step + 1), *(f"{values[step]:.4f}" for values in losses.values())] for step in range(steps)]
    report.table("loss of each step", ["step", *(TRAINERS[name] for name in losses)], rows)
    ours = losses["tuneloop"]
    for name, values in losses.items():
        if name != "tuneloop":
            apart = [abs(a - b) for a, b in zip(ours, values, strict=True)]
            mean = f"{statistics.mean(ours):.4f} against {statistics.mean(values):.4f} on average"
            report.say(
                f"{TRAINERS[name]}: {mean}; {max(apart):.4f} apart at most, {statistics.mean(apart):.4f} usually"
            )


def _show_speed(report: Report, found: dict[str, list[Trained]]) -> None:
    speed = {name: statistics.median(one.tokens_per_second for one in runs) for name, runs in found.items()}
    memory = {name: statistics.median(one.peak_bytes for one in runs) for name, runs in found.items()}
    rows = [
        [
            TRAINERS[name],
            f"{runs[0].tokens:,}",
            f"{statistics.median(one.seconds for one in runs):.1f}",
            f"{speed[name]:.1f}",
            f"{speed['tuneloop'] / speed[name]:.2f}x",
            f"{memory[name] / 2**30:.2f}",
            f"{memory['tuneloop'] / memory[name]:.2f}x",
        ]
        for name, runs in found.items()
    ]
    columns = ["trainer", "real tokens", "s", "tok/s", "Tuneloop is", "peak GiB", "Tuneloop needs"]
    report.table("training loop, without loading the model (medians)", columns, rows)
