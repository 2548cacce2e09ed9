"""One base model's life: loaded once for all who wait, held while in use, closed, noticed when dead, loaded again.

It knows nothing of other models, budgets or adapters' names; the registry does.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import structlog

from ..storage.errors import Conflict, InvalidInput, NotFound, TuneloopError, Unavailable
from .backoff import Backoff
from .lease import LoadedModel, ModelState
from .retirement import AdapterLeases

log = structlog.get_logger(__name__)


Open = Callable[["ModelSlot"], Awaitable[LoadedModel]]


class ModelSlot:
    """`open_model` fetches, loads and starts the model; it may be cancelled, and then leaves nothing running.

    `last_used` and the backoff count by `clock`, in seconds.
    """

    def __init__(
        self, name: str, open_model: Open, *, adapters: AdapterLeases, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self.adapters = adapters
        self.state: ModelState = "unloaded"
        self.reason: str | None = None
        self.in_flight = 0
        self.last_used = clock()
        self.last_used_at: float | None = None
        self.was_ready = False
        self.hopeless = False  # the last failure is of a kind that trying again does not mend
        self.backoff = Backoff(clock)
        self._open = open_model
        self._clock = clock
        self._model: LoadedModel | None = None
        self._loading: asyncio.Task[LoadedModel] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._draining = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def model(self) -> LoadedModel | None:
        """The model while it is ready."""
        return self._model

    @property
    def current_state(self) -> tuple[ModelState, str | None]:
        """The state and its reason, without waiting for `check_alive` to notice a death. Callable from any thread."""
        model = self._model
        if model is not None and not model.engine.alive:
            return "failed", _died(model)
        return self.state, self.reason

    @property
    def evictable(self) -> bool:
        return self._model is not None and self.in_flight == 0

    @asynccontextmanager
    async def use(self) -> AsyncIterator[LoadedModel]:
        """Hold the model, loading it first when needed; nothing that is held is unloaded. Raises Unavailable."""
        if self._draining:
            raise Unavailable(f"The model '{self.name}' is being unloaded. Try again shortly.")
        self.in_flight += 1  # before the load, so that whoever waits for it counts as a user
        self._idle.clear()
        try:
            yield await self.load()
        finally:
            self.in_flight -= 1
            self.last_used, self.last_used_at = self._clock(), time.time()
            if self.in_flight == 0:
                self._idle.set()

    async def load(self) -> LoadedModel:
        """The model, loaded if it was not: all concurrent callers share one load, which outlives any of them.

        Raises Unavailable with the reason when it fails; the next call tries again.
        """
        self.check_alive()
        if self._model is not None:
            return self._model
        return await asyncio.shield(self.begin_load())

    def begin_load(self) -> asyncio.Task[LoadedModel]:
        """The load under way, begun if there was none."""
        if self._loading is None:
            self._loading = asyncio.create_task(self._load(), name=f"load {self.name}")
            self._loading.add_done_callback(_look_at_result)
        return self._loading

    def check_alive(self) -> None:
        """Notice a dead engine: the model has failed, and its leftovers are cleared away before the next load."""
        model = self._model
        if model is None or model.engine.alive:
            return
        self.state, self.reason = "failed", _died(model)
        self.backoff.failed()
        self._begin_close(model, dead=True)

    async def unload(self, *, wait_seconds: float = 0) -> None:
        """End the model's engine, or its load if nobody waits for it. Nothing happens if it is not loaded.

        Raises Conflict if requests still hold it after `wait_seconds`; new ones are refused meanwhile.
        """
        if self.in_flight and wait_seconds:
            await self._drain(wait_seconds)
        if self.in_flight:
            raise Conflict(f"The model '{self.name}' is in use by {self.in_flight} request(s). Try again later.")
        await self.close()

    async def close(self) -> None:
        """End whatever is going on, in use or not."""
        await asyncio.sleep(0)  # a task that is cancelled before its first step runs none of its own clean-up
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.wait([self._loading])
        if self._model is not None:
            self._begin_close(self._model)
        self.state, self.reason = "unloaded", None
        if self._closing is not None:
            await asyncio.wait([self._closing])

    async def _drain(self, seconds: float) -> None:
        self._draining += 1
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return  # the caller looks at what is still in flight
        finally:
            self._draining -= 1

    async def _load(self) -> LoadedModel:
        self.state, self.reason = "loading", None
        try:
            if self._closing is not None:
                await asyncio.wait([self._closing])  # the memory of the one before must be free
            model = await self._open(self)
        except asyncio.CancelledError:
            self.state, self.reason = "unloaded", None
            raise Unavailable(f"The model '{self.name}' was unloaded while it was loading. Try again.") from None
        except Exception as error:
            self.reason = error.message if isinstance(error, TuneloopError) else f"{type(error).__name__}: {error}"
            self.state = "failed"
            self.hopeless = isinstance(error, InvalidInput | NotFound)
            self.backoff.failed()
            log.error("model failed to load", model=self.name, reason=self.reason)
            raise Unavailable(f"The model '{self.name}' could not be loaded: {self.reason}") from error
        finally:
            self._loading = None
        self._model, self.state, self.reason = model, "ready", None
        self.was_ready, self.hopeless = True, False
        self.backoff.started()
        self.last_used = self._clock()
        return model

    def _begin_close(self, model: LoadedModel, *, dead: bool = False) -> None:
        self._model = None
        self._closing = asyncio.create_task(self._close(model, dead), name=f"close {self.name}")
        self._closing.add_done_callback(_look_at_result)

    async def _close(self, model: LoadedModel, dead: bool) -> None:
        try:
            if dead:
                log.error("model died", model=self.name, reason=model.engine.death)
            await model.engine.close()
        finally:
            self._closing = None


def _died(model: LoadedModel) -> str:
    return f"The model's worker does not run: {model.engine.death}."


def _look_at_result(task: "asyncio.Task[LoadedModel] | asyncio.Task[None]") -> None:
    """A failure that nobody waited for is kept as the slot's reason; asyncio need not complain about it too."""
    if not task.cancelled() and task.exception() is not None and not isinstance(task.exception(), TuneloopError):
        log.error("unexpected failure", task=task.get_name(), exc_info=task.exception())
