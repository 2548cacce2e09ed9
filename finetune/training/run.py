"""The second phase of a run: trains by what `prepare` left, and leaves checkpoints and a result.

It resumes by itself: the newest complete checkpoint in the run's folder is where it goes on.
"""

import json
import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.prepare import Prepared, load_prepared
from ..data.token_store import TokenStore
from ..events import EventWriter
from ..failures import report
from ..recipe.recipe import Recipe
from ..run_folder import RunFolder, RunSpec
from .journal import Journal

if TYPE_CHECKING:
    import torch

    from ..methods.base import Batch
    from .batches import StepDataset, StreamDataset
    from .meter import Meter
    from .model import TrainedModel
    from .trainer import StepTrainer


def train(run: RunFolder) -> int:
    """Exit status 0 if the run ended well or stopped on request, 1 if it failed and said why in its log."""
    is_main = int(os.environ.get("RANK", "0")) == 0
    events = EventWriter(run.events if is_main else run.path / f"events.rank{os.environ['RANK']}.jsonl")
    try:
        spec = run.spec()
        os.nice(spec.nice)
        prepared = load_prepared(run)
        journal = Journal(run, spec, prepared, events, speaks=is_main)
        try:
            _Run(run, spec, prepared, journal, is_main=is_main).execute()
        finally:
            journal.close_trackers("failed")  # nothing is left to close after a good end
    except Exception as error:  # noqa: BLE001 - whatever it is, the log must say so
        report(events, error)
        return 1
    finally:
        events.close()
    return 0


