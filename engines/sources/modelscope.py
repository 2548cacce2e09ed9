"""Fetches checkpoints from ModelScope into ModelScope's own cache, by its SDK (extra `modelscope`)."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...storage.errors import InvalidInput, Unavailable
from .base import FetchContext, FetchProgress, ModelSource, ProgressCallback
from .checkpoint import check_checkpoint
from .hub import UNWANTED, WANTED


class ModelScopeSource(ModelSource):
    """`sdk` gives the SDK's `snapshot_download` and its errors; tests give their own."""

    def __init__(self, *, sdk: Callable[[], "Sdk"] | None = None) -> None:
        self._sdk = sdk or load_sdk

    def fetch(self, location: str, context: FetchContext) -> Path:
        sdk = self._sdk()
        repo, _, revision = location.partition("@")
        try:
            folder = sdk.download(
                repo,
                revision=revision or None,
                allow_patterns=WANTED,
                ignore_patterns=UNWANTED,
                progress_callbacks=[_reporter(context.progress, f"Downloading {repo}")],
            )
        except sdk.errors as error:
            raise Unavailable(
                f"ModelScope did not deliver {location}: {error}. Check the name and the network."
            ) from error
        check_checkpoint(Path(folder))
        return Path(folder)


@dataclass(frozen=True, kw_only=True)
class Sdk:
    download: Callable[..., str]
    errors: tuple[type[Exception], ...]


def load_sdk() -> Sdk:
    """Raises InvalidInput, naming the extra, when the SDK is not installed."""
    try:
        from modelscope import snapshot_download
        from modelscope.hub.errors import HubError
    except ImportError as error:
        raise InvalidInput(
            f"ModelScope sources need its SDK: pip install 'tuneloop[modelscope]' ({error}).", param="source"
        ) from error
    return Sdk(download=snapshot_download, errors=(HubError, ValueError, OSError))


def _reporter(progress: ProgressCallback, message: str) -> type[Any]:
    """A callback class, as the SDK wants it: made once a file, its sums are shared by all files of the fetch."""
    lock = threading.Lock()
    sums = {"done": 0, "total": 0}

    class Reporter:
        def __init__(self, filename: str, file_size: int) -> None:
            self._add("total", file_size)

        def update(self, size: int) -> None:
            self._add("done", size)

        def end(self) -> None:
            """The SDK calls it after each file; the sums already have everything."""

        def _add(self, which: str, size: int) -> None:
            with lock:
                sums[which] += size
                progress(FetchProgress(message=message, done_bytes=sums["done"], total_bytes=sums["total"]))

    return Reporter
