"""Routes of /v1/models. Ids may hold `/`, `:` and `@`, as they are or percent-encoded."""

from typing import Annotated

from fastapi import APIRouter, Depends

from ...storage.errors import NotFound, PermissionDenied
from ..auth import Principal, require
from ..services import Services, get_services
from .protocol import LoadRequest, ModelCard, ModelDeleted, ModelList, PinRequest, UnloadRequest

router = APIRouter(prefix="/v1/models", tags=["models"])
WithServices = Annotated[Services, Depends(get_services)]
Reader = Annotated[Principal, Depends(require("infer", "tune"))]
Tuner = Annotated[Principal, Depends(require("tune"))]
ADMIN = [Depends(require("admin"))]


@router.get("")
async def list_models(services: WithServices, caller: Reader) -> ModelList:
    """Base models and adapters that the caller may use."""
    return ModelList(data=services.models.cards(caller.may_use))


@router.post("/load", dependencies=ADMIN)
async def load_model(body: LoadRequest, services: WithServices) -> ModelCard:
    """Load a base model and answer when it can serve. Fetches it first when it is not here yet."""
    return await services.models.load(body.model, source=body.source, pinned=body.pinned)


@router.post("/unload", dependencies=ADMIN)
async def unload_model(body: UnloadRequest, services: WithServices) -> ModelCard:
    """End a base model's worker and free its memory. 409 while requests use it."""
    return await services.models.unload(body.model)


@router.post("/pin", dependencies=ADMIN)
async def pin_model(body: PinRequest, services: WithServices) -> ModelCard:
    """Keep a base model in memory, or let it go again (`"pinned": false`)."""
    return await services.models.pin(body.model, body.pinned)


@router.get("/{model_id:path}")
async def retrieve_model(model_id: str, services: WithServices, caller: Reader) -> ModelCard:
    """One model. A model that the key may not use is not there for it."""
    if not caller.may_use(model_id):
        raise NotFound(f"There is no model '{model_id}' for this API key.", param="model", code="model_not_found")
    return services.models.card(model_id)


@router.delete("/{model_id:path}")
async def delete_model(model_id: str, services: WithServices, caller: Tuner) -> ModelDeleted:
    """Delete an adapter or one version of it; with the admin scope, forget a base model."""
    caller.check_model(model_id)
    if services.models.is_base(model_id) and not caller.has("admin"):
        raise PermissionDenied("Only a key with the scope admin may delete a base model.")
    await services.models.delete(model_id)
    return ModelDeleted(id=model_id)
