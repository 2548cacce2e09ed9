"""The second phase of a run: trains by what `prepare` left, and leaves checkpoints and a result.

It resumes by itself: the newest complete checkpoint in the run's folder is where it goes on.
"""

import os
import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.prepare import Prepared, load_prepared
from ..events import EventWriter
from ..failures import report
from ..recipe.recipe import Recipe
from ..run_folder import RunFolder, RunSpec

if TYPE_CHECKING:
    import torch

    from .batches import StepDataset, StreamDataset
    from .model import TrainedModel
    from .trackers import Tracker
    from .trackers.base import Status
    from .trainer import StepTrainer


def train(run: RunFolder) -> int:
    """Exit status 0 if the run ended well or stopped on request, 1 if it failed and said why in its log."""
    is_main = int(os.environ.get("RANK", "0")) == 0
    events = EventWriter(run.events if is_main else run.path / f"events.rank{os.environ['RANK']}.jsonl")
    try:
        spec = run.spec()
        os.nice(spec.nice)
        attempt = _Run(run, spec, events, is_main=is_main)
        try:
            attempt.execute()
        finally:
            attempt.close_trackers("failed")  # nothing is left to close after a good end
    except Exception as error:  # noqa: BLE001 - whatever it is, the log must say so
        report(events, error)
        return 1
    finally:
        events.close()
    return 0


