"""From a request's body to a published version: reads the form or the JSON, then calls the service."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from ...adapters.base import AdapterVersion
from ...storage.errors import InvalidInput
from ..errors import invalid_input
from ..multipart import Upload, receive_upload
from ..services import Services
from .archive_stream import FILES
from .protocol import CreateRequest, ReplaceRequest
from .service import Target

Body = TypeVar("Body", bound=BaseModel)
Check = Callable[[str], None]
_INSTEAD = ", or JSON with a `source`"
_FORM_FIELDS = frozenset({"name", "base"})
_HOW = "Send one archive (tar.gz or zip) as `file`, or adapter_config.json and adapter_model.safetensors as two files."


async def create(request: Request, services: Services, check_name: Check) -> AdapterVersion:
    """POST /v1/adapters: a form with `name`, `base` and files, or JSON with `name`, `base` and `source`."""
    if _is_json(request):
        body = await _json(request, CreateRequest)
        check_name(body.name)
        target = Target(name=body.name, base=body.base, expect="new")
        return await services.publisher.add_source(body.source, target)
    return await _from_form(request, services, None, check_name)


async def replace(request: Request, services: Services, name: str) -> AdapterVersion:
    """PUT /v1/adapters/{name}: the same without `name`, which the path says."""
    services.publisher.check(Target(name=name, expect="existing"))
    if _is_json(request):
        body = await _json(request, ReplaceRequest)
        return await services.publisher.add_source(body.source, Target(name=name, base=body.base, expect="existing"))
    return await _from_form(request, services, name, lambda _: None)


async def _from_form(request: Request, services: Services, name: str | None, check_name: Check) -> AdapterVersion:
    async with services.publisher.staging() as staging:
        folder = staging / "upload"
        await asyncio.to_thread(folder.mkdir)
        upload = await receive_upload(
            request.stream(), request.headers.get("content-type", ""), folder, instead=_INSTEAD
        )
        target = _target(upload.fields, name)
        check_name(target.name)
        archive = await asyncio.to_thread(_arrange, upload, staging / "files")
        if archive is not None:
            return await services.publisher.add_archive(archive, target)
        return await services.publisher.add_folder(staging / "files", target)


def _target(fields: dict[str, str], name: str | None) -> Target:
    unknown = sorted(fields.keys() - _FORM_FIELDS)
    if unknown:
        raise InvalidInput(
            f"The form field '{unknown[0]}' is not known here. The fields are name, base and file.", param=unknown[0]
        )
    given = fields.get("name") or None
    if name is not None and given not in (None, name):
        raise InvalidInput(f"The form says the name is '{given}', the path says '{name}'. Leave it out.", param="name")
    if name is None and given is None:
        raise InvalidInput("The field 'name' is missing. Give the adapter a name.", param="name")
    return Target(
        name=name or given or "", base=fields.get("base") or None, expect="new" if name is None else "existing"
    )


def _arrange(upload: Upload, folder: Path) -> Path | None:
    """The archive that came, or None after the two PEFT files were put into `folder`."""
    by_field = {"adapter_config": FILES[0], "adapter_model": FILES[1]}
    for file in upload.files:
        if file.field not in ("file", *by_field):
            raise InvalidInput(f"The form file '{file.field}' is not known here. {_HOW}", param=file.field)
    names = [by_field.get(file.field, file.filename) for file in upload.files]
    if sorted(names) == list(FILES):
        folder.mkdir()
        for name, file in zip(names, upload.files, strict=True):
            file.path.rename(folder / name)
        return None
    if len(names) == 1 and names[0] not in FILES:
        return upload.files[0].path
    shown = ", ".join(f"'{name}'" for name in names) or "no file"
    raise InvalidInput(f"The form holds {shown}. {_HOW}", param="file")


def _is_json(request: Request) -> bool:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"


async def _json(request: Request, kind: type[Body]) -> Body:
    try:
        return kind.model_validate_json(await request.body())
    except ValidationError as error:
        raise invalid_input(error) from error
