"""The route of chat completions."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from ..auth import Principal, require
from ..disconnect import json_response
from ..services import Services, get_services
from ..sse import sse_response
from .protocol import ChatCompletionRequest
from .service import ChatService

router = APIRouter(tags=["generation"])


@router.post("/v1/chat/completions", response_model=None)
async def create_chat_completion(
    body: ChatCompletionRequest,
    request: Request,
    services: Annotated[Services, Depends(get_services)],
    principal: Annotated[Principal, Depends(require("infer"))],
) -> Response:
    """OpenAI's chat completion, as one object or (stream: true) as server-sent events."""
    principal.check_model(body.model)
    service = ChatService(
        services.registry,
        services.metrics,
        timeout_seconds=services.settings.request_timeout_seconds,
        trust_chat_template=services.settings.trust_request_chat_template,
    )
    if body.stream:
        return await sse_response(request, service.events(body))
    return await json_response(request, service.complete(body))
