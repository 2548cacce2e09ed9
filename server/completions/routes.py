"""The route of completions."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from ..auth import Principal, require
from ..disconnect import json_response
from ..services import Services, get_services
from ..sse import sse_response
from .protocol import CompletionRequest
from .service import CompletionService

router = APIRouter(tags=["generation"])


@router.post("/v1/completions", response_model=None)
async def create_completion(
    body: CompletionRequest,
    request: Request,
    services: Annotated[Services, Depends(get_services)],
    principal: Annotated[Principal, Depends(require("infer"))],
) -> Response:
    """OpenAI's completion of one or several prompts, as one object or (stream: true) as server-sent events."""
    principal.check_model(body.model)
    service = CompletionService(
        services.registry, services.metrics, timeout_seconds=services.settings.request_timeout_seconds
    )
    if body.stream:
        return await sse_response(request, service.events(body))
    return await json_response(request, service.complete(body))
