"""transformers' Trainer with our batches: no padding, one loss over a whole step, checkpoints that are never half.

The Trainer keeps what it is good at: optimisers, schedulers, precision, several processes, states to resume from.
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

from ..failures import Diverged
from ..methods.base import Batch, LossResult
from ..recipe.recipe import Recipe
from .batches import StepBatches, on_device
from .meter import Meter

Log = Callable[[int, Mapping[str, float]], None]
LossFunction = Callable[[torch.nn.Module, Batch, Recipe], LossResult]


class StepTrainer(Trainer):  # type: ignore[misc]
    """`steps` gives one item an optimiser step. `log_step(step, metrics)` hears of metrics, `save(step)` must save."""

    def __init__(
        self,
        model: torch.nn.Module,
        arguments: TrainingArguments,
        *,
        recipe: Recipe,
        steps: Dataset[StepBatches],
        validation: list[Batch],
        loss: LossFunction,
        meter: Meter,
        log_step: Log,
        save: Callable[["StepTrainer"], None],
        load: Callable[["StepTrainer", Path], None],
    ) -> None:
        self.control: Any
        super().__init__(model=model, args=arguments, train_dataset=steps, data_collator=_only)
        self._recipe = recipe
        self._validation = validation
        self._loss = loss
        self._meter = meter
        self._log_step = log_step
        self._save_step = save
        self._load_step = load

    def get_train_dataloader(self) -> DataLoader[StepBatches]:
        """Steps in their order; each process makes its own share, so nothing is sharded or shuffled here."""
        return DataLoader(self.train_dataset, batch_size=1, collate_fn=_only)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], None]:
        """One step's batches; the loss needs no count from the Trainer."""
        return [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)], None

    def floating_point_ops(self, inputs: Any) -> int:
        """Nobody reads them."""
        return 0

    def training_step(
        self, model: torch.nn.Module, inputs: StepBatches, num_items_in_batch: object = None
    ) -> torch.Tensor:
        """Forward and backward of one step. The loss is the mean over all supervised tokens of all processes."""
        model.train()
        device = self.args.device
        mine = sum(len(batch.labels) for batch in inputs)
        count = self._sum(mine)
        total = torch.zeros((), device=device)
        for number, batch in enumerate(inputs):
            last = number == len(inputs) - 1
            with nullcontext() if last else self.accelerator.no_sync(model):
                found = self._forward(model, on_device(batch, device))
                # DDP averages gradients over processes; the factor makes it a sum.
                scaled = found.loss * (self.args.world_size / max(count, 1))
                self.accelerator.backward(scaled)
            total += found.loss.detach()
            self._meter.add(found, tokens=int(batch.ids.shape[1]))
        mean = self._sum(float(total)) / max(count, 1)
        if not math.isfinite(mean):
            raise Diverged(
                f"The loss became {mean} in step {self.state.global_step + 1}: the training has diverged. Lower the "
                f"learning rate (it is {self._recipe.learning_rate:g}) or look for broken rows in the data. "
                "Checkpoints that were saved before are good."
            )
        return torch.tensor(mean, device=device)

    def evaluate(self, *_: object, **__: object) -> dict[str, float]:
        """Mean loss and accuracy over the validation set, each process doing its share."""
        self.model.eval()
        begin = time.perf_counter()
        sums = [0.0, 0.0, 0.0]
        with torch.no_grad():
            for batch in self._validation[self.args.process_index :: self.args.world_size]:
                found = self._forward(self.model, on_device(batch, self.args.device))
                sums[0] += float(found.loss)
                sums[1] += found.sums.get("correct", 0.0)
                sums[2] += found.count
        loss, correct, count = (self._sum(value) for value in sums)
        self._meter.pause(time.perf_counter() - begin)
        metrics = {"eval_loss": loss / max(count, 1), "eval_accuracy": correct / max(count, 1)}
        self._log_step(
            self.state.global_step,
            {
                "valid_loss": metrics["eval_loss"],
                "valid_mean_token_accuracy": metrics["eval_accuracy"],
                "full_valid_loss": metrics["eval_loss"],
                "full_valid_mean_token_accuracy": metrics["eval_accuracy"],
            },
        )
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's own points of the curves, under OpenAI's names."""
        if "loss" not in logs:
            return  # the summary at the end
        done = self._meter.take(self.state.global_step, self.state.max_steps, total=self._sum)
        names = {"loss": "train_loss", "grad_norm": "grad_norm", "learning_rate": "learning_rate"}
        self._log_step(self.state.global_step, {names[key]: float(logs[key]) for key in names if key in logs} | done)

    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        begin = time.perf_counter()
        self._save_step(self)
        self._meter.pause(time.perf_counter() - begin)

    def save_state(self, folder: Path) -> None:
        """What resuming needs beside the weights, written to `folder`."""
        path = str(folder)
        self._save_optimizer_and_scheduler(path)
        self._save_scaler(path)
        self._save_rng_state(path)
        if self.args.should_save:
            self.state.stateful_callbacks = {
                callback.__class__.__name__: callback.state()
                for callback in [*self.callback_handler.callbacks, self.control]
                if hasattr(callback, "state") and callable(callback.state)
            }
            self.state.save_to_json(str(folder / "trainer_state.json"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        self._load_step(self, Path(resume_from_checkpoint))

    def _determine_best_metric(self, metrics: dict[str, float], trial: object) -> bool:
        best = self.state.best_metric
        is_better = best is None or metrics["eval_loss"] < best - self._recipe.early_stopping_threshold
        if is_better:
            self.state.best_metric = metrics["eval_loss"]
            self.state.best_global_step = self.state.global_step
        return is_better

    def _forward(self, model: torch.nn.Module, batch: Batch) -> LossResult:
        with self.compute_loss_context_manager():
            return self._loss(model, batch, self._recipe)

    def _sum(self, value: float) -> float:
        """Over all processes."""
        if self.args.world_size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64 if self.args.device.type == "cpu" else torch.float32)
        return float(self.accelerator.reduce(tensor.to(self.args.device), reduction="sum"))


def _only(items: list[Any]) -> Any:
    return items[0]
