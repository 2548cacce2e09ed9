"""The output folder of `tuneloop train`: begin in it, go on in it, or refuse. It starts nothing.

The run's own folder is `run` in it, as finetune/run_folder.py describes; the result lies beside that.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import CliError

if TYPE_CHECKING:
    from ...finetune.run_folder import RunFolder, RunSpec

# What may differ when a run goes on: it decides nothing about what is trained.
_FREE = frozenset({"resume_from_checkpoint", "overwrite_output_dir", "max_retries", "threads", "trust_remote_code"})
_MODEL_FILES = ("config.json", "adapter_config.json")


def open_run(output: Path, spec: "RunSpec") -> "RunFolder":
    """The run's folder: new, or one to go on in. Raises CliError with what the person can choose."""
    from ...finetune.events import read_events
    from ...finetune.run_folder import RunFolder

    recipe = spec.recipe
    run = RunFolder(output / "run")
    held = (run.path / "spec.json").is_file()
    if held and run.alive():
        raise CliError(f"A process trains in {output} already. Wait for it, end it, or set another output_dir.")
    complete = any(event.kind == "finished" for event in read_events(run.events))
    if recipe.resume_from_checkpoint:
        if not held or complete:
            state = "is complete" if held else "does not exist"
            raise CliError(f"The run in {output} {state}, so it cannot go on; leave resume_from_checkpoint out.")
        _check_same(run.spec(), spec)
        if isinstance(recipe.resume_from_checkpoint, str):
            _go_back(run, recipe.resume_from_checkpoint)
        return run
    steps = run.steps()
    if recipe.overwrite_output_dir or (held and not steps and not complete):  # then nothing is lost
        _clear(output, run)
    elif complete or any((output / name).exists() for name in _MODEL_FILES):
        raise CliError(f"{output} holds a result already. Set another output_dir, or add overwrite_output_dir=true.")
    elif held:
        raise CliError(
            f"{output} holds a run with a checkpoint of step {steps[-1]}. Add resume_from_checkpoint=true to go on "
            "with it, overwrite_output_dir=true to begin anew, or set another output_dir."
        )
    return run


def _check_same(old: "RunSpec", new: "RunSpec") -> None:
    """Raises CliError if a run cannot go on as what is asked for now."""
    before, after = old.recipe.model_dump(mode="json"), new.recipe.model_dump(mode="json")
    differing = [
        f"{key} {_shown(before[key])} (now {_shown(after[key])})"
        for key in after
        if key not in _FREE and before[key] != after[key]
    ]
    if set(old.auto) != set(new.auto):
        differing.append(f"auto for {', '.join(old.auto) or 'nothing'} (now {', '.join(new.auto) or 'nothing'})")
    if old.base_name != new.base_name:
        differing.append(f"the model {old.base_name} (now {new.base_name})")
    if differing:
        raise CliError(
            f"A run goes on with the recipe it began with, which has {'; '.join(differing[:4])}. Give the same again, "
            "or begin anew with overwrite_output_dir=true and without resume_from_checkpoint."
        )


def _go_back(run: "RunFolder", name: str) -> None:
    """Put the checkpoints after the named one aside, so that the trainer goes on from it."""
    text = Path(name).name.removeprefix("step-").removeprefix("checkpoint-")
    steps = run.steps()
    if not text.isdigit() or int(text) not in steps:
        known = ", ".join(f"step-{step}" for step in steps) or "none"
        raise CliError(f"There is no checkpoint {name} in {run.path}. There are: {known}.")
    for step in steps:
        if step > int(text):
            aside = run.checkpoints / f"set-aside-{step}"
            shutil.rmtree(aside, ignore_errors=True)
            run.checkpoint(step).rename(aside)


def _clear(output: Path, run: "RunFolder") -> None:
    """Remove a run and the result that it put beside itself; whatever else lies in the folder stays."""
    if run.result.is_dir():
        for file in run.result.iterdir():
            (output / file.name).unlink(missing_ok=True)
    if run.path.is_dir():
        shutil.rmtree(run.path)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "empty" if value is None or value == [] else str(value)
