"""A scripted engine for fast tests: it implements the whole Engine contract without a model. Never a server's default.

It knows what it was told to say. Rows take turns on the event loop as real ones do, so queue limits, deadlines,
cancellation, adapters and failures can be tested without a worker process.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ..adapters.base import AdapterVersion, ModuleShape
from ..storage.errors import ContextTooLong, DeadlineExceeded, InvalidInput, Overloaded, TuneloopError, Unavailable
from .base import Chunk, Engine, EngineInfo, EngineStats, GenerateRequest
from .fake_row import FakeRow, fake_prompt_logprobs
from .tokenizer import ChatTokenizer

Reply = Callable[[GenerateRequest, int], str]  # the request and the row's index to the text that the row says


def default_reply(request: GenerateRequest, index: int) -> str:
    """Names the adapter version, so that a test sees which one has answered."""
    who = "the base model" if request.adapter is None else request.adapter.ref
    return f"Hello from {who}." if index == 0 else f"Hello number {index} from {who}."


@dataclass(frozen=True, kw_only=True)
class FakeConfig:
    """How the fake behaves.

    `token_seconds` is the pace of a row, kept by the clock: as with a worker process, tokens that became due while the
    event loop was busy come all at once. 0 gives one token whenever the loop comes round. `load_seconds` is how long
    a start and the load of an adapter take.
    """

    max_model_len: int = 2048
    max_num_seqs: int = 64  # requests that run at once
    max_waiting: int = 1024  # requests that queue before Overloaded
    token_seconds: float = 0.0
    load_seconds: float = 0.0
    start_error: TuneloopError | None = None
    rss_bytes: int = 1024**2
    max_loras: int = 8
    modules: Mapping[str, ModuleShape] | None = None


DEFAULT_MODULES = {"model.layers.0.self_attn.q_proj": ModuleShape(in_features=8, out_features=8)}


class FakeEngine(Engine):
    """A model that says what `reply` tells it to.

    For tests to look at: `requests` (all it was given), `running` and `waiting` (now), `cancelled` (ids of requests
    whose iterator was closed early), `resident` (adapters in memory). For tests to use: `reply`, `fail_next`,
    `refuse_adapter`, `paused`, `until`, `die`.
    """

    def __init__(
        self, tokenizer: ChatTokenizer, *, reply: Reply | str = default_reply, config: FakeConfig | None = None
    ):
        self.reply: Reply = reply if callable(reply) else lambda _request, _index: reply
        self.requests: list[GenerateRequest] = []
        self.cancelled: list[str] = []
        self.resident: dict[str, AdapterVersion] = {}
        self.running = 0
        self.waiting = 0
        self.closed = False
        self._tokenizer = tokenizer
        self._config = config or FakeConfig()
        self._info: EngineInfo | None = None
        self._death: str | None = None
        self.kept: list[str] = []  # digests of the last `keep_adapters`
        self._planned: list[tuple[TuneloopError, int]] = []
        self._slots = asyncio.Semaphore(self._config.max_num_seqs)
        self._go = asyncio.Event()
        self._go.set()
        self._steps = 0
        self._unfit: dict[str, TuneloopError] = {}
        self._seen: dict[str | None, set[tuple[int, ...]]] = {}
        self._cache_queries = 0
        self._cache_hits = 0
        self._adapters_in_use: list[str] = []
        self._watchers: list[asyncio.Future[None]] = []

    async def start(self) -> EngineInfo:
        await asyncio.sleep(self._config.load_seconds)
        if self._config.start_error is not None:
            raise self._config.start_error
        eos = self._tokenizer.eos_token_id
        self._info = EngineInfo(
            max_model_len=self._config.max_model_len,
            vocab_size=self._tokenizer.vocab_size,
            eos_token_ids=frozenset() if eos is None else frozenset({eos}),
            device="fake",
            dtype="none",
            kernel="none: replies are scripted",
            modules=DEFAULT_MODULES if self._config.modules is None else self._config.modules,
            kv_cache_tokens=self._config.max_model_len * self._config.max_num_seqs,
            load_seconds=self._config.load_seconds,
        )
        return self._info

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise Unavailable("The fake engine was not started; call start() first.")
        return self._info

    @property
    def death(self) -> str | None:
        return "it was not started" if self._info is None else self._death

    def die(self, reason: str = "the fake worker was killed") -> None:
        """Fail every request in flight and every later call with Unavailable."""
        self._death = reason
        self._go.set()

    def fail_next(self, error: TuneloopError, *, after_tokens: int = 0) -> None:
        """The next request raises `error` once its first row has given that many tokens."""
        self._planned.append((error, after_tokens))

    def refuse_adapter(self, digest: str, error: TuneloopError) -> None:
        """Loading this version raises `error`."""
        self._unfit[digest] = error

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No row gives a token inside this block."""
        self._go.clear()
        try:
            yield
        finally:
            self._go.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until `holds()` is true; it is asked again whenever a request comes, moves on, or goes."""
        while not holds():
            watcher = asyncio.get_running_loop().create_future()
            self._watchers.append(watcher)
            await watcher

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        self._admit(request)
        planned = self._planned.pop(0) if self._planned else None
        finished = False
        self._count(waiting=1)
        try:
            try:
                await self._acquire(request)
            finally:
                self._count(waiting=-1)
            self._count(running=1)
            if request.adapter is not None:
                self._adapters_in_use.append(request.adapter.digest)
            try:
                if request.adapter is not None:
                    await self.load_adapter(request.adapter)
                async for chunk in self._rows(request, planned):
                    yield chunk
                finished = True
            finally:
                self._count(running=-1)
                self._slots.release()
                if request.adapter is not None:
                    self._adapters_in_use.remove(request.adapter.digest)
        except GeneratorExit:
            if not finished:
                self.cancelled.append(request.request_id)
            raise
        except asyncio.CancelledError:
            self.cancelled.append(request.request_id)
            raise
        finally:
            self._notify()

    async def load_adapter(self, version: AdapterVersion) -> None:
        self._check_alive()
        if version.digest in self._unfit:
            raise self._unfit[version.digest]
        if version.digest not in self.resident:
            await asyncio.sleep(self._config.load_seconds)
            self.resident[version.digest] = version

    async def unload_adapter(self, digest: str) -> None:
        self._check_alive()
        self.resident.pop(digest, None)

    async def keep_adapters(self, versions: Sequence[AdapterVersion]) -> None:
        self._check_alive()
        self.kept = [v.digest for v in versions]
        for version in versions:
            await self.load_adapter(version)

    def stats(self) -> EngineStats:
        return EngineStats(
            running=self.running,
            waiting=self.waiting,
            kv_cache_usage=min(1.0, self.running / self._config.max_num_seqs),
            prefix_cache_queries=self._cache_queries,
            prefix_cache_hits=self._cache_hits,
            steps=self._steps,
            adapters_on_device=tuple(self.resident),
            running_adapters=tuple(dict.fromkeys(self._adapters_in_use)),
            max_loras=self._config.max_loras,
            rss_bytes=0 if self.closed else self._config.rss_bytes,
        )

    async def close(self) -> None:
        self.closed = True
        self.die("the engine was closed")

    def _count(self, *, running: int = 0, waiting: int = 0) -> None:
        self.running += running
        self.waiting += waiting
        self._notify()

    def _notify(self) -> None:
        watchers, self._watchers = self._watchers, []
        for watcher in watchers:
            if not watcher.done():
                watcher.set_result(None)

    def _check_alive(self) -> None:
        if self._death is not None:
            raise Unavailable(f"The model's worker has ended: {self._death}. Try again shortly.")
        if self._info is None:
            raise Unavailable("The fake engine was not started; call start() first.")

    def _admit(self, request: GenerateRequest) -> None:
        self._check_alive()
        self.requests.append(request)
        ids = request.prompt_token_ids
        if any(not 0 <= token_id < self.info.vocab_size for token_id in ids):
            raise InvalidInput(
                f"A prompt token id is outside the vocabulary of {self.info.vocab_size}.", param="prompt"
            )
        if len(ids) + request.sampling.max_tokens > self.info.max_model_len:
            raise ContextTooLong(
                f"{len(ids)} prompt tokens and {request.sampling.max_tokens} output tokens do not fit the context of "
                f"{self.info.max_model_len}; shorten the prompt or lower max_tokens."
            )
        if self._slots.locked() and self.waiting >= self._config.max_waiting:
            raise Overloaded("The queue is full; try again in a second.", retry_after=1.0)

    async def _acquire(self, request: GenerateRequest) -> None:
        remaining = None if request.deadline is None else request.deadline - time.monotonic()
        try:
            async with asyncio.timeout(remaining):
                await self._slots.acquire()
        except TimeoutError:
            raise DeadlineExceeded("The request's time was up while it was queued.") from None

    async def _rows(self, request: GenerateRequest, planned: tuple[TuneloopError, int] | None) -> AsyncIterator[Chunk]:
        sampling = request.sampling
        rows = [FakeRow(self._tokenizer, self.info, request, i, self.reply(request, i)) for i in range(sampling.n)]
        cached = self._lookup_prefix(request)
        prompt_logprobs = fake_prompt_logprobs(request)
        given = 0
        due = time.monotonic()
        while open_rows := [row for row in rows if not row.finished]:
            due += self._config.token_seconds
            for row in open_rows:
                await self._pause(request, due)
                if planned is not None and given >= planned[1]:
                    raise planned[0]
                chunk = row.step()
                given += 1
                self._steps += 1
                self._notify()
                if given == 1:
                    chunk.cached_tokens, chunk.prompt_logprobs = cached, prompt_logprobs
                yield chunk
        if planned is not None:
            raise planned[0]

    async def _pause(self, request: GenerateRequest, due: float) -> None:
        early = due - time.monotonic()
        if early > 0 or not self._config.token_seconds:
            await asyncio.sleep(max(early, 0))
        if not self._go.is_set():
            remaining = None if request.deadline is None else request.deadline - time.monotonic()
            try:
                async with asyncio.timeout(remaining):
                    await self._go.wait()
            except TimeoutError:
                pass  # the deadline is checked below
        self._check_alive()
        if request.deadline is not None and time.monotonic() >= request.deadline:
            raise DeadlineExceeded("The request's time was up before it could finish.")

    def _lookup_prefix(self, request: GenerateRequest) -> int:
        """A prefix cache of whole prompts: a prompt that was seen before counts as cached, but for its last token."""
        seen = self._seen.setdefault(request.adapter.digest if request.adapter else None, set())
        ids = tuple(request.prompt_token_ids)
        cached = max(0, len(ids) - 1) if ids in seen else 0
        seen.add(ids)
        self._cache_queries += len(ids)
        self._cache_hits += cached
        return cached
