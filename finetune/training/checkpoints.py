"""What a run leaves on the disk: checkpoints to serve and to resume from, and its result. Each is complete or absent.

step-N/          the adapter (two PEFT files) or the model (a checkpoint folder), as an engine loads it
step-N/state/    optimiser, scheduler, random states, trainer_state.json, for resuming only
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...adapters.files import CONFIG_NAME
from ...storage.durable import files_below, sync_file
from ...storage.staging import staged
from ..failures import Diverged
from ..run_folder import RunFolder, RunSpec
from .model import TrainedModel
from .stack import stack

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json", ".h5", ".msgpack")


def put_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `path` by `fill(folder)`, complete or absent. One that exists is replaced."""
    with staged(path) as folder:
        fill(folder)
        for file in files_below(folder):
            sync_file(folder / file)
        shutil.rmtree(path, ignore_errors=True)


def check_finite(trained: TrainedModel) -> None:
    """Raises Diverged if a trained weight is no number, so that nothing broken is ever saved or served."""
    import torch

    for name, parameter in trained.model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise Diverged(
                f"The weight {name} is no longer finite: the training has diverged. Lower the learning rate or look "
                "for broken rows in the data. Checkpoints that were saved before are good."
            )


def save_weights(trained: TrainedModel, spec: RunSpec, folder: Path, *, model: Any = None) -> None:
    """What an engine loads: the adapter as PEFT saves it, or a whole checkpoint with its tokenizer, in float32.

    `model` is the model to save when it is not the run's own object (unwrapped by accelerate).
    """
    model = trained.model if model is None else model
    if trained.is_lora:
        model.save_pretrained(folder, save_embedding_layers=False)  # which PEFT would ask the hub about
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's card has blanks only
        _finish_adapter(trained, spec, folder)
    else:
        model.save_pretrained(folder)
        copy_tokenizer(spec.model_path, folder)


def save_result(trained: TrainedModel, spec: RunSpec, recipe: Any, folder: Path) -> str:
    """Write the result; returns its kind, `adapter` or `model`.

    An adapter with fully trained modules beside it (`additional_target`) cannot be served as one: it is merged.
    """
    if trained.is_lora and not recipe.additional_target:
        save_weights(trained, spec, folder)
        if recipe.create_new_adapter and spec.adapter_path is not None:
            stack(spec.adapter_path, folder)
        return "adapter"
    model = trained.model.merge_and_unload() if trained.is_lora else trained.model
    model.to(trained.saved_dtype)
    model.config.use_cache = True
    model.save_pretrained(folder)
    copy_tokenizer(spec.model_path, folder)
    return "model"


def copy_tokenizer(source: Path, folder: Path) -> None:
    """All small files of a checkpoint that the new one lacks: tokenizer, chat template, generation defaults."""
    for file in source.iterdir():
        target = folder / file.name
        if file.is_file() and not file.name.endswith(_WEIGHTS) and not target.exists() and file.name[0] != ".":
            shutil.copyfile(file, target)


def prune(run: RunFolder, *, keep: int | None, best: int | None) -> list[int]:
    """Remove the oldest checkpoints beyond `keep`, never the best one; and states that no run will resume from.

    Returns the steps whose checkpoints are gone.
    """
    steps = run.steps()
    gone = [step for step in steps[:-keep] if step != best] if keep is not None else []
    for step in gone:
        shutil.rmtree(run.checkpoint(step), ignore_errors=True)
    for step in steps[:-1]:
        shutil.rmtree(run.checkpoint(step) / "state", ignore_errors=True)
    return gone


def resumable_step(run: RunFolder) -> int | None:
    """The newest step that a run can go on from."""
    found = [step for step in run.steps() if (run.checkpoint(step) / "state" / "trainer_state.json").is_file()]
    return found[-1] if found else None


def _finish_adapter(trained: TrainedModel, spec: RunSpec, folder: Path) -> None:
    """The served name of the base, not a folder of this machine."""
    config = json.loads((folder / CONFIG_NAME).read_text("utf-8"))
    config["base_model_name_or_path"] = spec.base_name
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + os.linesep, "utf-8")
