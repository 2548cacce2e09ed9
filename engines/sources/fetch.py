"""Fetches a base model without blocking the event loop or importing what a fetch needs: a worker process does it."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, cast

from ...storage import errors
from ...storage.errors import TuneloopError, Unavailable
from .base import FetchedModel, FetchProgress, ProgressCallback
from .cache import ModelCache
from .folder import open_folder
from .gguf import gguf_identity
from .spec import SourceSpec, parse_source

_END_SECONDS = 5.0
_QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}


def find_model(spec: str, home: Path) -> FetchedModel | None:
    """The model of a source if it is complete on this machine: no network, no hashing, no heavy import.

    Blocking, but only a few small reads. Raises InvalidInput for an unknown form, NotFound or InvalidInput for a local
    path that does not exist or is no model.
    """
    source = parse_source(spec)
    path = _find(source, home)
    return None if path is None else FetchedModel(path=path, source=source.text)


def _find(source: SourceSpec, home: Path) -> Path | None:
    if source.kind == "folder":
        return open_folder(source.location)
    return ModelCache(home).find(gguf_identity(source.location) if source.kind == "gguf" else source.text)


async def fetch_model(
    spec: str,
    home: Path,
    progress: ProgressCallback | None = None,
    *,
    hub_token: str | None = None,
    refresh: bool = False,
) -> FetchedModel:
    """Return the checkpoint folder of a source, fetching and converting what is missing.

    `refresh` asks the source again even if the model is here (a branch of a hub may have moved). Cancelling ends the
    worker; the next call goes on from what it left. Raises InvalidInput, NotFound, PermissionDenied and Unavailable
    as `ModelSource.fetch` does, and Unavailable when the worker itself dies.
    """
    source = parse_source(spec)
    found = None if refresh and source.kind != "folder" else _find(source, home)
    if found is not None:
        return FetchedModel(path=found, source=source.text)
    request = {"spec": source.text, "home": str(home), "hub_token": hub_token}
    return FetchedModel(path=await _run_worker(request, progress), source=source.text)


async def _run_worker(request: dict[str, str | None], progress: ProgressCallback | None) -> Path:
    worker = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        f"{__package__}.worker",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **_QUIET},
        start_new_session=True,  # its own process group, so that ending it ends pip too
    )
    stdin = cast(asyncio.StreamWriter, worker.stdin)
    stdout = cast(asyncio.StreamReader, worker.stdout)
    complaints = asyncio.create_task(_last_line(cast(asyncio.StreamReader, worker.stderr)))
    try:
        stdin.write(json.dumps(request).encode() + b"\n")
        stdin.close()
        async for line in stdout:
            message: dict[str, Any] = json.loads(line)
            if "path" in message:
                return Path(message["path"])
            if "error" in message:
                raise _rebuild(message["error"])
            if progress is not None:
                progress(FetchProgress(**message["progress"]))
        raise Unavailable(f"Fetching {request['spec']} failed: {await complaints or 'its worker died'}.")
    finally:
        await asyncio.shield(_end(worker))
        complaints.cancel()


async def _last_line(stream: asyncio.StreamReader) -> str:
    """Drain the stream, so that the worker never waits on it, and keep the last thing it said."""
    last = ""
    while block := await stream.read(1 << 16):
        lines = (last + block.decode(errors="replace")).split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
    return last.strip().removesuffix(".")


async def _end(worker: asyncio.subprocess.Process) -> None:
    if worker.returncode is None:
        _signal(worker.pid, signal.SIGTERM)
    try:
        await asyncio.wait_for(worker.wait(), _END_SECONDS)
    except TimeoutError:
        _signal(worker.pid, signal.SIGKILL)
        await worker.wait()


def _signal(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return  # it has just ended by itself


def _rebuild(facts: dict[str, Any]) -> TuneloopError:
    kind: type[TuneloopError] = getattr(errors, facts["type"], Unavailable)
    return kind(facts["message"], param=facts.get("param"), code=facts.get("code"))
