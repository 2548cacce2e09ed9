"""Routes of /v1/adapters. Names may hold `/` and `:`, as they are or percent-encoded."""

import asyncio
import itertools
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import StreamingResponse

from ...adapters.base import AdapterVersion
from ...storage.errors import NotFound
from ..auth import Principal, require
from ..services import Services, get_services
from . import intake, paths
from .archive_stream import tar_gz
from .protocol import (
    AdapterCard,
    AdapterList,
    AliasCard,
    AliasList,
    AliasRequest,
    Deleted,
    RollbackRequest,
    VersionCard,
    VersionList,
    adapter_card,
    alias_card,
    version_card,
)

paths.register()
router = APIRouter(prefix="/v1/adapters", tags=["adapters"])
WithServices = Annotated[Services, Depends(get_services)]
Reader = Annotated[Principal, Depends(require("infer", "tune"))]
Tuner = Annotated[Principal, Depends(require("tune"))]
ONE = "/{name:adapter}"


@router.get("")
async def list_adapters(services: WithServices, caller: Reader, base: str | None = None) -> AdapterList:
    """All adapters that the caller may use, or those of one base model."""
    adapters = services.adapters.list(base=base)
    return AdapterList(data=[adapter_card(adapter) for adapter in adapters if caller.may_use(adapter.name)])


@router.post("")
async def create_adapter(request: Request, services: WithServices, caller: Tuner) -> AdapterCard:
    """A new adapter, live when this answers. Form: `name`, `base`, `file`; or JSON: `name`, `base`, `source`."""
    version = await intake.create(request, services, caller.check_model)
    return adapter_card(services.adapters.get(version.name))


@router.get(ONE)
async def retrieve_adapter(name: str, services: WithServices, caller: Reader) -> AdapterCard:
    """One adapter with the numbers of its versions and its aliases."""
    caller.check_model(name)
    return adapter_card(services.adapters.get(name))


@router.put(ONE)
async def replace_adapter(name: str, request: Request, services: WithServices, caller: Tuner) -> AdapterCard:
    """A new version, live when this answers; running requests finish on the old one. Form `file`, or JSON `source`."""
    caller.check_model(name)
    await intake.replace(request, services, name)
    return adapter_card(services.adapters.get(name))


@router.delete(ONE)
async def delete_adapter(name: str, services: WithServices, caller: Tuner) -> Deleted:
    """Delete an adapter with all its versions and aliases. Requests in flight finish."""
    caller.check_model(name)
    await services.adapters.delete(name)
    return Deleted(id=name, object="adapter")


@router.get(ONE + "/versions")
async def list_versions(name: str, services: WithServices, caller: Reader) -> VersionList:
    """All versions, newest last."""
    caller.check_model(name)
    return VersionList(data=[version_card(version) for version in services.adapters.get(name).versions])


@router.get(ONE + "/versions/{version}")
async def retrieve_version(name: str, version: int, services: WithServices, caller: Reader) -> VersionCard:
    """One version, with its targets and metrics."""
    caller.check_model(name)
    return version_card(_version(services, name, version))


@router.delete(ONE + "/versions/{version}")
async def delete_version(name: str, version: int, services: WithServices, caller: Tuner) -> Deleted:
    """Delete one version. 409 while an alias points to it."""
    caller.check_model(name)
    await services.adapters.delete_version(name, version)
    return Deleted(id=f"{name}@{version}", object="adapter.version")


@router.get(ONE + "/versions/{version}/download")
async def download_version(name: str, version: int, services: WithServices, caller: Reader) -> StreamingResponse:
    """The two PEFT files of one version as a tar.gz."""
    caller.check_model(name)
    return await _download(services, _version(services, name, version))


@router.get(ONE + "/download")
async def download_adapter(
    name: str, services: WithServices, caller: Reader, version: int | None = None
) -> StreamingResponse:
    """The two PEFT files as a tar.gz: of the version that the bare name means, or of `?version=`."""
    caller.check_model(name)
    found = services.adapters.resolve(name) if version is None else _version(services, name, version)
    return await _download(services, found)


@router.get(ONE + "/aliases")
async def list_aliases(name: str, services: WithServices, caller: Reader) -> AliasList:
    """All aliases; `default` is what the bare name means."""
    caller.check_model(name)
    return AliasList(data=[alias_card(alias) for alias in services.adapters.get(name).aliases])


@router.get(ONE + "/aliases/{alias}")
async def retrieve_alias(name: str, alias: str, services: WithServices, caller: Reader) -> AliasCard:
    """Where one alias points."""
    caller.check_model(name)
    return _alias(services, name, alias)


@router.put(ONE + "/aliases/{alias}")
async def set_alias(name: str, alias: str, body: AliasRequest, services: WithServices, caller: Tuner) -> AliasCard:
    """Point an alias to a `version`, or split its traffic by `weights`. Requests in flight finish where they are."""
    caller.check_model(name)
    return alias_card(await services.adapters.set_alias(name, alias, body.resolved()))


@router.delete(ONE + "/aliases/{alias}")
async def delete_alias(name: str, alias: str, services: WithServices, caller: Tuner) -> Deleted:
    """Delete an alias; its versions stay."""
    caller.check_model(name)
    await services.adapters.delete_alias(name, alias)
    return Deleted(id=f"{name}@{alias}", object="adapter.alias")


@router.post(ONE + "/rollback")
async def rollback_adapter(
    name: str, services: WithServices, caller: Tuner, body: RollbackRequest | None = None
) -> AliasCard:
    """Point an alias (`default` if none is named) back to where it was before. 409 if it never was elsewhere."""
    caller.check_model(name)
    alias = body.alias if body is not None else RollbackRequest().alias
    return alias_card(await services.adapters.rollback(name, alias))


@router.post(ONE + "/pin")
async def pin_adapter(name: str, services: WithServices, caller: Tuner) -> AdapterCard:
    """Pin an adapter: the weights that its bare name means stay in memory from now on."""
    caller.check_model(name)
    for number in services.adapters.get(name).default_weights:
        await services.registry.warm(_version(services, name, number))
    return adapter_card(await services.adapters.pin(name, True))


@router.post(ONE + "/unpin")
async def unpin_adapter(name: str, services: WithServices, caller: Tuner) -> AdapterCard:
    """Let an adapter leave memory again when others need the room."""
    caller.check_model(name)
    return adapter_card(await services.adapters.pin(name, False))


def _version(services: Services, name: str, number: int) -> AdapterVersion:
    versions = services.adapters.get(name).versions
    found = next((version for version in versions if version.version == number), None)
    if found is None:
        raise NotFound(f"The adapter '{name}' has no version {number}. GET /v1/adapters/{name}/versions lists them.")
    return found


def _alias(services: Services, name: str, alias: str) -> AliasCard:
    found = next((a for a in services.adapters.get(name).aliases if a.alias == alias), None)
    if found is None:
        raise NotFound(f"The adapter '{name}' has no alias '{alias}'. GET /v1/adapters/{name}/aliases lists them.")
    return alias_card(found)


async def _download(services: Services, version: AdapterVersion) -> StreamingResponse:
    async with services.adapters.hold(version):
        folder = await services.adapters.materialise(version)
        stream = tar_gz(folder, int(version.created_at.timestamp()))
        first = await asyncio.to_thread(next, stream)  # opens the files: from here on a deletion does not matter
    filename = f"{version.name}-{version.version}.tar.gz".replace("/", "-").replace(":", "-")
    return StreamingResponse(
        itertools.chain([first], stream),
        media_type="application/gzip",
        headers={"Content-Disposition": f'attachment; filename="{filename}"'},
    )