class _Run:
    """One attempt at a run."""

    def __init__(self, run: RunFolder, spec: RunSpec, events: EventWriter, *, is_main: bool) -> None:
        from .control import Wishes

        self.run = run
        self.spec = spec
        self.events = events
        self.is_main = is_main
        self.prepared: Prepared = load_prepared(run)
        self.recipe: Recipe = self.prepared.recipe
        self.wishes = Wishes(run)
        self.wishes.listen()
        self.trackers: list[Tracker] = []
        self.last_metrics: dict[str, float] = {}

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
        longest = self._longest()
        budget = plan_memory(trained.model, self.recipe, device, longest)
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
            log_step=partial(self._log_step, steps),
            save=partial(self._save, trained, meter),
            load=partial(_load, trained, self.run),
        )
        schedule = Schedule(
            self.recipe,
            self.wishes,
            total_steps=self.prepared.total_steps,
            epoch_ends=getattr(steps, "epoch_ends", []),
            validates=bool(validation),
            agree=partial(_largest, trainer),
        )
        trainer.add_callback(schedule)
        if self.recipe.early_stopping_steps is not None:
            trainer.add_callback(EarlyStop(self.recipe.early_stopping_steps, self.recipe.early_stopping_threshold))
        self._open_trackers()
        self._say_started(trained, device, resume, packed=packed, budget_tokens=budget.max_tokens)
        begin = time.time()
        meter.start(resume or 0)
        trainer.train(resume_from_checkpoint=None if resume is None else str(self.run.checkpoint(resume) / "state"))
        if schedule.stopped is not None:
            self.close_trackers("stopped")
            if self.is_main:
                self.events.write(
                    "stopped",
                    f"Stopped after step {trainer.state.global_step}.",
                    reason=schedule.stopped,
                    step=trainer.state.global_step,
                )
            return
        self._finish(trained, trainer, meter, seconds=time.time() - begin)

    def _finish(self, trained: "TrainedModel", trainer: "StepTrainer", meter: Any, *, seconds: float) -> None:
        from .checkpoints import check_finite, put_folder, save_result

        step = trainer.state.global_step
        best = trainer.state.best_global_step
        if self.recipe.load_best_model_at_end and best is not None and best in self.run.steps():
            _load(trained, self.run, trainer, self.run.checkpoint(best) / "state")
            step = best
        check_finite(trained)
        if not self.is_main:
            return
        folder = self.spec.result or self.run.result
        kinds: list[str] = []
        facts = self._lineage(step, meter.tokens, seconds)

        def fill(place: Path) -> None:
            kinds.append(save_result(trained, self.spec, self.recipe, place))

        if self.spec.result is None:
            put_folder(folder, fill)
        else:  # a folder that a person named holds other things too
            put_folder(self.run.result, fill)
            _copy_into(self.run.result, folder)
        self.events.write(
            "result",
            f"The result is saved after step {step}.",
            kind=kinds[0],
            path=str(folder.relative_to(self.run.path)) if folder.is_relative_to(self.run.path) else str(folder),
            step=step,
            metrics=dict(self.last_metrics),
            trained_tokens=meter.tokens,
            seconds=seconds,
        )
        (self.run.path / "lineage.json").write_text(_json(facts), "utf-8")
        self._plot()
        self.close_trackers("finished")
        self.events.write("finished", "The run is complete.")

    def _steps(self, max_tokens: int, rank: int, world: int) -> "StepDataset | StreamDataset":
        from ..data.token_store import TokenStore
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

    def _validation(self, max_tokens: int) -> list[Any]:
        from ..data.token_store import TokenStore
        from .batches import validation_batches

        if not (self.run.data / "eval").is_dir():
            return []
        return validation_batches(TokenStore.open(self.run.data / "eval"), max_tokens=max_tokens)

    def _longest(self) -> int:
        return int(self.prepared.report.get("longest") or self.recipe.cutoff_len)

    def _save(self, trained: "TrainedModel", meter: Any, trainer: "StepTrainer") -> None:
        """A checkpoint: to serve and to resume from."""
        from .checkpoints import check_finite, prune, put_folder, save_weights

        check_finite(trained)
        step = trainer.state.global_step
        path = self.run.checkpoint(step)
        metrics = dict(self.last_metrics)

        def fill(folder: Path) -> None:
            save_weights(trained, self.spec, folder, model=trainer.accelerator.unwrap_model(trainer.model))
            (folder / "state").mkdir()
            trainer.save_state(folder / "state")
            (folder / "state" / "meter.json").write_text(_json({"tokens": meter.tokens, "metrics": metrics}))

        if self.is_main:
            put_folder(path, fill)
            gone = prune(self.run, keep=self.recipe.save_total_limit, best=trainer.state.best_global_step)
            self.events.write(
                "checkpoint",
                f"Checkpoint at step {step}.",
                step=step,
                path=str(path.relative_to(self.run.path)),
                kind="adapter" if trained.is_lora else "model",
                metrics=metrics,
                gone=gone,
            )
        trainer.accelerator.wait_for_everyone()

    def _log_step(self, steps: Any, step: int, metrics: Mapping[str, float]) -> None:
        if not self.is_main:
            return
        epoch_of = getattr(steps, "epoch_of", None)
        known = dict(metrics) if epoch_of is None else {"epoch": epoch_of(step), **metrics}
        self.last_metrics |= metrics
        data: dict[str, Any] = {"step": step, **known}
        self.events.write("metrics", **data)
        for tracker in self.trackers:
            tracker.log(step, known)

    def _say_started(
        self, trained: "TrainedModel", device: "torch.device", resume: int | None, *, packed: bool, budget_tokens: int
    ) -> None:
        if not self.is_main:
            return
        if not packed:
            self.events.write(
                "message",
                "This architecture computes attention in its own way, so batches run sequence by sequence, which is "
                "slower and gives the same result.",
                level="warn",
            )
        if resume is not None:
            for tracker in self.trackers:
                tracker.log(resume, {})  # behind which step the run goes on
        self.events.write(
            "started",
            "Training starts." if resume is None else f"Training goes on after step {resume}.",
            step=resume or 0,
            total_steps=self.prepared.total_steps,
            parameters=trained.parameters,
            trainable_parameters=trained.trainable_parameters,
            dtype=str(next(trained.model.parameters()).dtype).removeprefix("torch."),
            devices=list(self.run.placement() or self.spec.devices) or [str(device)],
            micro_batch_tokens=budget_tokens,
        )

    def _open_trackers(self) -> None:
        if not self.is_main or not self.recipe.report_to:
            return
        from .trackers import open_trackers

        self.trackers = open_trackers(
            self.recipe.report_to,
            folder=Path(self.recipe.logging_dir) if self.recipe.logging_dir else self.run.path / "trackers",
            run_name=self.recipe.run_name or self.run.path.name,
            config=self.recipe.model_dump(mode="json"),
            options=dict(self.spec.metadata.get("trackers") or {}),
            warn=partial(self.events.write, "message", level="warn"),
            metadata={name: value for name, value in self.spec.metadata.items() if name != "trackers"},
        )

    def close_trackers(self, status: "Status") -> None:
        for tracker in self.trackers:
            tracker.finish(status)
        self.trackers = []

    def _plot(self) -> None:
        if not self.recipe.plot_loss:
            return
        from ..events import read_events
        from ..plots import write_loss_plot

        curves: dict[str, dict[int, float]] = {"train_loss": {}, "valid_loss": {}}
        for event in read_events(self.run.events):
            for name, points in curves.items():
                if event.kind == "metrics" and name in event.data:
                    points[int(event.data["step"])] = float(event.data[name])
        folder = self.spec.result or self.run.path
        write_loss_plot(
            {name: sorted(points.items()) for name, points in curves.items() if points}, folder / "training_loss.svg"
        )

    def _lineage(self, step: int, tokens: int, seconds: float) -> dict[str, Any]:
        return {
            "base": self.spec.base_name,
            "data_digest": self.prepared.digest,
            "recipe": self.recipe.model_dump(mode="json"),
            "step": step,
            "trained_tokens": tokens,
            "seconds": seconds,
            "metrics": self.last_metrics,
        } | dict(self.spec.metadata)

    def _tokens_before(self, resume: int | None) -> int:
        if resume is None:
            return 0
        import json

        held = json.loads((self.run.checkpoint(resume) / "state" / "meter.json").read_text())
        self.last_metrics = dict(held["metrics"])
        return int(held["tokens"])

    def _device_name(self) -> str | None:
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        devices = self.run.placement() or self.spec.devices
        return devices[rank] if devices else self.spec.device

    def _use_threads(self) -> None:
        import torch

        if self.spec.threads is not None:
            torch.set_num_threads(self.spec.threads)


def _load(trained: "TrainedModel", run: RunFolder, trainer: "StepTrainer", state: Path) -> None:
    """The weights of a checkpoint into the model that is being trained."""
    from safetensors.torch import load_file

    folder = state.parent
    if trained.is_lora:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(trained.model, load_file(folder / "adapter_model.safetensors"))
        return
    names = sorted(folder.glob("*.safetensors"))
    weights = {name: tensor for file in names for name, tensor in load_file(file).items()}
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


def _json(value: Any) -> str:
    import json

    return json.dumps(value, indent=1, default=str)
