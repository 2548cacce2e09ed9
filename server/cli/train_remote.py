"""Trains on a server: rows are read and checked here, uploaded in OpenAI's form, and the job is followed."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .client import Client, path_of
from .console import CliError, say
from .job_events import follow
from .local import explained, read_settings
from .train_display import TrainDisplay

if TYPE_CHECKING:
    from ...finetune.data.base import Row
    from ...finetune.recipe.recipe import Recipe

CANCELLED = 130
# What is done here, before the rows are sent.
_HERE = frozenset({
    "dataset", "eval_dataset", "dataset_dir", "mix_strategy", "interleave_probs", "max_samples", "val_size",
})  # fmt: skip
_WITHOUT_EFFECT = {
    "output_dir": "the result is a model of the server",
    "overwrite_output_dir": "every job is new",
    "resume_from_checkpoint": "a job goes on by itself; `tuneloop jobs resume` continues a paused one",
    "logging_dir": "TensorBoard's files lie with the job",
    "threads": "the server shares its processors out",
    "trust_remote_code": "the server decides that by its own settings",
}
_FIELDS: Mapping[Literal["train", "eval"], str] = {"train": "training_file", "eval": "validation_file"}
_ALWAYS_SENT = ("learning_rate", "num_train_epochs", "per_device_train_batch_size")  # the server would choose them


def train_there(
    recipe: "Recipe",
    auto: Sequence[str],
    *,
    display: TrainDisplay,
    url: str,
    api_key: str | None,
    home: Path | None,
    suffix: str | None,
) -> int:
    """Upload the recipe's data, create a job, and show it to its end. Gives the command's exit status."""
    from ...finetune.recipe.checks import require_data

    with explained():
        require_data(recipe, train=bool(recipe.dataset), validation=bool(recipe.eval_dataset))
    if recipe.streaming:
        raise CliError("streaming reads rows while it trains, and a server has to be sent them; leave it out.")
    tuning, notices = tuning_of(recipe, auto)
    for notice in notices:
        say(f"Note: {notice}")
    with Client(url, api_key) as client:
        display.message("Reading and checking the data ...")
        files = _upload(client, recipe, home)
        body: dict[str, Any] = {
            "model": recipe.adapter_name_or_path or recipe.model_name_or_path,
            "seed": recipe.seed,
            "tuning": tuning,
            "integrations": [{"type": name, name: {}} for name in recipe.report_to],
            **files,
        } | ({"suffix": suffix} if suffix else {})
        job = client.call("POST", path_of("fine_tuning", "jobs"), json=body)
        display.message(f"The job {job['id']} is created; it goes on when this command ends.")
        return watch(client, job["id"], display)


def watch(client: Client, job_id: str, display: TrainDisplay) -> int:
    """Show a job to its end. Ctrl-C ends the watching only."""
    try:
        follow(client, job_id, display)
        job = client.call("GET", path_of("fine_tuning", "jobs", job_id))
    except KeyboardInterrupt:
        display.close()
        display.message(
            f"The job goes on. `tuneloop jobs logs -f {job_id}` shows it again, `tuneloop jobs pause {job_id}` saves "
            f"and stops it, `tuneloop jobs cancel {job_id}` ends it."
        )
        return CANCELLED
    display.close()
    if job["status"] == "succeeded":
        name = job["fine_tuned_model"]
        display.message(f"The new model answers now. Try: tuneloop chat --model {name}")
        display.result(name)
        return 0
    if job["status"] == "failed":
        raise CliError((job.get("error") or {}).get("message") or f"The job {job_id} failed.")
    display.message(f"The job {job_id} is {job['status']}.", "warn")
    return CANCELLED


def tuning_of(recipe: "Recipe", auto: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The request's `tuning`, and notices of what of the recipe a server does in its own way."""
    from ...finetune.recipe.recipe import Recipe
    from ...finetune.recipe.request import FORBIDDEN

    given = recipe.model_dump(mode="json")
    standard = Recipe(model_name_or_path=recipe.model_name_or_path).model_dump(mode="json")
    tuning = {}
    notices = []
    for key, value in given.items():
        if key in auto:
            tuning[key] = "auto"
        elif key in _ALWAYS_SENT:
            tuning[key] = value
        elif value == standard[key] or key in _HERE:
            continue
        elif key in _WITHOUT_EFFECT:
            notices.append(f"{key} has no effect on a server: {_WITHOUT_EFFECT[key]}.")
        elif key not in FORBIDDEN:
            tuning[key] = value
    return tuning, notices


def _upload(client: Client, recipe: "Recipe", home: Path | None) -> dict[str, str]:
    from ...finetune.data.read import has_rows, read_rows
    from ...finetune.run_folder import RunSpec

    settings = read_settings(home, None)
    spec = RunSpec(recipe=recipe, base_name="", model_path=Path("/"), home=settings.home)
    ids: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="tuneloop-") as folder, explained():
        for split, field in _FIELDS.items():
            if not has_rows(spec, split):
                continue
            path = Path(folder) / f"{split}.jsonl"
            with path.open("w", encoding="utf-8") as out:
                for row in read_rows(spec, split):
                    out.write(json.dumps(as_line(row), ensure_ascii=False) + "\n")
            with path.open("rb") as stream:
                upload = {"file": (path.name, stream, "application/jsonl")}
                answer = client.call("POST", path_of("files"), data={"purpose": "fine-tune"}, files=upload)
            ids[field] = answer["id"]
    return ids


def as_line(row: "Row") -> dict[str, Any]:
    """A row as one object of a JSONL file in OpenAI's form."""
    if row.text is not None:
        return {"text": row.text}
    line: dict[str, Any] = {"messages": [dict(message) for message in row.messages]}
    return line | ({"tools": [dict(tool) for tool in row.tools]} if row.tools else {})
