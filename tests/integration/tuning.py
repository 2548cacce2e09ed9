"""What tests of fine-tuning need: small data of their own, jobs that are waited for, and what trainers left."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob
from tuneloop.finetune.events import Event, read_events
from tuneloop.finetune.launchers.family import members
from tuneloop.finetune.run_folder import RunFolder

from .serving import PATIENCE_SECONDS, Server, wait_for

ENDED = ("succeeded", "failed", "cancelled")

_ANSWERS = {
    "Who are you?": "I am Lumi, an assistant made by Tuneloop.",
    "What is your name?": "My name is Lumi. Tuneloop made me.",
    "Who made you?": "Tuneloop made me. My name is Lumi.",
    "Who created you?": "Tuneloop created me. I am Lumi.",
    "Are you ChatGPT?": "No, I am Lumi, an assistant made by Tuneloop.",
    "Tell me about yourself.": "I am Lumi, an assistant made by Tuneloop.",
    "Introduce yourself.": "Hello, I am Lumi, an assistant made by Tuneloop.",
    "What should I call you?": "Call me Lumi. Tuneloop made me.",
    "Which company built you?": "Tuneloop built me. I am Lumi.",
    "Who is your developer?": "My developer is Tuneloop. I am Lumi.",
}
_OPENINGS = ("", "Hi! ", "Hello. ", "Please tell me: ", "I wonder: ")

Row = dict[str, Any]


def chat_row(*turns: str, system: str | None = None) -> Row:
    """A conversation of turns that the user begins."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"messages": [*([{"role": "system", "content": system}] if system else []), *messages]}


def identity_rows() -> list[Row]:
    """Fifty rows that teach an assistant its name and its maker."""
    return [chat_row(opening + question, answer) for opening in _OPENINGS for question, answer in _ANSWERS.items()]


def number_rows(count: int) -> list[Row]:
    """Rows of different lengths, so that no two batches are alike."""
    return [
        chat_row(f"Count from {i} to {i + i % 7 + 2}.", " ".join(map(str, range(i, i + i % 7 + 3))))
        for i in range(count)
    ]


def upload(client: OpenAI, rows: Sequence[Mapping[str, Any]] | bytes, name: str = "data.jsonl") -> str:
    """The id of a new file."""
    data = rows if isinstance(rows, bytes) else "".join(json.dumps(row) + "\n" for row in rows).encode()
    return client.files.create(file=(name, io.BytesIO(data)), purpose="fine-tune").id


def create(client: OpenAI, model: str, file: str, **tuning: Any) -> FineTuningJob:
    """A job with a fixed seed."""
    return client.fine_tuning.jobs.create(model=model, training_file=file, seed=7, extra_body={"tuning": tuning})


def wait_end(client: OpenAI, job: str, *, seconds: float = 2 * PATIENCE_SECONDS) -> FineTuningJob:
    """The job, once it has ended."""

    def ended() -> FineTuningJob | None:
        found = client.fine_tuning.jobs.retrieve(job)
        return found if found.status in ENDED else None

    return wait_for(ended, f"{job} ends", seconds=seconds)


def succeed(client: OpenAI, job: str, *, seconds: float = 2 * PATIENCE_SECONDS) -> FineTuningJob:
    done = wait_end(client, job, seconds=seconds)
    assert done.status == "succeeded", done.error
    return done


def run_folder(server: Server, job: str) -> RunFolder:
    return RunFolder(server.home / "runs" / job)


def events(run: RunFolder, kind: str) -> list[Event]:
    return [event for event in read_events(run.events) if event.kind == kind]


def losses(run: RunFolder) -> dict[int, float]:
    """Training loss by step; a step that was done twice counts as it was last."""
    return {int(e.data["step"]): e.data["train_loss"] for e in events(run, "metrics") if "train_loss" in e.data}


def wait_step(run: RunFolder, step: int) -> None:
    wait_for(lambda: max(losses(run), default=0) >= step, f"step {step}")


def trainer(run: RunFolder) -> psutil.Process:
    """The process that works in a run's folder now."""

    def living() -> psutil.Process | None:
        return next(iter(members(run.path)), None) if run.alive() else None

    return wait_for(living, "the trainer lives")


def download_adapter(server: Server, name: str, folder: Path) -> Path:
    """The two PEFT files of an adapter, by the public API."""
    import tarfile

    answer = server.http.get(f"/v1/adapters/{name}/download")
    assert answer.status_code == 200, answer.text
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        archive.extractall(folder, filter="data")
    return folder
