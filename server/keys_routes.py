"""Routes of /v1/api_keys: make, list and revoke keys, with the admin scope."""

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from .auth import require
from .keys import KeyInfo, Scope
from .services import Services, get_services

router = APIRouter(prefix="/v1/api_keys", tags=["keys"], dependencies=[Depends(require("admin"))])
WithServices = Annotated[Services, Depends(get_services)]


class CreateKeyRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)

    name: str = Field(min_length=1)
    scopes: list[Scope] = Field(default=["infer"], min_length=1)
    expires_at: AwareDatetime | None = None  # ISO 8601 with a zone, or seconds since the epoch
    rpm_limit: int | None = Field(default=None, ge=1)
    allowed_models: list[str] | None = None


class KeyCard(BaseModel):
    """What may be shown of a key. Times are seconds since the epoch."""

    id: str
    object: Literal["api_key"] = "api_key"
    name: str
    prefix: str
    scopes: list[str]
    allowed_models: list[str] | None
    rpm_limit: int | None
    created_at: int
    expires_at: int | None
    revoked_at: int | None
    last_used_at: int | None


class NewKeyCard(KeyCard):
    """The one answer that holds the secret."""

    key: str


class KeyList(BaseModel):
    object: Literal["list"] = "list"
    data: list[KeyCard]


@router.get("")
async def list_keys(services: WithServices) -> KeyList:
    """All keys without their secrets, revoked ones too."""
    return KeyList(data=[KeyCard(**_fields(key)) for key in await services.keys.list()])


@router.post("")
async def create_key(body: CreateKeyRequest, services: WithServices) -> NewKeyCard:
    """A new key. Its secret is in this answer and nowhere else. From the first key on, requests need one."""
    secret, key = await services.keys.create(
        body.name,
        scopes=body.scopes,
        expires_at=body.expires_at,
        rpm_limit=body.rpm_limit,
        allowed_models=body.allowed_models,
    )
    return NewKeyCard(key=secret, **_fields(key))


@router.delete("/{key_id}")
async def revoke_key(key_id: str, services: WithServices) -> KeyCard:
    """Revoke a key: it works no more, here at once, in other replicas within seconds."""
    return KeyCard(**_fields(await services.keys.revoke(key_id)))


def _fields(key: KeyInfo) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "prefix": key.prefix,
        "scopes": list(key.scopes),
        "allowed_models": None if key.allowed_models is None else list(key.allowed_models),
        "rpm_limit": key.rpm_limit,
        "created_at": int(key.created_at.timestamp()),
        "expires_at": _seconds(key.expires_at),
        "revoked_at": _seconds(key.revoked_at),
        "last_used_at": _seconds(key.last_used_at),
    }


def _seconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())
