"""Fetches checkpoints from the Hugging Face hub into the hub's own cache, which other tools share.

`org/name`, `org/name@revision`, or `org/name/file.gguf` for one GGUF file of a repository.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from ...storage.errors import InvalidInput, NotFound, PermissionDenied, TuneloopError, Unavailable
from .base import FetchContext, FetchProgress, ModelSource
from .checkpoint import check_checkpoint, missing_weights_advice
from .gguf import GgufSource
from .hub_progress import reporting_bar

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py"]
# The same weights again, in forms that are not served.
UNWANTED = ["original/*", "consolidated*", "onnx/*", "openvino/*", "coreml/*", "checkpoint-*/*"]


class HubSource(ModelSource):
    """`endpoint` and `cache_dir` are huggingface_hub's own defaults (HF_ENDPOINT, HF_HOME) unless given."""

    def __init__(self, *, endpoint: str | None = None, cache_dir: Path | None = None) -> None:
        self._endpoint = endpoint
        self._cache_dir = cache_dir

    def fetch(self, location: str, context: FetchContext) -> Path:
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

        # Which httpx the hub's client uses depends on its version; its own error class says it.
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # isort: skip

        repo, _, revision = location.partition("@")
        try:
            if repo.endswith(".gguf"):
                return self._fetch_gguf(repo, revision or None, context)
            try:
                self._check_listing(repo, revision or None, context)
                return self._fetch_snapshot(repo, revision or None, context)
            except HfHubHTTPError:
                raise
            except (HTTPError, OfflineModeIsEnabled):
                context.progress(FetchProgress(message=f"The hub cannot be reached: looking for {repo} in its cache"))
                return self._fetch_snapshot(repo, revision or None, context, local_files_only=True)
        except HfHubHTTPError as error:
            raise _explain(error, location) from error
        except (HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
            raise Unavailable(
                f"The Hugging Face hub cannot be reached, and {location} is not complete in the local cache. Check the "
                "network, set HF_ENDPOINT to a mirror, or give a local folder."
            ) from error

    def _check_listing(self, repo: str, revision: str | None, context: FetchContext) -> None:
        """Refuse, before the first byte of weights, what could not be served afterwards."""
        from huggingface_hub import HfApi

        info = HfApi(endpoint=self._endpoint, token=context.hub_token).model_info(repo, revision=revision)
        names = {sibling.rfilename for sibling in info.siblings or []}
        if "config.json" not in names and "adapter_config.json" in names:
            raise InvalidInput(
                f"{repo} holds an adapter, not a base model. Serve its base model, and add the adapter with "
                "`tuneloop adapters add`.",
                param="source",
            )
        if not any(name.endswith(".safetensors") for name in names):
            raise InvalidInput(f"{repo} has no safetensors weights. {missing_weights_advice(names)}", param="source")

    def _fetch_snapshot(
        self, repo: str, revision: str | None, context: FetchContext, *, local_files_only: bool = False
    ) -> Path:
        from huggingface_hub import snapshot_download

        folder = Path(
            snapshot_download(
                repo,
                revision=revision,
                endpoint=self._endpoint,
                cache_dir=self._cache_dir,
                token=context.hub_token,
                allow_patterns=WANTED,
                ignore_patterns=UNWANTED,
                tqdm_class=reporting_bar(context.progress, f"Downloading {repo}"),
                local_files_only=local_files_only,
            )
        )
        check_checkpoint(folder)
        return folder

    def _fetch_gguf(self, location: str, revision: str | None, context: FetchContext) -> Path:
        from huggingface_hub import hf_hub_download

        organisation, name, filename = location.split("/", 2)
        file = hf_hub_download(
            f"{organisation}/{name}",
            filename,
            revision=revision,
            endpoint=self._endpoint,
            cache_dir=self._cache_dir,
            token=context.hub_token,
            tqdm_class=reporting_bar(context.progress, f"Downloading {filename}"),
        )
        return GgufSource().fetch(file, context)


def _explain(error: "HfHubHTTPError", location: str) -> TuneloopError:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = error.response.status_code
    if isinstance(error, GatedRepoError) or status in (401, 403):
        return PermissionDenied(
            f"The hub refuses {location} without a token that may read it. Check the spelling (a name that "
            "does not exist gets the same answer), accept the model's terms on its page, and set TUNELOOP_HUB_TOKEN.",
            param="source",
        )
    if isinstance(error, RevisionNotFoundError):
        return NotFound(f"hf:{location}: the repository has no such revision.", param="source")
    if isinstance(error, EntryNotFoundError):
        return NotFound(f"hf:{location}: the repository has no such file.", param="source")
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return NotFound(f"The Hugging Face hub has no model {location}. Check the spelling.", param="source")
    return Unavailable(f"The Hugging Face hub answered {status} for {location}. Try again later.")
