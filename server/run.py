"""Runs the server process: logs, uvicorn, and the graceful drain on SIGTERM and Ctrl-C."""

import asyncio
import gc
import signal
import socket
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI

from ..engines.registry import EngineFactory
from ..storage.errors import InvalidInput
from .app import create_app
from .drain import Drain
from .logs import configure_logs
from .services import Services
from .settings import Settings

log = structlog.get_logger(__name__)

_CUT_SECONDS = 2  # what streams get to send their error event after the grace time


def serve(settings: Settings, *, engine_factory: EngineFactory | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then drain and return. A second signal cuts what still runs.

    Raises TuneloopError if the services cannot start, InvalidInput if the address cannot be listened on.
    """
    configure_logs(settings.log_format, settings.log_level)
    app = create_app(settings, engine_factory=engine_factory)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        lifespan="off",  # run here: its errors reach the caller as they are, and its end does not depend on uvicorn's
        log_config=None,  # ours is set up already
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_CUT_SECONDS,
    )
    listener = _listen(config)  # before any model loads: a port that is taken should be known at once

    async def main() -> None:
        async with app.router.lifespan_context(app):
            gc.freeze()  # what is here now stays: later collections, and the pauses they make, leave it out
            gc.enable()
            await DrainingServer(config, app, settings.grace_seconds).serve([listener])

    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(main())


def _listen(config: uvicorn.Config) -> socket.socket:
    try:
        return config.bind_socket()
    except SystemExit as ended:  # uvicorn logs the OSError and exits
        reason = ended.__context__
        told = reason.strerror if isinstance(reason, OSError) else reason
        raise InvalidInput(
            f"{config.host}:{config.port} cannot be listened on: {told}. Choose another host or port, or stop the "
            "program that has it.",
            param="port",
        ) from reason


class DrainingServer(uvicorn.Server):
    """uvicorn closes its sockets at the first signal; this one answers on until running requests are done."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, grace_seconds: float) -> None:
        super().__init__(config)
        self._app = app
        self._grace_seconds = grace_seconds
        self._drain_task: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain, then exit. Second, or before the server has started: exit now. Third: don't wait."""
        drain: Drain = self._app.state.drain
        if not self.started or drain.draining:
            self.force_exit = self.should_exit
            self.should_exit = True
            return
        drain.begin()
        self._loop.call_soon_threadsafe(self._begin, signal.Signals(sig).name)

    def _begin(self, name: str) -> None:
        self._drain_task = asyncio.create_task(self._drain(name))

    async def _drain(self, name: str) -> None:
        drain: Drain = self._app.state.drain
        log.info("draining", signal=name, in_flight=drain.in_flight, grace_seconds=self._grace_seconds)
        if not await drain.wait_idle(self._grace_seconds):
            log.warning("the grace time is over, cutting what still runs", in_flight=drain.in_flight)
            services: Services = self._app.state.services
            await services.registry.close()  # each stream then ends with an error event, not with a cut socket
        self.should_exit = True
