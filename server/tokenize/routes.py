"""The routes of /tokenize and /detokenize."""

from typing import Annotated

from fastapi import APIRouter, Depends

from ..auth import Principal, require
from ..services import Services, get_services
from .protocol import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from .service import TokenizeService

router = APIRouter(tags=["tokens"])


def _service(services: Annotated[Services, Depends(get_services)]) -> TokenizeService:
    return TokenizeService(services.registry, trust_chat_template=services.settings.trust_request_chat_template)


@router.post("/tokenize")
async def tokenize(
    body: TokenizeRequest,
    service: Annotated[TokenizeService, Depends(_service)],
    principal: Annotated[Principal, Depends(require("infer"))],
) -> TokenizeResponse:
    """The token ids of a text or a chat."""
    model = service.model_or_only(body.model)
    principal.check_model(model)
    return await service.tokenize(model, body)


@router.post("/detokenize")
async def detokenize(
    body: DetokenizeRequest,
    service: Annotated[TokenizeService, Depends(_service)],
    principal: Annotated[Principal, Depends(require("infer"))],
) -> DetokenizeResponse:
    """The text of token ids."""
    model = service.model_or_only(body.model)
    principal.check_model(model)
    return await service.detokenize(model, body)
