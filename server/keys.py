"""API keys: made, listed, revoked and checked. Only SHA-256 digests are stored; the secret is shown once.

A secret holds 256 random bits, so a plain hash is as good as a slow one: there is nothing to guess.
Lookups are cached for a few seconds, so that another process (the CLI, a second replica) may make or revoke keys.
"""

import hashlib
import hmac
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal, get_args

from sqlalchemy import exists, select, update

from ..storage import Database
from ..storage.errors import AuthenticationFailed, InvalidInput, NotFound
from ..storage.tables import ApiKey

Scope = Literal["infer", "tune", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

CACHE_SECONDS = 5.0  # how long a revoked key may still pass in another process than the one that revoked it
_PREFIX_LENGTH = 11  # "tl-" and 8 characters: enough to tell keys apart in a list, useless to an attacker
_TOUCH_EVERY = timedelta(minutes=1)


@dataclass(frozen=True, kw_only=True)
class KeyInfo:
    """What may be shown of a key. `allowed_models` None: every model; `rpm_limit` None: no limit."""

    id: str
    name: str
    prefix: str
    scopes: tuple[str, ...]
    allowed_models: tuple[str, ...] | None
    rpm_limit: int | None
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None


class Keys:
    """The keys of one database, beside the admin key that may be given from outside (`TUNELOOP_API_KEY`)."""

    def __init__(self, database: Database, *, admin_key: str | None = None) -> None:
        self._database = database
        self._admin_hash = _digest(admin_key) if admin_key else None
        self._cache: dict[str, tuple[float, KeyInfo]] = {}
        self._any_until = 0.0
        self._any = False

    async def required(self) -> bool:
        """Whether requests need a key: as soon as one exists, or was given from outside."""
        if self._admin_hash is not None:
            return True
        if time.monotonic() >= self._any_until:
            async with self._database.transaction(read_only=True) as session:
                self._any = bool(await session.scalar(select(exists(select(ApiKey.id)))))
            self._any_until = time.monotonic() + CACHE_SECONDS
        return self._any

    async def create(
        self,
        name: str,
        *,
        scopes: Sequence[str] = ("infer",),
        expires_at: datetime | None = None,
        rpm_limit: int | None = None,
        allowed_models: Sequence[str] | None = None,
    ) -> tuple[str, KeyInfo]:
        """Make a key. The secret is returned once and cannot be had again. Raises InvalidInput for unknown scopes."""
        _check(name, scopes, rpm_limit)
        secret = f"tl-{secrets.token_urlsafe(32)}"
        row = ApiKey(
            id=f"key_{secrets.token_hex(8)}",
            name=name,
            prefix=secret[:_PREFIX_LENGTH],
            hash=_digest(secret),
            scopes=sorted(set(scopes), key=lambda scope: SCOPES.index(scope)),
            created_at=datetime.now(UTC),
            expires_at=expires_at,
            revoked_at=None,
            last_used_at=None,
            rpm_limit=rpm_limit,
            allowed_models=None if allowed_models is None else list(allowed_models),
        )
        info = _info(row)
        async with self._database.transaction() as session:
            session.add(row)
        self._any_until = 0.0
        return secret, info

    async def list(self) -> list[KeyInfo]:
        """All keys, revoked ones too, oldest first."""
        async with self._database.transaction(read_only=True) as session:
            rows = await session.scalars(select(ApiKey).order_by(ApiKey.created_at))
            return [_info(row) for row in rows]

    async def revoke(self, key_id: str) -> KeyInfo:
        """End a key for good; doing it again changes nothing. Raises NotFound."""
        async with self._database.transaction() as session:
            row = await session.get(ApiKey, key_id)
            if row is None:
                raise NotFound(f"There is no API key with the id '{key_id}'. List the keys to see their ids.")
            row.revoked_at = row.revoked_at or datetime.now(UTC)
            info = _info(row)
        self._cache.clear()
        return info

    def is_admin_key(self, secret: str) -> bool:
        """Whether it is the key given from outside."""
        return self._admin_hash is not None and hmac.compare_digest(_digest(secret), self._admin_hash)

    async def verify(self, secret: str) -> KeyInfo:
        """The key behind a secret. Raises AuthenticationFailed if it is unknown, revoked or expired."""
        digest = _digest(secret)
        cached = self._cache.get(digest)
        if cached is None or time.monotonic() >= cached[0]:
            self._cache.pop(digest, None)
            info = await self._lookup(digest)
            self._cache[digest] = (time.monotonic() + CACHE_SECONDS, info)
        else:
            info = cached[1]
        if info.expires_at is not None and info.expires_at <= datetime.now(UTC):
            raise AuthenticationFailed(
                f"The API key '{info.prefix}…' has expired. Ask the administrator for a new one."
            )
        return info

    async def _lookup(self, digest: str) -> KeyInfo:
        async with self._database.transaction(read_only=True) as session:
            row = await session.scalar(select(ApiKey).where(ApiKey.hash == digest))
        if row is None or row.revoked_at is not None or not hmac.compare_digest(row.hash, digest):
            raise AuthenticationFailed(
                "The API key is unknown or revoked. Send `Authorization: Bearer <key>` with a key of this server."
            )
        now = datetime.now(UTC)
        if row.last_used_at is None or now - row.last_used_at > _TOUCH_EVERY:
            async with self._database.transaction() as session:
                await session.execute(update(ApiKey).where(ApiKey.id == row.id).values(last_used_at=now))
        return _info(row)


def _check(name: str, scopes: Sequence[str], rpm_limit: int | None) -> None:
    if not name.strip():
        raise InvalidInput("The key's name is empty. Give it one that says who uses it.", param="name")
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        wrong = f"The scope '{unknown[0]}' is not known" if unknown else "The key has no scope"
        raise InvalidInput(f"{wrong}. The scopes are {', '.join(SCOPES)}.", param="scopes")
    if rpm_limit is not None and rpm_limit < 1:
        raise InvalidInput("rpm_limit must be at least 1 request a minute, or absent for no limit.", param="rpm_limit")


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _info(row: ApiKey) -> KeyInfo:
    return KeyInfo(
        id=row.id,
        name=row.name,
        prefix=row.prefix,
        scopes=tuple(row.scopes),
        allowed_models=None if row.allowed_models is None else tuple(row.allowed_models),
        rpm_limit=row.rpm_limit,
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        last_used_at=row.last_used_at,
    )
