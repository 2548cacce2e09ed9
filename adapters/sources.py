"""Fetches an adapter that a request names by path, hub repository or bucket URL, into a folder. It validates nothing.

/data/adapters/support, file:///data/...   a folder or archive under an allowed root    origin "path"
org/name, hf:org/name, ...@revision        the Hugging Face hub                          origin "hub"
ms:org/name, ms:org/name@revision          ModelScope                                    origin "modelscope"
s3://..., gs://..., az://..., oss://...    a folder or archive in a bucket               origin "bucket"
"""

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ..storage.errors import InvalidInput
from .base import AdapterLimits, Origin
from .files import shown
from .local_source import copy_local
from .remote_sources import BUCKET_PROTOCOLS, download_bucket, download_hub, download_modelscope

_REPOSITORY = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(?P<revision>[\w./-]{1,200}))?", re.ASCII
)
_SECRET = re.compile(r"[^/@]*:[^/@]*@")
_MAX_SOURCE = 4096


async def fetch(
    source: str, dest: Path, *, roots: Sequence[Path], limits: AdapterLimits, hub_token: str | None = None
) -> tuple[Origin, str]:
    """Put the adapter's two files into the existing, empty folder `dest`.

    `roots` are the only folders that paths may lie in, after all links are followed. Returns the kind of source and the
    exact place (with the revision that a hub gave, so that the same bytes can be found again).

    Raises InvalidInput (a source of no known kind, a missing extra, an unfit file), PermissionDenied (outside the
    roots, or a repository that needs a token), NotFound, TooLarge, Unavailable (the hub or bucket failed).
    """
    if not source or len(source) > _MAX_SOURCE or not source.isprintable():
        raise InvalidInput(
            "source is empty, too long or not printable; give a path, repository or URL.", param="source"
        )
    if source.startswith("/") or source.lower().startswith("file:"):
        path = await asyncio.to_thread(copy_local, _local_path(source), dest, roots, limits)
        return "path", str(path)
    protocol, separator, place = source.partition("://")
    if separator:
        if _SECRET.match(place):
            raise InvalidInput(
                "source has a password in its URL, which would be stored and shown; give the server its credentials by "
                "its environment.",
                param="source",
            )
        if protocol not in BUCKET_PROTOCOLS or "::" in source:
            raise InvalidInput(
                f"source {shown(source)} has a protocol that adapters are not loaded from; use one of "
                f"{', '.join(f'{name}://' for name in BUCKET_PROTOCOLS)}, a path, or a repository.",
                param="source",
            )
        return "bucket", await asyncio.to_thread(download_bucket, source, dest, limits)
    if source.startswith("ms:"):
        repository, revision = _repository(source, source.removeprefix("ms:"))
        return "modelscope", await asyncio.to_thread(download_modelscope, repository, revision, dest, limits)
    repository, revision = _repository(source, source.removeprefix("hf:"))
    return "hub", await asyncio.to_thread(download_hub, repository, revision, dest, limits, hub_token)


def _local_path(source: str) -> Path:
    if source.startswith("/"):
        return Path(source)
    url = urlsplit(source)
    if url.netloc not in ("", "localhost") or not url.path.startswith("/") or url.query or url.fragment:
        raise InvalidInput(
            f"source {shown(source)} is not a local file URL; write it as file:///folder/adapter.", param="source"
        )
    path = unquote(url.path)
    if not path.isprintable():
        raise InvalidInput(f"source {shown(source)} is not printable; give the plain path.", param="source")
    return Path(path)


def _repository(source: str, text: str) -> tuple[str, str | None]:
    match = _REPOSITORY.fullmatch(text)
    if match is None or ".." in text:
        raise InvalidInput(
            f"source {shown(source)} is neither an absolute path, nor a repository as org/name or org/name@revision, "
            "nor a bucket URL.",
            param="source",
        )
    return match["id"], match["revision"]
