"""The transformers engine as the server sees it: starts the worker process, sends requests, assembles text.

Token ids go to the worker and come back; text, stop strings and the iterator that a client's disconnect closes live
here, so that the worker's loop never waits for a character.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ...adapters.base import AdapterVersion
from ...storage.errors import ContextTooLong, InvalidInput, TuneloopError, Unavailable
from ..base import Chunk, Engine, EngineInfo, EngineStats, FinishReason, GenerateRequest, SamplingParams
from ..output import OutputText
from ..tokenizer import ChatTokenizer
from .config import TransformersConfig
from .process import WorkerProcess
from .protocol import (
    Abort,
    AdapterDone,
    Failed,
    FromWorker,
    KeepAdapters,
    LoadAdapter,
    Problem,
    Ready,
    Refused,
    Stats,
    StepDone,
    Token,
    UnloadAdapter,
    from_problem,
)
from .wire import engine_info, logprob, prompt_logprobs, submit


@dataclass
class _Stream:
    """What one request's iterator waits for: tokens in order, or one error."""

    rows: list["_RowText"]
    items: asyncio.Queue[Token | TuneloopError] = field(default_factory=asyncio.Queue)


@dataclass
class _RowText:
    text: OutputText
    done: bool = False


class TransformersEngine(Engine):
    """One worker process for the checkpoint at `path`. The last lines of its stderr tell why it died."""

    def __init__(self, path: Path, tokenizer: ChatTokenizer, config: TransformersConfig) -> None:
        self._path, self._tokenizer, self._config = path, tokenizer, config
        self._info: EngineInfo | None = None
        self._stats = EngineStats(max_loras=config.max_loras)
        self._streams: dict[str, _Stream] = {}
        self._adapter_waiters: dict[str, list[asyncio.Future[None]]] = {}
        self._worker = WorkerProcess(self._dispatch, self._die)
        self._ready: asyncio.Future[EngineInfo] | None = None
        self._death: str | None = "it was not started"

    async def start(self) -> EngineInfo:
        self._death = None
        self._ready = asyncio.get_running_loop().create_future()
        try:
            await self._worker.start(self._path, self._config)
            self._info = await self._ready
        except BaseException:
            await self.close()
            raise
        return self._info

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise self._unavailable()
        return self._info

    @property
    def death(self) -> str | None:
        return self._death

    def stats(self) -> EngineStats:
        return self._stats

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        self._check(request)
        prompt = request.prompt_token_ids
        sampling = request.sampling
        stream = _Stream([_RowText(OutputText(self._tokenizer, sampling, prompt)) for _ in range(sampling.n)])
        if request.request_id in self._streams:
            raise InvalidInput(f"Request id '{request.request_id}' is in use.", param="request_id")
        self._streams[request.request_id] = stream
        finished = False
        try:
            self._worker.send(submit(request))
            open_rows = sampling.n
            while open_rows:
                item = await stream.items.get()
                if isinstance(item, TuneloopError):
                    finished = True
                    raise item
                row = stream.rows[item.index]
                if row.done:
                    continue  # computed before the worker heard of the stop string
                chunk = self._chunk(item, row, sampling)
                if chunk.finish_reason is not None:
                    row.done = True
                    open_rows -= 1
                    if item.finish is None:
                        self._worker.send(Abort(request.request_id, item.index))
                yield chunk
            finished = True
        finally:
            self._streams.pop(request.request_id, None)
            if not finished and self.alive:
                self._worker.send(Abort(request.request_id))

    async def load_adapter(self, version: AdapterVersion) -> None:
        self._check_alive()
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._adapter_waiters.setdefault(version.digest, []).append(waiter)
        self._worker.send(LoadAdapter(version.digest, str(version.path)))
        await waiter

    async def unload_adapter(self, digest: str) -> None:
        self._check_alive()
        for waiter in self._adapter_waiters.pop(digest, []):
            if not waiter.done():
                waiter.set_exception(Unavailable("The adapter was unloaded while it was being loaded."))
        self._worker.send(UnloadAdapter(digest))

    async def keep_adapters(self, versions: Sequence[AdapterVersion]) -> None:
        self._check_alive()
        self._worker.send(KeepAdapters({v.digest: str(v.path) for v in versions}))

    async def close(self) -> None:
        self._die("it was stopped")
        await self._worker.close()

    def _check(self, request: GenerateRequest) -> None:
        self._check_alive()
        if not request.prompt_token_ids:
            raise InvalidInput("The prompt has no tokens. Send at least one.", param="prompt")
        total = len(request.prompt_token_ids) + request.sampling.max_tokens
        if total > self.info.max_model_len:
            raise ContextTooLong(
                f"This model's context holds {self.info.max_model_len} tokens, but {total} were asked for: "
                f"{len(request.prompt_token_ids)} in the prompt and {request.sampling.max_tokens} for the output. "
                "Shorten the prompt or lower max_tokens.",
                param="messages",
            )

    def _check_alive(self) -> None:
        if not self.alive:
            raise self._unavailable()

    def _unavailable(self) -> Unavailable:
        return Unavailable(
            f"The model's worker does not run: {self._death}. Try again in a moment.", code="engine_died"
        )

    def _chunk(self, token: Token, row: _RowText, sampling: SamplingParams) -> Chunk:
        stop_token = token.finish == "stop"
        text = "" if stop_token and not sampling.include_stop else row.text.push([token.token_id])
        finish: FinishReason | None = "stop" if stop_token else "length" if token.finish == "length" else None
        stop_reason: int | str | None = None
        if row.text.stopped is not None:
            finish, stop_reason = "stop", row.text.stopped
        elif finish is not None:
            text += row.text.finish()
            if row.text.stopped is not None:
                finish, stop_reason = "stop", row.text.stopped
            elif stop_token and token.token_id in sampling.stop_token_ids:
                stop_reason = token.token_id
        return Chunk(
            index=token.index,
            token_ids=[token.token_id],
            text=text,
            logprobs=[logprob(token.logprob, sampling.logprobs)] if token.logprob is not None else None,
            finish_reason=finish,
            stop_reason=stop_reason,
            cached_tokens=token.cached,
            queue_seconds=token.waited,
            prompt_logprobs=prompt_logprobs(token, sampling),
        )

    def _dispatch(self, message: FromWorker) -> None:
        match message:
            case StepDone():
                for token in message.tokens:
                    self._deliver(token.request_id, token)
            case Failed():
                self._deliver(message.request_id, from_problem(message.problem))
            case Stats():
                self._stats = EngineStats(**msgspec.structs.asdict(message))
            case AdapterDone():
                for waiter in self._adapter_waiters.pop(message.digest, []):
                    _settle(waiter, None, message.problem)
            case Ready():
                assert self._ready is not None
                _settle(self._ready, engine_info(message, self._worker.pid), None)
            case Refused():
                assert self._ready is not None
                _settle(self._ready, None, message.problem)

    def _deliver(self, request_id: str, item: Token | TuneloopError) -> None:
        stream = self._streams.get(request_id)  # None: the request has just been closed
        if stream is not None:
            stream.items.put_nowait(item)

    def _die(self, reason: str) -> None:
        """Fail everything that waits. The first reason stays."""
        if self._death is not None:
            return
        self._death = reason
        error = self._unavailable()
        for stream in self._streams.values():
            stream.items.put_nowait(error)
        waiters = [w for waiting in self._adapter_waiters.values() for w in waiting]
        self._adapter_waiters.clear()
        for waiter in [*waiters, self._ready]:
            if waiter is not None and not waiter.done():
                waiter.set_exception(error)
                waiter.exception()  # seen, also where nobody awaits it any more


def _settle(waiter: "asyncio.Future[Any]", result: object, problem: Problem | None) -> None:
    if waiter.done():
        return
    if problem is None:
        waiter.set_result(result)
    else:
        waiter.set_exception(from_problem(problem))
