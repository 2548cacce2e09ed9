"""Builds the ASGI app: middleware, error handlers and one router for each endpoint family. No logic of its own."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Scope

from .. import __version__
from ..engines.registry import EngineFactory
from ..finetune.launchers import Launcher
from . import errors
from .adapters.routes import router as adapters_router
from .adapters.vllm_routes import router as vllm_adapters_router
from .chat.routes import router as chat_router
from .completions.routes import router as completions_router
from .drain import Drain, DrainMiddleware
from .files.routes import router as files_router
from .fine_tuning.permission_routes import router as permissions_router
from .fine_tuning.routes import router as fine_tuning_router
from .keys_routes import router as keys_router
from .metrics import Metrics
from .middleware import BodyLimitMiddleware, CrossSiteMiddleware, RequestMiddleware
from .models.routes import router as models_router
from .ops.routes import router as ops_router
from .services import open_services
from .settings import Settings
from .tokenize.routes import router as tokenize_router

ROUTERS = (
    ops_router,
    models_router,
    chat_router,
    completions_router,
    tokenize_router,
    adapters_router,
    vllm_adapters_router,
    files_router,
    fine_tuning_router,
    permissions_router,
    keys_router,
)


def create_app(
    settings: Settings, *, engine_factory: EngineFactory | None = None, launcher: Launcher | None = None
) -> FastAPI:
    """A server as an ASGI app; its services open with its lifespan.

    Tests replace the engine by `engine_factory`, and the trainer's processes by `launcher`.
    """
    metrics, drain = Metrics(), Drain()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_services(
            settings, metrics=metrics, drain=drain, engine_factory=engine_factory, launcher=launcher
        ) as app.state.services:
            yield

    def limit_of(scope: Scope) -> tuple[int, str]:
        # Only forms hold weights and data; what else comes to the same routes is a few lines of JSON.
        is_form = Headers(scope=scope).get("content-type", "").startswith("multipart/form-data")
        if is_form and scope["path"].startswith("/v1/adapters"):
            return int(settings.max_upload_bytes), "max_upload_bytes"
        if is_form and scope["path"] == "/v1/files":
            return int(settings.max_file_bytes), "max_file_bytes"
        return int(settings.max_body_bytes), "max_body_bytes"

    app = FastAPI(
        title="Tuneloop",
        version=__version__,
        lifespan=lifespan,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,  # a name may end in anything but a slash, and a redirect would lose the body
        middleware=[
            Middleware(RequestMiddleware, metrics=metrics),
            Middleware(DrainMiddleware, drain=drain),
            *_cors(settings),
            Middleware(CrossSiteMiddleware, origins=settings.cors_origins),
            Middleware(BodyLimitMiddleware, limit_of=limit_of),
        ],
    )
    errors.install(app)
    for router in ROUTERS:
        app.include_router(router)
    app.state.drain = drain
    return app


def _cors(settings: Settings) -> list[Middleware]:
    if not settings.cors_origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    ]
