"""Routes of /v1/files. A key without the scope tune neither sees nor sends files to train on."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import StreamingResponse

from ...storage.files import StoredFile, no_file
from ..auth import Principal, require
from ..services import Services, get_services
from .content import content
from .intake import receive_file
from .protocol import TUNING_PURPOSES, FileCard, FileDeleted, FileList, Purpose, file_card

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
    """Files by age, newest first unless `order` says `asc`; the next page begins after the id `after`."""
    hidden = () if caller.has("tune") else TUNING_PURPOSES
    found, more = await services.files.list(purpose=purpose, without=hidden, after=after, limit=limit, order=order)
    first, last = (found[0].id, found[-1].id) if found else (None, None)
    return FileList(data=[file_card(file) for file in found], has_more=more, first_id=first, last_id=last)


@router.get("/{file_id}")
async def retrieve_file(file_id: str, services: WithServices, caller: Caller) -> FileCard:
    """One file's card."""
    return file_card(await _file(file_id, services, caller))


@router.delete("/{file_id}")
async def delete_file(file_id: str, services: WithServices, caller: Caller) -> FileDeleted:
    """Delete a file. Whoever reads it reads on; jobs have a copy of theirs."""
    file = await _file(file_id, services, caller)
    await services.files.delete(file.id)
    return FileDeleted(id=file.id)


@router.get("/{file_id}/content", response_class=StreamingResponse)
async def file_content(file_id: str, request: Request, services: WithServices, caller: Caller) -> StreamingResponse:
    """The bytes, or the part that a `Range` header asks for."""
    return await content(services.files, await _file(file_id, services, caller), request.headers)


async def _file(file_id: str, services: Services, caller: Principal) -> StoredFile:
    file = await services.files.get(file_id)
    if file.purpose in TUNING_PURPOSES and not caller.has("tune"):
        raise no_file(file_id)
    return file