class _Run:
    """One attempt at a run."""

    def __init__(self, run: RunFolder, spec: RunSpec, prepared: Prepared, journal: Journal, *, is_main: bool) -> None:
        from .control import Wishes

        self.run = run
        self.spec = spec
        self.prepared = prepared
        self.journal = journal
        self.is_main = is_main
        self.recipe: Recipe = prepared.recipe
        self.wishes = Wishes(run)
        self.wishes.listen()

    def execute(self) -> None:
        """Load, train, save. The order of the end is: result on the disk, `result` event, everything else."""
        from ..methods import method_for
        from . import attention, linear
        from .arguments import choose_device, training_arguments
        from .budget import plan_memory
        from .checkpoints import resumable_step
        from .control import EarlyStop, Schedule
        from .meter import Meter
        from .model import load_model
        from .trainer import StepTrainer

        self._use_threads()
        device = choose_device(self._device_name())
        _seed(self.recipe.seed)
        trained = load_model(self.spec, self.recipe, device)
        packed = attention.use_varlen(trained.model)
        linear.install(trained.model)
        budget = plan_memory(trained.model, self.recipe, device, self._longest())
        arguments = training_arguments(
            self.recipe,
            self.run,
            device=device,
            total_steps=self.prepared.total_steps,
            checkpointing=budget.checkpointing,
        )
        resume = resumable_step(self.run)
        steps = self._steps(budget.max_tokens, arguments.process_index, arguments.world_size)
        validation = self._validation(budget.max_tokens)
        meter = Meter(self._tokens_before(resume))
        trainer = StepTrainer(
            trained.model,
            arguments,
            recipe=self.recipe,
            steps=steps,
            validation=validation,
            loss=method_for(self.recipe.stage).loss,
            meter=meter,
            log_step=lambda step, metrics: self.journal.measure(step, steps.epoch_of(step), metrics),
            save=partial(self._save, trained, meter),
            load=partial(_load, trained),
        )
        schedule = Schedule(
            self.recipe,
            self.wishes,
            total_steps=self.prepared.total_steps,
            epoch_ends=steps.epoch_ends,
            validates=bool(validation),
            agree=partial(_largest, trainer),
        )
        trainer.add_callback(schedule)
        if self.recipe.early_stopping_steps is not None:
            trainer.add_callback(EarlyStop(self.recipe.early_stopping_steps, self.recipe.early_stopping_threshold))
        facts = {
            "parameters": trained.parameters,
            "trainable_parameters": trained.trainable_parameters,
            "dtype": str(next(trained.model.parameters()).dtype).removeprefix("torch."),
            "devices": list(self.run.placement() or self.spec.devices) or [str(device)],
            "micro_batch_tokens": budget.max_tokens,
        }
        self.journal.begin(resume, facts, packed=packed)
        begin = time.time()
        meter.start(resume or 0)
        trainer.train(resume_from_checkpoint=None if resume is None else str(self.run.checkpoint(resume) / "state"))
        if schedule.stopped is not None:
            self.journal.stopped(trainer.state.global_step, schedule.stopped)
            return
        self._finish(trained, trainer, meter.tokens, seconds=time.time() - begin)

    def _finish(self, trained: "TrainedModel", trainer: "StepTrainer", tokens: int, *, seconds: float) -> None:
        from .checkpoints import check_finite, put_folder, save_result

        step = trainer.state.global_step
        best = trainer.state.best_global_step
        if self.recipe.load_best_model_at_end and best is not None and best in self.run.steps():
            _load(trained, trainer, self.run.checkpoint(best) / "state")
            step = best
        check_finite(trained)
        if not self.is_main:
            return
        kinds: list[str] = []
        put_folder(self.run.result, lambda place: kinds.append(save_result(trained, self.spec, self.recipe, place)))
        if self.spec.result is not None:  # a folder that a person named holds other things too
            _copy_into(self.run.result, self.spec.result)
        folder = self.spec.result or self.run.result
        self.journal.result(step, folder, kind=kinds[0], tokens=tokens, seconds=seconds)

    def _steps(self, max_tokens: int, rank: int, world: int) -> "StepDataset | StreamDataset":
        from .batches import StepDataset, StreamDataset

        if self.recipe.streaming:
            from ..data.stream import stream_sequences

            sequences = stream_sequences(self.spec, self.recipe)
            return StreamDataset(sequences, self.recipe, max_tokens=max_tokens, rank=rank, world=world)
        store = TokenStore.open(self.run.data / "train")
        return StepDataset(
            store,
            self.recipe,
            total_steps=self.prepared.total_steps,
            max_tokens=max_tokens,
            rank=rank,
            world=world,
        )

    def _validation(self, max_tokens: int) -> list["Batch"]:
        from .batches import validation_batches

        if not (self.run.data / "eval").is_dir():
            return []
        return validation_batches(TokenStore.open(self.run.data / "eval"), max_tokens=max_tokens)

    def _longest(self) -> int:
        return int(self.prepared.report.get("longest") or self.recipe.cutoff_len)

    def _save(self, trained: "TrainedModel", meter: "Meter", trainer: "StepTrainer") -> None:
        """A checkpoint: to serve and to resume from."""
        from .checkpoints import check_finite, prune, put_folder, save_weights

        check_finite(trained)
        step = trainer.state.global_step
        path = self.run.checkpoint(step)

        def fill(folder: Path) -> None:
            save_weights(trained, self.spec, folder, model=trainer.accelerator.unwrap_model(trainer.model))
            state = folder / "state"
            state.mkdir()
            trainer.save_state(state)
            (state / "meter.json").write_text(json.dumps({"tokens": meter.tokens, "metrics": self.journal.metrics}))

        if self.is_main:
            put_folder(path, fill)
            gone = prune(self.run, keep=self.recipe.save_total_limit, best=trainer.state.best_global_step)
            self.journal.checkpoint(step, path, kind="adapter" if trained.is_lora else "model", gone=gone)
        trainer.accelerator.wait_for_everyone()

    def _tokens_before(self, resume: int | None) -> int:
        """Of the attempts before this one, whose newest measures come back as well."""
        if resume is None:
            return 0
        held = json.loads((self.run.checkpoint(resume) / "state" / "meter.json").read_text())
        self.journal.metrics = dict(held["metrics"])
        return int(held["tokens"])

    def _device_name(self) -> str | None:
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        devices = self.run.placement() or self.spec.devices
        return devices[rank] if devices else self.spec.device

    def _use_threads(self) -> None:
        import torch

        if self.spec.threads is not None:
            torch.set_num_threads(self.spec.threads)


def _load(trained: "TrainedModel", trainer: "StepTrainer", state: Path) -> None:
    """The weights of a checkpoint into the model that is being trained."""
    from safetensors.torch import load_file

    folder = state.parent
    if trained.is_lora:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(trained.model, load_file(folder / "adapter_model.safetensors"))
        return
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    trained.model.load_state_dict(weights, strict=False)  # tied weights are stored once
    trained.model.tie_weights()


def _largest(trainer: "StepTrainer", number: int) -> int:
    """The largest number that any process of the run gives."""
    if trainer.args.world_size == 1:
        return number
    import torch

    return int(trainer.accelerator.gather(torch.tensor([number], device=trainer.args.device)).max())


def _seed(seed: int) -> None:
    from transformers import set_seed

    set_seed(seed)


def _copy_into(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
