"""Probes and metrics. They need no key: load balancers and scrapers have none, and nothing here is secret."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from ... import __version__
from ..services import Services, get_services

router = APIRouter(tags=["operations"])
WithServices = Annotated[Services, Depends(get_services)]


@router.get("/health")
async def health() -> dict[str, Any]:
    """Live: the process answers. It stays 200 while models load and while the server drains."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(services: WithServices) -> JSONResponse:
    """200 only when every model named at start can answer, and no shutdown has begun; else 503 with the reasons."""
    is_ready, reasons = services.registry.ready()
    if services.drain.draining:
        is_ready, reasons = False, ["the server is shutting down", *reasons]
    body = {"status": "ready" if is_ready else "not_ready", "reasons": list(reasons)}
    return JSONResponse(body, status_code=200 if is_ready else 503)


@router.get("/metrics")
async def metrics(services: WithServices) -> Response:
    """Prometheus text, under vLLM's names and our own `tuneloop:` ones."""
    services.collector.snapshot()
    text = await run_in_threadpool(services.metrics.render)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/version")
async def version() -> dict[str, Any]:
    return {"version": __version__}
