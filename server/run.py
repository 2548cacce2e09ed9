"""Runs the server process: logs, uvicorn, and the graceful drain on SIGTERM and Ctrl-C."""

import asyncio
import signal
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI

from .app import create_app
from .drain import Drain
from .logs import configure_logs
from .services import Services
from .settings import Settings

log = structlog.get_logger(__name__)

_CUT_SECONDS = 2  # what streams get to send their error event after the grace time


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain and return. A second signal cuts what still runs.

    Exits with status 3 if the server cannot start (as uvicorn does); the reason is logged.
    """
    configure_logs(settings.log_format, settings.log_level)
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,  # ours is set up already
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_CUT_SECONDS,
    )
    DrainingServer(config, app, settings.grace_seconds).run()


class DrainingServer(uvicorn.Server):
    """uvicorn closes its sockets at the first signal; this one answers on until running requests are done."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, grace_seconds: float) -> None:
        super().__init__(config)
        self._app = app
        self._grace_seconds = grace_seconds
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)  # type: ignore[arg-type]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain, then exit. Second, or before the server has started: exit now. Third: don't tidy up."""
        drain: Drain = self._app.state.drain
        if self._loop is None or not self.started or drain.draining:
            self.force_exit = self.should_exit
            self.should_exit = True
            return
        drain.begin()
        self._loop.call_soon_threadsafe(self._begin, signal.Signals(sig).name)

    def _begin(self, name: str) -> None:
        self._draining = asyncio.create_task(self._drain(name))

    async def _drain(self, name: str) -> None:
        drain: Drain = self._app.state.drain
        log.info("draining", signal=name, in_flight=drain.in_flight, grace_seconds=self._grace_seconds)
        if not await drain.wait_idle(self._grace_seconds):
            log.warning("the grace time is over, cutting what still runs", in_flight=drain.in_flight)
            services: Services = self._app.state.services
            await services.registry.close()  # each stream then ends with an error event, not with a cut socket
        self.should_exit = True
