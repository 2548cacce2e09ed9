"""`tuneloop jobs`: the fine-tuning jobs of a running server."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from .client import DEFAULT_URL, Client, Json, Key, Url, path_of
from .console import console, print_json, print_table
from .train_display import facts, open_display

app = typer.Typer(help="Fine-tuning jobs of a running server.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(metavar="JOB", help="Its id, ftjob-...", show_default=False)]
_PAGE = 100


@app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option("--limit", min=1, help="At most so many, the newest.")] = 20,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Show jobs, newest first."""
    with Client(url, api_key) as client:
        jobs = list(_pages(client, path_of("fine_tuning", "jobs"), limit))
    if as_json:
        print_json(jobs)
        return
    columns = ("JOB", "STATUS", "MODEL", "STEP", "RESULT", "CREATED")
    rows = [
        (job["id"], _state(job), job["model"], _step(job), job["fine_tuned_model"], _when(job["created_at"]))
        for job in jobs
    ]
    print_table(columns, rows, empty="The server has no jobs.")


@app.command("show")
def show_job(job_id: Id, as_json: Json = False, url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """Show what a job is, how far it is, and how it ended."""
    with Client(url, api_key) as client:
        job = client.call("GET", path_of("fine_tuning", "jobs", job_id))
    _print_job(job, as_json)


@app.command("logs")
def job_logs(
    job_id: Id,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="What the trainer's processes printed instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as one line of JSON.")] = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Show a job's events, oldest first."""
    with Client(url, api_key) as client:
        if raw:
            for block in client.stream_bytes(path_of("fine_tuning", "jobs", job_id, "log")):
                typer.echo(block, nl=False)
        elif follow:
            raise typer.Exit(_follow(client, job_id, as_json))
        else:
            for event in reversed(list(_pages(client, path_of("fine_tuning", "jobs", job_id, "events")))):
                if as_json:
                    typer.echo(json.dumps(event, ensure_ascii=False))
                else:
                    console().print(_when(event["created_at"]), _text(event), soft_wrap=True)


def _follow(client: Client, job_id: str, as_json: bool) -> int:
    from .train_remote import watch

    display = open_display(as_json=as_json)
    try:
        return watch(client, job_id, display)
    finally:
        display.close()


@app.command("events")
def job_events(
    job_id: Id,
    limit: Annotated[int, typer.Option("--limit", min=1, help="At most so many, the newest.")] = 20,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Show a job's newest events as a table, newest first."""
    with Client(url, api_key) as client:
        events = list(_pages(client, path_of("fine_tuning", "jobs", job_id, "events"), limit))
    if as_json:
        print_json(events)
        return
    rows = [(_when(event["created_at"]), event["level"], event["type"], _text(event)) for event in events]
    print_table(("TIME", "LEVEL", "TYPE", "MESSAGE"), rows, empty="The job has no events yet.")


@app.command("checkpoints")
def job_checkpoints(job_id: Id, as_json: Json = False, url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """Show a job's checkpoints; each can be used as a model."""
    with Client(url, api_key) as client:
        found = list(_pages(client, path_of("fine_tuning", "jobs", job_id, "checkpoints")))
    if as_json:
        print_json(found)
        return
    rows = [
        (
            checkpoint["step_number"],
            checkpoint["fine_tuned_model_checkpoint"],
            _number(checkpoint["metrics"].get("train_loss")),
            _number(checkpoint["metrics"].get("valid_loss")),
            _when(checkpoint["created_at"]),
        )
        for checkpoint in found
    ]
    print_table(("STEP", "MODEL", "LOSS", "VALID", "CREATED"), rows, empty="The job has no checkpoints yet.")


@app.command("cancel")
def cancel_job(job_id: Id, as_json: Json = False, url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """End a job for good. Its checkpoints stay."""
    _change("cancel", job_id, as_json, url, api_key)


@app.command("pause")
def pause_job(job_id: Id, as_json: Json = False, url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """Save a checkpoint and stop, until the job is resumed."""
    _change("pause", job_id, as_json, url, api_key)


@app.command("resume")
def resume_job(job_id: Id, as_json: Json = False, url: Url = DEFAULT_URL, api_key: Key = None) -> None:
    """Go on with a paused job."""
    _change("resume", job_id, as_json, url, api_key)


def _change(action: str, job_id: str, as_json: bool, url: str, api_key: str | None) -> None:
    with Client(url, api_key) as client:
        job = client.call("POST", path_of("fine_tuning", "jobs", job_id, action))
    if as_json:
        print_json(job)
    else:
        console().print(f"{job['id']}: {_state(job)}", soft_wrap=True)


def _pages(client: Client, path: str, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """The objects of a list, page by page, up to `limit`."""
    after: str | None = None
    left = limit
    while left is None or left > 0:
        params: dict[str, Any] = {"limit": _PAGE if left is None else min(left, _PAGE)}
        page = client.call("GET", path, params=params | ({"after": after} if after else {}))
        yield from page["data"]
        if not page["has_more"] or not page["data"]:
            return
        after = page["data"][-1]["id"]
        left = None if left is None else left - len(page["data"])


def _print_job(job: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(job)
        return
    out = console()
    out.print(f"{job['id']}: {_state(job)}, trains {job['model']}", soft_wrap=True)
    lines = {
        "result": job["fine_tuned_model"],
        "error": (job.get("error") or {}).get("message"),
        "step": _step(job),
        "progress": facts(job.get("progress") or {}),
        "trained tokens": job["trained_tokens"],
        "training file": job["training_file"],
        "validation file": job["validation_file"],
        "created": _when(job["created_at"]),
        "finished": _when(job["finished_at"]),
        "tuning": ", ".join(f"{key}={value}" for key, value in (job.get("tuning") or {}).items()),
    }
    for label, value in lines.items():
        if value:
            out.print(f"  {label}: {value}", soft_wrap=True)


def _state(job: dict[str, Any]) -> str:
    return "paused" if job.get("paused") else str(job["status"])


def _step(job: dict[str, Any]) -> str | None:
    progress = job.get("progress") or {}
    if progress.get("step") is None:
        return None
    total = progress.get("total_steps")
    return f"{progress['step']}/{total}" if total else str(progress["step"])


def _text(event: dict[str, Any]) -> str:
    measures = facts(event.get("data") or {}) if event["type"] == "metrics" else ""
    return f"step {event['data']['step']}  {measures}" if measures else str(event["message"])


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _when(seconds: int | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
