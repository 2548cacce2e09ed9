"""From an upload's form to a stored file. It knows the form, not what is inside the file."""

import asyncio
import re
from datetime import UTC, datetime, timedelta

from fastapi import Request

from ...storage.errors import InvalidInput, PermissionDenied
from ...storage.files import FileStore, StoredFile
from ..auth import Principal
from ..multipart import Upload, UploadedFile, receive_upload
from .protocol import TUNING_PURPOSES, UPLOAD_PURPOSES

_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_FIELDS = frozenset({"purpose", _ANCHOR, _SECONDS})
_NUMBER = re.compile(r"[0-9]{1,9}")
_MOST_NAME_CHARACTERS = 255
_LEAST_SECONDS, _MOST_SECONDS = 3600, 30 * 24 * 3600


async def receive_file(request: Request, files: FileStore, caller: Principal) -> StoredFile:
    """POST /v1/files. Raises InvalidInput with the field at fault, PermissionDenied, TooLarge, StorageFull."""
    async with files.staging() as folder:
        upload = await receive_upload(request.stream(), request.headers.get("content-type", ""), folder)
        purpose = _purpose(upload)
        check_purpose(purpose, caller)
        expires_at = _expires_at(upload)
        sent = _the_file(upload)
        if await asyncio.to_thread(lambda: sent.path.stat().st_size) == 0:
            raise InvalidInput(f"The file '{sent.filename}' is empty. Send one that holds something.", param="file")
        return await files.add(sent.path, filename=sent.filename, purpose=purpose, expires_at=expires_at)


def check_purpose(purpose: str, caller: Principal) -> None:
    """Files to train on are for keys that may train."""
    if purpose in TUNING_PURPOSES and not caller.has("tune"):
        raise PermissionDenied(f"Files of the purpose '{purpose}' need a key with the scope tune.", param="purpose")


def _the_file(upload: Upload) -> UploadedFile:
    if len(upload.files) != 1 or upload.files[0].field != "file":
        given = ", ".join(f"'{file.field}'" for file in upload.files) or "no file"
        raise InvalidInput(f"The form holds {given}. Send one file, as the field 'file'.", param="file")
    sent = upload.files[0]
    if not sent.filename or len(sent.filename) > _MOST_NAME_CHARACTERS or not sent.filename.isprintable():
        raise InvalidInput(
            f"The file's name must have 1 to {_MOST_NAME_CHARACTERS} printable characters. Send it with another name.",
            param="file",
        )
    return sent


def _purpose(upload: Upload) -> str:
    if "file" in upload.fields:
        raise InvalidInput(
            "The field 'file' came as text, without a filename. Send it as a file: curl -F file=@data.jsonl.",
            param="file",
        )
    unknown = sorted(upload.fields.keys() - _FIELDS)
    if unknown:
        raise InvalidInput(
            f"The form field '{unknown[0]}' is not known here. The fields are file, purpose, {_ANCHOR} and {_SECONDS}.",
            param=unknown[0],
        )
    purpose = upload.fields.get("purpose")
    if not purpose:
        raise InvalidInput(
            f"The field 'purpose' is missing. It is one of {', '.join(UPLOAD_PURPOSES)}.", param="purpose"
        )
    if purpose not in UPLOAD_PURPOSES:
        raise InvalidInput(
            f"'{purpose}' is no purpose that a file may be sent for. The purposes are {', '.join(UPLOAD_PURPOSES)}.",
            param="purpose",
        )
    return purpose


def _expires_at(upload: Upload) -> datetime | None:
    anchor, seconds = upload.fields.get(_ANCHOR), upload.fields.get(_SECONDS)
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidInput("The field 'expires_after[anchor]' must be 'created_at'.", param=_ANCHOR)
    if seconds is None or not _NUMBER.fullmatch(seconds) or not _LEAST_SECONDS <= int(seconds) <= _MOST_SECONDS:
        raise InvalidInput(
            f"The field 'expires_after[seconds]' must be a whole number from {_LEAST_SECONDS} to {_MOST_SECONDS}.",
            param=_SECONDS,
        )
    return datetime.now(UTC) + timedelta(seconds=int(seconds))
