"""Who may do what: reads the bearer key, checks its scope, and hands routes a Principal."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from ..storage.errors import AuthenticationFailed, PermissionDenied
from .keys import SCOPES, KeyInfo, Scope
from .services import Services, get_services


@dataclass(frozen=True, kw_only=True)
class Principal:
    """The caller. Scopes are explicit: `tune` does not include `infer`; `admin` may do everything."""

    id: str
    name: str
    scopes: frozenset[str]
    allowed_models: frozenset[str] | None = None  # None: every model

    def has(self, *scopes: Scope) -> bool:
        """Whether one of the scopes, or admin, is held."""
        return "admin" in self.scopes or not self.scopes.isdisjoint(scopes)

    def may_use(self, ref: str) -> bool:
        """Whether the key may name this model: an allowed `support` covers `support@3`, a base covers no adapter."""
        return self.allowed_models is None or not self.allowed_models.isdisjoint({ref, ref.partition("@")[0]})

    def check_model(self, ref: str) -> None:
        """Raises PermissionDenied unless the key may use the model."""
        if not self.may_use(ref):
            raise PermissionDenied(
                f"This API key may not use the model '{ref}'. Ask the administrator to allow it.", param="model"
            )


ANYONE = Principal(id="anonymous", name="anonymous", scopes=frozenset(SCOPES))  # while no key exists
_ADMIN = Principal(id="admin", name="TUNELOOP_API_KEY", scopes=frozenset({"admin"}))


def require(*scopes: Scope) -> Callable[..., Awaitable[Principal]]:
    """A dependency that lets a request pass if its key holds one of the scopes (or admin)."""

    async def authorise(request: Request, services: Annotated[Services, Depends(get_services)]) -> Principal:
        principal = await authenticate(request, services)
        if not principal.has(*scopes):
            raise PermissionDenied(
                f"This API key lacks the scope {' or '.join(scopes)}; it has {', '.join(sorted(principal.scopes))}. "
                "Use a key that has it."
            )
        return principal

    return authorise


async def authenticate(request: Request, services: Services) -> Principal:
    """The caller behind the Authorization header. Raises AuthenticationFailed, or Overloaded past the key's quota."""
    if not await services.keys.required():
        return ANYONE
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    secret = secret.strip()
    if scheme.lower() != "bearer" or not secret:
        raise AuthenticationFailed("This server needs an API key. Send it as `Authorization: Bearer <key>`.")
    if services.keys.is_admin_key(secret):
        return _ADMIN
    key = await services.keys.verify(secret)
    if key.rpm_limit is not None:
        services.quota.take(key.id, key.rpm_limit)
    return _principal(key)


def _principal(key: KeyInfo) -> Principal:
    return Principal(
        id=key.id,
        name=key.name,
        scopes=frozenset(key.scopes),
        allowed_models=None if key.allowed_models is None else frozenset(key.allowed_models),
    )
