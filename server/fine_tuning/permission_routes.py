"""Routes of /v1/fine_tuning/checkpoints: OpenAI's permissions, by which a project may use a checkpoint.

They are kept and given back; who may use a model here is decided by API keys (`allowed_models`).
"""

from typing import Annotated, Literal

from fastapi import APIRouter, Query

from .cards import Page, PermissionCard, PermissionDeleted, page, permission_card
from .protocol import GrantRequest
from .routes import After, Jobs, Limit, WithServices

router = APIRouter(prefix="/v1/fine_tuning/checkpoints", tags=["fine-tuning"])
ALL = "/{checkpoint:path}/permissions"  # a name may hold `/`, as its base model's does


@router.post(ALL)
async def grant_permissions(
    checkpoint: str, body: GrantRequest, services: WithServices, jobs: Jobs
) -> Page[PermissionCard]:
    """Let projects use a checkpoint. A project that may already keeps its permission."""
    await jobs.check_checkpoint(checkpoint)
    granted = await services.jobs.grant(checkpoint, body.project_ids)
    return page([permission_card(permission) for permission in granted], False)


@router.get(ALL)
async def list_permissions(
    checkpoint: str,
    services: WithServices,
    jobs: Jobs,
    after: After = None,
    limit: Limit = 10,
    order: Annotated[Literal["ascending", "descending"], Query()] = "descending",
    project_id: Annotated[str | None, Query()] = None,
) -> Page[PermissionCard]:
    """The permissions of a checkpoint, newest first, or those of one project."""
    await jobs.check_checkpoint(checkpoint)
    found, more = await services.jobs.permissions(checkpoint, project=project_id, after=after, limit=limit, order=order)
    return page([permission_card(permission) for permission in found], more)


@router.delete(ALL + "/{permission_id}")
async def revoke_permission(
    checkpoint: str, permission_id: str, services: WithServices, jobs: Jobs
) -> PermissionDeleted:
    """Take a permission back."""
    await jobs.check_checkpoint(checkpoint)
    await services.jobs.revoke(checkpoint, permission_id)
    return PermissionDeleted(id=permission_id)
