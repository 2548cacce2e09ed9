"""Drives an engine for one HTTP request: one or several prompts, their chunks merged, counted and measured.

It knows engines and metrics, and no wire format. The chunks of all prompts come out of one stream; what has queued up
while the consumer was busy comes out as one batch, so that a busy server writes fewer, larger events.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import cast

from ...engines.base import Chunk, FinishReason, GenerateRequest, TokenLogprob
from ...engines.registry import ModelLease
from ...storage.errors import Unavailable
from ..metrics import Finish, Metrics, RequestTimings
from .usage import Usage


@dataclass(slots=True)
class RowResult:
    """All that one row gave, for answers that are not streamed."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class Generation:
    """The running work of one request. Row `p * n + i` is completion i of prompt p; chunks carry that as `index`.

    Call `begin` once, then iterate `batches` or await `collect`; `aclose` in any case, also after an error: it stops
    the engine's rows, gives the lease back (by closing `stack`) and counts the request.
    """

    def __init__(
        self,
        lease: ModelLease,
        requests: Sequence[GenerateRequest],
        *,
        metrics: Metrics,
        stack: AsyncExitStack,
        arrived: float,
    ) -> None:
        self.lease = lease
        self.requests = requests
        self.rows_per_prompt = requests[0].sampling.n
        self.row_count = len(requests) * self.rows_per_prompt
        self.usage = Usage(prompt_tokens=sum(len(request.prompt_token_ids) for request in requests))
        self.completion_tokens = [0] * self.row_count
        self._metrics = metrics
        self._stack = stack
        self._arrived = arrived
        self._queue: list[Chunk] = []
        self._waiter: asyncio.Future[None] | None = None
        self._error: BaseException | None = None
        self._pumps: list[asyncio.Task[None]] = []
        self._open_pumps = 0
        self._first_token_at: float | None = None
        self._queue_seconds: float | None = None
        self._last_chunk_at = [0.0] * self.row_count
        self._first_reason: FinishReason | None = None
        self._unfinished = self.row_count
        self._closed = False

    async def begin(self) -> None:
        """Submit the prompts and wait for the first chunk. Raises what the engine raises before it."""
        self._metrics.request_started(self.lease.base, self.lease.adapter)
        for place, request in enumerate(self.requests):
            pump = asyncio.create_task(self._pump(request, place * self.rows_per_prompt))
            pump.add_done_callback(self._pump_ended)
            self._pumps.append(pump)
        self._open_pumps = len(self._pumps)
        await self._wait()

    async def batches(self) -> AsyncIterator[list[Chunk]]:
        """What has come since the last batch, at most one chunk a row. Raises what the engine raises."""
        while self._queue or self._open_pumps:
            if not self._queue:
                await self._wait()
                continue
            batch, self._queue = self._queue, []
            if len(batch) > 1:
                batch = _merge(batch)
            self._count(batch)
            yield batch
        if self._error is not None:
            raise self._error
        if self._unfinished:
            raise Unavailable("The engine ended the request without finishing it; send it again.")

    async def collect(self) -> list[RowResult]:
        """Wait for everything. Raises what the engine raises."""
        rows = [RowResult() for _ in range(self.row_count)]
        async for batch in self.batches():
            for chunk in batch:
                row = rows[chunk.index]
                row.text.append(chunk.text)
                row.token_ids += chunk.token_ids
                row.logprobs += chunk.logprobs or ()
                row.prompt_logprobs = chunk.prompt_logprobs or row.prompt_logprobs
                if chunk.finish_reason is not None:
                    row.finish_reason, row.stop_reason = chunk.finish_reason, chunk.stop_reason
        return rows

    def row_usage(self, index: int) -> Usage:
        """The counts of one row so far."""
        request = self.requests[index // self.rows_per_prompt]
        return Usage(len(request.prompt_token_ids), self.completion_tokens[index])

    async def aclose(self) -> None:
        """Safe to repeat. Cancels whatever still runs."""
        if self._closed:
            return
        self._closed = True
        for pump in self._pumps:
            pump.cancel()
        try:
            await asyncio.gather(*self._pumps, return_exceptions=True)
        finally:
            self._metrics.request_finished(
                self.lease.base,
                self.lease.adapter,
                prompt_tokens=self.usage.prompt_tokens,
                cached_tokens=self.usage.cached_tokens,
                completion_tokens=self.usage.completion_tokens,
                finish_reason=self._outcome(),
                timings=RequestTimings(
                    e2e_seconds=time.monotonic() - self._arrived,
                    first_token_seconds=None if self._first_token_at is None else self._first_token_at - self._arrived,
                    queue_seconds=self._queue_seconds,
                ),
            )
            await self._stack.aclose()

    def _outcome(self) -> Finish:
        if self._error is not None:
            return "error"
        if self._unfinished or self._first_reason is None:
            return "abort"
        return self._first_reason

    async def _pump(self, request: GenerateRequest, first_row: int) -> None:
        iterator = cast(AsyncGenerator[Chunk, None], self.lease.engine.generate(request))
        async with aclosing(iterator):
            async for chunk in iterator:
                chunk.index += first_row
                self._queue.append(chunk)
                self._wake()

    def _pump_ended(self, pump: asyncio.Task[None]) -> None:
        self._open_pumps -= 1
        if not pump.cancelled() and self._error is None:
            self._error = pump.exception()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self) -> None:
        """Until there is a chunk or every pump has ended. Raises a pump's error, once its chunks have been taken."""
        while not self._queue and self._open_pumps and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if not self._queue and self._error is not None:
            raise self._error

    def _count(self, batch: list[Chunk]) -> None:
        now = time.monotonic()
        lease, metrics = self.lease, self._metrics
        if self._first_token_at is None:
            self._first_token_at = now
            self._queue_seconds = batch[0].queue_seconds
            metrics.first_token(lease.base, lease.adapter, now - self._arrived)
        for chunk in batch:
            index, gained = chunk.index, len(chunk.token_ids)
            if gained and self.completion_tokens[index]:
                metrics.token_gap(lease.base, lease.adapter, (now - self._last_chunk_at[index]) / gained)
            self._last_chunk_at[index] = now
            self.completion_tokens[index] += gained
            self.usage.completion_tokens += gained
            self.usage.cached_tokens += chunk.cached_tokens
            if chunk.finish_reason is not None:
                self._unfinished -= 1
                self._first_reason = self._first_reason or chunk.finish_reason


def _merge(batch: list[Chunk]) -> list[Chunk]:
    """One chunk a row, in the order of each row's first."""
    rows: dict[int, Chunk] = {}
    for chunk in batch:
        first = rows.setdefault(chunk.index, chunk)
        if first is chunk:
            continue
        first.token_ids = first.token_ids + chunk.token_ids
        first.text += chunk.text
        if chunk.logprobs is not None:
            first.logprobs = (first.logprobs or []) + chunk.logprobs
        first.finish_reason, first.stop_reason = chunk.finish_reason, chunk.stop_reason
    return list(rows.values())
