"""Routes of /v1/files. A key without the scope tune neither sees nor sends files to train on."""

from typing import Annotated, Literal
from urllib.parse import quote

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import StreamingResponse

from ...storage.errors import NotFound
from ...storage.files import StoredFile
from ..auth import Principal, require
from ..services import Services, get_services
from .intake import check_purpose, receive_file
from .protocol import FileCard, FileDeleted, FileList, Purpose, file_card

router = APIRouter(prefix="/v1/files", tags=["files"])
WithServices = Annotated[Services, Depends(get_services)]
Caller = Annotated[Principal, Depends(require("infer", "tune"))]
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string"},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer"},
                    },
                }
            }
        },
    }
}


@router.post("", openapi_extra=_FORM)
async def create_file(request: Request, services: WithServices, caller: Caller) -> FileCard:
    """Upload a file. It streams to disk and into the store; a form that breaks off leaves nothing."""
    return file_card(await receive_file(request, services.files, caller))


@router.get("")
async def list_files(
    services: WithServices,
    caller: Caller,
    purpose: Purpose | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> FileList:
    """Files by age."""
    found, more = await services.files.list(purpose=purpose, after=after, limit=limit, order=order)
    cards = [file_card(file) for file in found if _may_see(file, caller)]
    first, last = (found[0].id, found[-1].id) if found else (None, None)
    return FileList(data=cards, has_more=more, first_id=first, last_id=last)


@router.get("/{file_id}")
async def retrieve_file(file_id: str, services: WithServices, caller: Caller) -> FileCard:
    """One file's card."""
    return file_card(await _file(file_id, services, caller))


@router.delete("/{file_id}")
async def delete_file(file_id: str, services: WithServices, caller: Caller) -> FileDeleted:
    """Delete a file. Whoever reads it reads on; jobs have a copy of theirs."""
    file = await _file(file_id, services, caller)
    check_purpose(file.purpose, caller)
    await services.files.delete(file_id)
    return FileDeleted(id=file_id)


@router.get("/{file_id}/content", response_class=StreamingResponse)
async def file_content(file_id: str, services: WithServices, caller: Caller) -> StreamingResponse:
    """The bytes."""
    file = await _file(file_id, services, caller)
    return StreamingResponse(
        services.files.open(file),
        media_type="application/octet-stream",
        headers={
            "Content-Length": str(file.size_bytes),
            "Content-Disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
        },
    )


async def _file(file_id: str, services: Services, caller: Principal) -> StoredFile:
    file = await services.files.get(file_id)
    if not _may_see(file, caller):
        raise NotFound(f"There is no file '{file_id}'.", param="file_id")
    return file


def _may_see(file: StoredFile, caller: Principal) -> bool:
    return caller.has("tune") or not file.purpose.startswith("fine-tune")
