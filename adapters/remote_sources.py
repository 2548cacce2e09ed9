"""Downloads an adapter's two files from the Hugging Face hub, ModelScope or a bucket. Blocking."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..storage.errors import InvalidInput, NotFound, PermissionDenied, TuneloopError, Unavailable
from ..storage.full_disk import full_disk_named
from .archive import unpack
from .base import AdapterLimits
from .files import ADAPTER_FILES, CONFIG_NAME, WEIGHTS_NAME, refuse_pickle, shown, too_many_bytes, write_new

# Protocols that lead to object stores and nowhere else, by the package that speaks them.
BUCKET_PROTOCOLS = {
    "s3": "tuneloop[s3]",
    "s3a": "tuneloop[s3]",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "oss": "ossfs",
}
_ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")


def download_hub(repository: str, revision: str | None, dest: Path, limits: AdapterLimits, token: str | None) -> str:
    """Both files of one commit of a Hugging Face repository. Returns `hf:org/name@commit`."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    with _reported(f"hf:{repository}"), tempfile.TemporaryDirectory(dir=dest, prefix=".hub-") as aside:
        commit = revision
        for name in ADAPTER_FILES:
            try:
                facts = get_hf_file_metadata(hf_hub_url(repository, name, revision=commit), token=token or False)
            except _hub_errors().RemoteEntryNotFoundError:
                raise _missing_in_hub(repository, commit, name, token) from None
            _check_size(name, facts.size, limits)
            commit = facts.commit_hash or commit
            path = hf_hub_download(repository, name, revision=commit, local_dir=aside, token=token or False)
            _take(Path(path), dest / name, limits)
    return f"hf:{repository}" + (f"@{commit}" if commit else "")


def download_modelscope(repository: str, revision: str | None, dest: Path, limits: AdapterLimits) -> str:
    """Both files of a ModelScope repository. Returns `ms:org/name[@revision]`."""
    try:
        from modelscope.hub.file_download import model_file_download
    except ImportError as error:
        raise InvalidInput(
            "source names a ModelScope repository, but the package modelscope is not installed on the server: "
            "pip install 'tuneloop[modelscope]'.",
            param="source",
        ) from error

    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    with _reported(f"ms:{repository}"), tempfile.TemporaryDirectory(dir=dest, prefix=".hub-") as aside:
        for name in ADAPTER_FILES:
            path = model_file_download(model_id=repository, file_path=name, local_dir=aside, **options)
            _take(Path(path), dest / name, limits)
    return f"ms:{repository}" + (f"@{revision}" if revision else "")


def download_bucket(url: str, dest: Path, limits: AdapterLimits) -> str:
    """Both files of a folder in a bucket, or an archive (told by its name). Returns the URL."""
    from fsspec.core import url_to_fs

    protocol = url.partition("://")[0]
    try:
        filesystem, root = url_to_fs(url)
    except ImportError as error:
        raise InvalidInput(
            f"source is a {protocol}:// URL, which needs a package that is not installed on the server: "
            f"pip install '{BUCKET_PROTOCOLS[protocol]}'.",
            param="source",
        ) from error

    with _reported(url):
        if url.lower().endswith(_ARCHIVE_SUFFIXES):
            with tempfile.TemporaryDirectory(dir=dest, prefix=".bucket-") as aside:
                _copy_object(filesystem, root, Path(aside) / "archive", limits)
                unpack(Path(aside) / "archive", dest, limits)
        else:
            for name in ADAPTER_FILES:
                _copy_object(filesystem, f"{root.rstrip('/')}/{name}", dest / name, limits)
    return url


def _copy_object(filesystem: Any, path: str, target: Path, limits: AdapterLimits) -> None:
    _check_size(target.name, filesystem.info(path).get("size"), limits)
    with filesystem.open(path, "rb") as source:
        write_new(target, source, max_bytes=limits.max_bytes)


def _take(downloaded: Path, target: Path, limits: AdapterLimits) -> None:
    _check_size(target.name, downloaded.stat().st_size, limits)
    shutil.move(downloaded, target)


def _check_size(name: str, size: int | None, limits: AdapterLimits) -> None:
    if size is not None and size > limits.max_bytes:
        raise too_many_bytes(name, limits.max_bytes)


def _hub_errors() -> Any:
    from huggingface_hub import errors

    return errors


def _missing_in_hub(repository: str, revision: str | None, name: str, token: str | None) -> TuneloopError:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    missing = NotFound(
        f"source hf:{repository} has no {name}; an adapter needs {CONFIG_NAME} and {WEIGHTS_NAME}.", param="source"
    )
    if name != WEIGHTS_NAME:
        return missing
    try:
        get_hf_file_metadata(hf_hub_url(repository, "adapter_model.bin", revision=revision), token=token or False)
    except _hub_errors().RemoteEntryNotFoundError:
        return missing
    return refuse_pickle("adapter_model.bin")


@contextmanager
def _reported(source: str) -> Iterator[None]:
    """Turn the errors of a hub or bucket into ours. Each client has a tree of its own, so all but ours are caught."""
    errors = _hub_errors()
    try:
        with full_disk_named("the server's home"):
            yield
    except TuneloopError:
        raise
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        missing = (errors.RepositoryNotFoundError, errors.RemoteEntryNotFoundError, FileNotFoundError)
        offline = isinstance(error, errors.LocalEntryNotFoundError)  # a FileNotFoundError, but says: no connection
        if isinstance(error, (errors.GatedRepoError, PermissionError)) or status == 403:
            raise PermissionDenied(
                f"source {shown(source)} may not be read with this server's credentials; give it a token that may.",
                param="source",
            ) from error
        if (isinstance(error, missing) and not offline) or status == 404:
            raise NotFound(
                f"source {shown(source)} does not exist, or lacks {CONFIG_NAME} or {WEIGHTS_NAME}, or is private and "
                "needs a token.",
                param="source",
            ) from error
        raise Unavailable(
            f"source {shown(source)} could not be fetched ({type(error).__name__}); try again, or upload the files.",
            param="source",
        ) from error
