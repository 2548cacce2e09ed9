"""Downloads data files from the Hugging Face hub, ModelScope or a bucket. Blocking; it reads no rows.

Hubs keep their own caches, which other tools share; what comes from a bucket is kept in a folder of the home. One
process asks a hub for a revision once, so that all its passes read the same commit.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...storage.errors import InvalidInput, NotFound, PermissionDenied, TuneloopError, Unavailable
from ...storage.full_disk import full_disk_named
from ..run_folder import DataFile
from .kinds import is_data_file
from .repository_files import choose_files

BUCKETS = {
    "s3": "tuneloop[s3]", "s3a": "tuneloop[s3]", "gs": "gcsfs", "gcs": "gcsfs",
    "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "oss": "ossfs",
}  # fmt: skip


@lru_cache(maxsize=64)
def fetch_hub(
    repository: str,
    revision: str | None,
    *,
    subset: str | None = None,
    split: str = "train",
    folder: str | None = None,
) -> tuple[DataFile, ...]:
    """The files of one split of a data set repository. The hub's own settings (HF_ENDPOINT, HF_TOKEN, HF_HOME) hold."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # isort: skip
    from huggingface_hub.errors import HfHubHTTPError

    source = f"hf:{repository}" + (f"@{revision}" if revision else "")
    with _reported(source):
        try:
            info = HfApi().dataset_info(repository, revision=revision)
        except HfHubHTTPError:
            raise
        except (HTTPError, OfflineModeIsEnabled):
            try:
                kept = snapshot_download(repository, repo_type="dataset", revision=revision, local_files_only=True)
            except LocalEntryNotFoundError as error:
                raise Unavailable(
                    f"The Hugging Face hub cannot be reached, and {source} is not in its local cache. Check the "
                    "network, set HF_ENDPOINT to a mirror, or give a local file."
                ) from error
            return files_of_folder(Path(kept), source, subset=subset, split=split, folder=folder)

        def fetch(path: str) -> Path:
            return Path(hf_hub_download(repository, path, repo_type="dataset", revision=info.sha))

        names = [sibling.rfilename for sibling in info.siblings or []]
        card = fetch("README.md") if "README.md" in names else None
        chosen = choose_files(names, card, source, subset=subset, split=split, folder=folder)
        return tuple(DataFile(path=str(fetch(name)), name=f"{source}/{name}") for name in chosen)


@lru_cache(maxsize=64)
def fetch_modelscope(
    repository: str,
    revision: str | None,
    *,
    subset: str | None = None,
    split: str = "train",
    folder: str | None = None,
) -> tuple[DataFile, ...]:
    """The same for ModelScope, by its SDK (extra `modelscope`)."""
    source = f"ms:{repository}" + (f"@{revision}" if revision else "")
    try:
        from modelscope import dataset_snapshot_download
    except ImportError as error:
        raise InvalidInput(
            f"{source} needs ModelScope's SDK: pip install 'tuneloop[modelscope]' ({error}).", param="dataset"
        ) from error
    options = {"revision": revision} if revision else {}
    with _reported(source):
        kept = dataset_snapshot_download(repository, **options)
    return files_of_folder(Path(kept), source, subset=subset, split=split, folder=folder)


def files_of_folder(
    root: Path, source: str, *, subset: str | None, split: str, folder: str | None
) -> tuple[DataFile, ...]:
    """Those of a repository's files that lie in a folder already."""
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    card = root / "README.md"
    chosen = choose_files(names, card if card.is_file() else None, source, subset=subset, split=split, folder=folder)
    return tuple(DataFile(path=str(root / name), name=f"{source}/{name}") for name in chosen)


def fetch_bucket(url: str, cache: Path) -> tuple[DataFile, ...]:
    """A file, or the data files at the top of a folder; what has not changed is not fetched again."""
    from fsspec.core import url_to_fs

    protocol = url.partition("://")[0]
    try:
        filesystem, root = url_to_fs(url)
    except ImportError as error:
        raise InvalidInput(
            f"{url} needs a package that is not installed: pip install '{BUCKETS.get(protocol, protocol)}'.",
            param="dataset",
        ) from error
    with _reported(url):
        paths = sorted(filesystem.ls(root, detail=False)) if filesystem.isdir(root) else [root]
        chosen = [path for path in paths if len(paths) == 1 or is_data_file(path)]
        if not chosen:
            raise NotFound(f"{url} has no data files.", param="dataset")
        return tuple(_keep(filesystem, path, url, cache) for path in chosen)


def _keep(filesystem: Any, path: str, url: str, cache: Path) -> DataFile:
    name = path.rsplit("/", 1)[-1]
    key = hashlib.sha256(f"{url}\0{path}\0{filesystem.ukey(path)}".encode()).hexdigest()[:24]
    target = cache / key / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{name}.{os.getpid()}")
        try:
            with filesystem.open(path, "rb") as remote, aside.open("wb") as local:
                shutil.copyfileobj(remote, local, 1024 * 1024)
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)
    return DataFile(path=str(target), name=url if url.endswith(name) else f"{url.rstrip('/')}/{name}")


@contextmanager
def _reported(source: str) -> Iterator[None]:
    """Turn the errors of a hub or bucket into ours. Each client has a tree of its own, so all but ours are caught."""
    try:
        with full_disk_named("the cache of data sets"):
            yield
    except TuneloopError:
        raise
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, PermissionError) or status in (401, 403):
            raise PermissionDenied(
                f"{source} may not be read without credentials (a name that does not exist may get the same answer). "
                "Check the spelling, accept the data set's terms on its page, or set the hub's token.",
                param="dataset",
            ) from error
        if isinstance(error, FileNotFoundError) or status == 404:
            raise NotFound(f"{source} does not exist. Check the spelling and the revision.", param="dataset") from error
        raise Unavailable(
            f"{source} could not be fetched ({type(error).__name__}: {error}). Try again, or give a local file.",
            param="dataset",
        ) from error
