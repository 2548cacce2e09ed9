"""Wire types of /v1/files, as OpenAI has them. Times are seconds since the epoch."""

from typing import Literal

from pydantic import BaseModel

from ...storage.files import StoredFile

UPLOAD_PURPOSES = ("fine-tune", "batch", "assistants", "vision", "user_data", "evals")  # what clients may send
TUNING_PURPOSES = ("fine-tune", "fine-tune-results")  # for keys with the scope tune only
Purpose = Literal[
    "fine-tune", "fine-tune-results", "batch", "batch_output", "assistants", "assistants_output", "vision", "user_data",
    "evals",
]  # fmt: skip


class FileCard(BaseModel):
    """`status` is always `processed`: what a file holds is checked by whoever uses it."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: None = None


class FileList(BaseModel):
    """One page; the next one is asked for with `after` = `last_id`."""

    object: Literal["list"] = "list"
    data: list[FileCard]
    has_more: bool
    first_id: str | None
    last_id: str | None


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


def file_card(file: StoredFile) -> FileCard:
    return FileCard(
        id=file.id,
        bytes=file.size_bytes,
        created_at=int(file.created_at.timestamp()),
        expires_at=None if file.expires_at is None else int(file.expires_at.timestamp()),
        filename=file.filename,
        purpose=file.purpose,
    )
