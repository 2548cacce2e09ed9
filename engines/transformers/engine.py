"""The transformers engine as the server sees it: starts the worker process, sends requests, assembles text.

Token ids go to the worker and come back; text, stop strings and the iterator that a client's disconnect closes live
here, so that the worker's loop never waits for a character.
"""

import asyncio
import contextlib
import os
import socket
import sys
import time
from asyncio.subprocess import Process
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ...adapters.base import AdapterVersion, ModuleShape
from ...storage.errors import ContextTooLong, InvalidInput, TuneloopError, Unavailable
from ..base import Chunk, Engine, EngineInfo, EngineStats, FinishReason, GenerateRequest, SamplingParams, TokenLogprob
from ..output import OutputText
from ..tokenizer import ChatTokenizer
from .config import TransformersConfig
from .protocol import (
    HEADER_BYTES,
    Abort,
    AdapterDone,
    Failed,
    FromWorker,
    LoadAdapter,
    Problem,
    Ready,
    Refused,
    Stats,
    StepDone,
    Submit,
    Token,
    ToWorker,
    UnloadAdapter,
    WireLogprob,
    WireSampling,
    frame,
    frame_length,
    from_problem,
    from_worker_decoder,
)

_LOG_LINES = 40  # kept of the worker's stderr, for the reason of its death
_LOG_LINE = 4096  # characters kept of a line without an end
_LAST_WORDS_SECONDS = 1.0  # for reading stderr to its end after a death
_END_SECONDS = 5.0  # from closing the socket to SIGKILL


@dataclass
class _Stream:
    """What one request's iterator waits for: tokens in order, or one error. `open_rows` counts unfinished ones."""

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
        self._process: Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._log: deque[str] = deque(maxlen=_LOG_LINES)
        self._ready: asyncio.Future[EngineInfo] | None = None
        self._death: str | None = "it was not started"

    async def start(self) -> EngineInfo:
        ours, theirs = socket.socketpair()
        settings = msgspec.json.encode({"path": str(self._path), "engine": msgspec.to_builtins(self._config)}).decode()
        environment = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", **os.environ}
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tuneloop.engines.transformers.worker",
                str(theirs.fileno()),
                settings,
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                env=environment,
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._death = None
        self._ready = asyncio.get_running_loop().create_future()
        self._tasks = [asyncio.create_task(self._receive(reader)), asyncio.create_task(self._keep_log())]
        try:
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
    def alive(self) -> bool:
        return self._death is None

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
            self._send(_submit(request))
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
                        self._send(Abort(request.request_id, item.index))
                yield chunk
            finished = True
        finally:
            self._streams.pop(request.request_id, None)
            if not finished and self.alive:
                self._send(Abort(request.request_id))

    async def load_adapter(self, version: AdapterVersion) -> None:
        self._check_alive()
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._adapter_waiters.setdefault(version.digest, []).append(waiter)
        self._send(LoadAdapter(version.digest, str(version.path)))
        await waiter

    async def unload_adapter(self, digest: str) -> None:
        self._check_alive()
        for waiter in self._adapter_waiters.pop(digest, []):
            if not waiter.done():
                waiter.set_exception(Unavailable("The adapter was unloaded while it was being loaded."))
        self._send(UnloadAdapter(digest))

    async def close(self) -> None:
        self._die("it was stopped")
        if self._writer is not None:
            self._writer.close()
        process = self._process
        if process is not None and process.returncode is None:
            try:
                await asyncio.wait_for(process.wait(), _END_SECONDS)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

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
            logprobs=[_logprob(token.logprob, sampling.logprobs)] if token.logprob is not None else None,
            finish_reason=finish,
            stop_reason=stop_reason,
            cached_tokens=token.cached,
            prompt_logprobs=_prompt_logprobs(token, sampling),
        )

    def _send(self, message: ToWorker) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(frame(message))

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                header = await reader.readexactly(HEADER_BYTES)
                self._dispatch(from_worker_decoder.decode(await reader.readexactly(frame_length(header))))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        assert self._process is not None
        code = await self._process.wait()
        await asyncio.wait(self._tasks[1:], timeout=_LAST_WORDS_SECONDS)
        self._die(f"it ended with {_exit_name(code)}{self._last_words()}")

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
                assert self._ready is not None and self._process is not None
                _settle(self._ready, _engine_info(message, self._process.pid), None)
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

    async def _keep_log(self) -> None:
        """Read the worker's stderr to its end, so that its writes never block; progress bars end lines by a return."""
        assert self._process is not None and self._process.stderr is not None
        rest = ""
        while piece := await self._process.stderr.read(1 << 14):
            *lines, rest = (rest + piece.decode("utf-8", "replace")).replace("\r", "\n").split("\n")
            self._log.extend(lines)
            rest = rest[-_LOG_LINE:]
        self._log.append(rest)

    def _last_words(self) -> str:
        words = next((line for line in reversed(self._log) if line.strip()), "")
        return f" ({words})" if words else ""


def _settle(waiter: "asyncio.Future[Any]", result: object, problem: Problem | None) -> None:
    if waiter.done():
        return
    if problem is None:
        waiter.set_result(result)
    else:
        waiter.set_exception(from_problem(problem))


def _submit(request: GenerateRequest) -> Submit:
    s = request.sampling
    left = None if request.deadline is None else request.deadline - time.monotonic()
    return Submit(
        request.request_id,
        list(request.prompt_token_ids),
        WireSampling(
            n=s.n,
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            min_p=s.min_p,
            presence_penalty=s.presence_penalty,
            frequency_penalty=s.frequency_penalty,
            repetition_penalty=s.repetition_penalty,
            seed=s.seed,
            logit_bias=dict(s.logit_bias),
            stop_token_ids=sorted(s.stop_token_ids),
            ignore_eos=s.ignore_eos,
            min_tokens=s.min_tokens,
            max_tokens=s.max_tokens,
            logprobs=s.logprobs,
            prompt_logprobs=s.prompt_logprobs,
        ),
        request.adapter.digest if request.adapter is not None else None,
        str(request.adapter.path) if request.adapter is not None else None,
        request.priority,
        left,
    )


def _logprob(wire: WireLogprob, top: int | None) -> TokenLogprob:
    return TokenLogprob(wire.token_id, wire.logprob, wire.rank, tuple(wire.top[:top]))


def _prompt_logprobs(token: Token, sampling: SamplingParams) -> list[TokenLogprob | None] | None:
    if token.prompt_logprobs is None:
        return None
    return [None if p is None else _logprob(p, sampling.prompt_logprobs) for p in token.prompt_logprobs]


def _engine_info(ready: Ready, pid: int) -> EngineInfo:
    return EngineInfo(
        max_model_len=ready.max_model_len,
        vocab_size=ready.vocab_size,
        eos_token_ids=frozenset(ready.eos_token_ids),
        device=ready.device,
        dtype=ready.dtype,
        kernel=ready.kernel,
        modules={n: ModuleShape(in_features=i, out_features=o) for n, (i, o) in ready.modules.items()},
        kv_cache_tokens=ready.kv_cache_tokens,
        load_seconds=ready.load_seconds,
        pid=pid,
    )


def _exit_name(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    import signal

    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
