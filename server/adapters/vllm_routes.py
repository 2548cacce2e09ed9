"""vLLM's own calls for adapters, as Kubernetes' LoRA syncers use them: its paths, status codes and answers (0.32).

They differ from vLLM's in three ways, all on purpose: they need the admin scope, a path must lie under an allowed
root, and an adapter that cannot be served is refused with a 4xx instead of a 500.
"""

from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.responses import JSONResponse, PlainTextResponse, Response

from ...storage.errors import InvalidInput, NotFound
from ..auth import require
from ..services import Services, get_services
from .protocol import LoadLoraRequest, UnloadLoraRequest
from .service import Target

router = APIRouter(prefix="/v1", tags=["adapters"], dependencies=[Depends(require("admin"))])
WithServices = Annotated[Services, Depends(get_services)]


@router.post("/load_lora_adapter")
async def load_lora_adapter(body: LoadLoraRequest, services: WithServices) -> Response:
    """Load an adapter from `lora_path` under `lora_name`; with `load_inplace` an existing name gets a new version."""
    name = body.lora_name
    if not name or not body.lora_path:
        return _refusal("Both 'lora_name' and 'lora_path' must be provided.", HTTPStatus.BAD_REQUEST)
    if services.models.is_base(name):
        return _refusal(f"The lora adapter '{name}' conflicts with a served base model.", HTTPStatus.BAD_REQUEST)
    if services.adapters.known(name) and not body.load_inplace:
        return _refusal(
            f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, "
            "set 'load_inplace' to True.",
            HTTPStatus.BAD_REQUEST,
        )
    if body.is_3d_lora_weight:
        raise InvalidInput(
            "is_3d_lora_weight is not supported by this server; leave it out.", param="is_3d_lora_weight"
        )
    await services.publisher.add_source(body.lora_path, Target(name=name, expect="any" if body.load_inplace else "new"))
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post("/unload_lora_adapter")
async def unload_lora_adapter(body: UnloadLoraRequest, services: WithServices) -> Response:
    """Forget an adapter with all its versions; requests in flight finish."""
    name = body.lora_name
    if not name:
        return _refusal("'lora_name' needs to be provided to unload a LoRA adapter.", HTTPStatus.BAD_REQUEST)
    try:
        await services.adapters.delete(name)
    except NotFound:
        return _refusal(f"The lora adapter '{name}' cannot be found.", HTTPStatus.NOT_FOUND)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def _refusal(message: str, status: HTTPStatus) -> JSONResponse:
    """vLLM's error object: its `code` is the status."""
    kind = "NotFoundError" if status is HTTPStatus.NOT_FOUND else "InvalidUserInput"
    body = {"error": {"message": message, "type": kind, "param": None, "code": int(status)}}
    return JSONResponse(body, status_code=status)
