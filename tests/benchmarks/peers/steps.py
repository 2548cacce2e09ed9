"""Notes when transformers' Trainer begins and ends steps and what their losses are, and writes the result."""

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


class Steps(TrainerCallback):  # type: ignore[misc]
    """The data loader must be sequential: its first rows are those of the steps."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.losses: list[float] = []
        self.lengths: list[int] = []
        self.began = 0.0
        self.ended = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.lengths = [len(row["input_ids"]) for row in kwargs["train_dataloader"].dataset]
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def write(self, folder: Path) -> None:
        tokens = sum(self.lengths[: self.batch * len(self.losses)])
        result = {"losses": self.losses, "tokens": tokens, "seconds": self.ended - self.began}
        (folder / "result.json").write_text(json.dumps(result), "utf-8")
