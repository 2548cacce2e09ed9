"""The step loop of a worker: messages in, one forward a step, tokens out. It ties the parts together."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor

from ...storage.errors import InvalidInput, TuneloopError, Unavailable
from ..base import TokenLogprob
from .batch import ChunkInput, build_batch
from .config import TransformersConfig
from .kv import KVPool
from .model import LoadedModel
from .prefix_cache import PrefixCache
from .protocol import (
    Abort,
    AdapterDone,
    Failed,
    FromWorker,
    KeepAdapters,
    LoadAdapter,
    Stats,
    StepDone,
    Submit,
    Token,
    ToWorker,
    UnloadAdapter,
    to_problem,
)
from .residency import AdapterResidency
from .row import Row
from .sampler import SamplerState, sample, token_logprobs
from .scheduler import Scheduler, SchedulerLimits, Work
from .wire import check_submit, sampling_params, wire_logprob

_STATS_SECONDS = 0.5
_IDLE_SECONDS = 0.5


class EngineCore:
    """`send` writes one message to the server; `wake` makes a waiting `take` return. One thread calls `run`."""

    def __init__(
        self,
        model: LoadedModel,
        config: TransformersConfig,
        *,
        send: Callable[[FromWorker], None],
        wake: Callable[[], None],
    ) -> None:
        self._model, self._config, self._send = model, config, send
        self._eos = frozenset(t for t in model.eos_token_ids if t < model.vocab_size)
        kv_bytes, prefix_bytes = _cache_sizes(model, config)
        per_token = sum(s.floats for s in model.shapes) * model.dtype.itemsize
        self.max_model_len = min(model.max_model_len, kv_bytes // per_token)
        self.scheduler = Scheduler(
            pool=KVPool(model.shapes, model.dtype, model.device, kv_bytes, self.max_model_len),
            prefix=PrefixCache(model.shapes, model.dtype, model.device, prefix_bytes),
            adapters=AdapterResidency(
                model.modules, config.max_loras, config.max_lora_rank, config.adapter_cpu_bytes, on_event=wake
            ),
            limits=SchedulerLimits(
                max_rows=config.max_num_seqs,
                max_tokens_per_step=config.max_num_batched_tokens,
                max_waiting=config.max_waiting,
            ),
            on_failure=lambda row, error: send(Failed(row.request_id, to_problem(error))),
        )
        self._arrivals = 0
        self._steps = 0
        self._last_stats = (0.0, 0)
        self._process = psutil.Process()
        self._announce: dict[str, Path] = {}  # loads that the server waits for

    @torch.inference_mode()
    def run(self, take: Callable[[float], list[ToWorker]]) -> None:
        """Step until the process ends."""
        idle = False
        while True:
            for message in take(_IDLE_SECONDS if idle else 0.0):
                self._handle(message)
            self._collect_adapters()
            self.scheduler.expire()
            work = self.scheduler.plan()
            idle = not work
            if work:
                self._step(work)
            self._report(force=idle)

    def _handle(self, message: ToWorker) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Abort():
                self.scheduler.abort(message.request_id, message.index)
            case LoadAdapter():
                self._announce[message.digest] = Path(message.path)
                self.scheduler.adapters.request(message.digest, Path(message.path))
                self._announce_ready()
            case KeepAdapters():
                self.scheduler.adapters.keep({digest: Path(path) for digest, path in message.paths.items()})
            case UnloadAdapter():
                self._announce.pop(message.digest, None)
                self.scheduler.adapters.forget(message.digest)

    def _submit(self, message: Submit) -> None:
        try:
            check_submit(message, self._model.vocab_size)
            self.scheduler.add(self._rows(message))
        except TuneloopError as error:
            self._send(Failed(message.request_id, to_problem(error)))

    def _rows(self, message: Submit) -> list[Row]:
        deadline = None if message.seconds_left is None else time.monotonic() + message.seconds_left
        self._arrivals += 1
        rows: list[Row] = []
        for index in range(message.sampling.n):
            params = sampling_params(message.sampling, index)
            rows.append(
                Row(
                    request_id=message.request_id,
                    index=index,
                    tokens=list(message.prompt),
                    prompt_length=len(message.prompt),
                    params=params,
                    sampler=SamplerState.start(params, message.prompt, self._eos, index),
                    adapter=message.adapter,
                    adapter_path=Path(message.adapter_path) if message.adapter_path is not None else None,
                    priority=message.priority,
                    arrival=self._arrivals,
                    deadline=deadline,
                    leader=rows[0] if rows else None,
                )
            )
        return rows

    def _collect_adapters(self) -> None:
        for digest, error in self.scheduler.adapters.collect():
            if error is not None:
                self.scheduler.fail_adapter(digest, error)
                if self._announce.pop(digest, None) is not None:
                    self._send(AdapterDone(digest, to_problem(error)))
        if self._announce:
            self._announce_ready()

    def _announce_ready(self) -> None:
        """Tell of loads that are done: on the device if a slot is free, else in host memory."""
        adapters = self.scheduler.adapters
        for digest in [d for d in self._announce if not adapters.is_loading(d)]:
            if adapters.claim(digest, self._announce.pop(digest)) is not None:
                adapters.release(digest)
            self._send(AdapterDone(digest, None))

    def _step(self, work: Sequence[Work]) -> None:
        began = time.monotonic()
        inputs = [_input(item) for item in work]
        logits = self._model.executor.run(build_batch(inputs, self._model.device))
        self._steps += 1
        finishing: list[tuple[Row, int]] = []  # (row, its last row of logits)
        at = 0
        for item, chunk in zip(work, inputs, strict=True):
            count = len(chunk.tokens) if chunk.all_logits else int(chunk.wants_logits)
            if chunk.all_logits:
                self._prompt_logprobs(item, logits[at : at + count])
            at += count
            if chunk.wants_logits:
                finishing.append((item.row, at - 1))
        self.scheduler.computed(work, time.monotonic() - began)
        if finishing:
            self._send(StepDone(self._take_tokens([r for r, _ in finishing], logits, [i for _, i in finishing])))

    def _take_tokens(self, rows: Sequence[Row], logits: Tensor, at: Sequence[int]) -> list[Token]:
        if len(at) != logits.shape[0]:
            logits = logits[torch.tensor(at, device=logits.device)]
        tokens = sample(logits, [r.sampler for r in rows])
        logprobs = self._logprobs(rows, tokens, logits)
        out: list[Token] = []
        for number, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if row.slot is None:
                continue  # its request has just failed with another row
            if token < 0 or not self.scheduler.prove(row):
                self.scheduler.fail(row, _not_finite(row))
                continue
            first = row.given == 0
            row.tokens.append(token)
            row.sampler.took(token)
            finish = (
                "stop" if token in row.sampler.stop_ids else "length" if row.given >= row.params.max_tokens else None
            )
            out.append(
                Token(
                    row.request_id,
                    row.index,
                    token,
                    finish,
                    row.cached if first else 0,
                    row.waited if first else None,
                    wire_logprob(logprobs[number]) if number in logprobs else None,
                    [wire_logprob(p) for p in row.prompt_logprobs]
                    if first and row.params.prompt_logprobs is not None
                    else None,
                )
            )
            if finish is not None:
                self.scheduler.remove(row)
        return out

    @staticmethod
    def _logprobs(rows: Sequence[Row], tokens: Sequence[int], logits: Tensor) -> dict[int, TokenLogprob]:
        wanted = [i for i, r in enumerate(rows) if r.params.logprobs is not None and tokens[i] >= 0]
        if not wanted:
            return {}
        top = max(rows[i].params.logprobs or 0 for i in wanted)
        found = token_logprobs(logits[wanted], [tokens[i] for i in wanted], top)
        return dict(zip(wanted, found, strict=True))

    def _prompt_logprobs(self, item: Work, logits: Tensor) -> None:
        """Log-probabilities of the prompt tokens that a chunk predicts; the last position predicts the output."""
        row = item.row
        if row.computed == 0:
            row.prompt_logprobs = [None]
        first = row.computed + 1
        targets = row.tokens[first : min(first + item.count, row.prompt_length)]
        if targets:
            row.prompt_logprobs.extend(token_logprobs(logits[: len(targets)], targets, row.params.prompt_logprobs or 0))

    def _report(self, force: bool) -> None:
        now = time.monotonic()
        last, steps = self._last_stats
        if now - last < _STATS_SECONDS and not (force and steps != self._steps):
            return
        self._last_stats = (now, self._steps)
        s = self.scheduler
        self._send(
            Stats(
                running=len(s.running),
                waiting=len(s.waiting),
                kv_cache_usage=s.pool.usage,
                prefix_cache_queries=s.prefix_queries,
                prefix_cache_hits=s.prefix_hits,
                preemptions=s.preemptions,
                steps=self._steps,
                adapters_on_device=s.adapters.on_device,
                adapters_on_cpu=s.adapters.on_host,
                running_adapters=sorted({r.adapter for r in s.running if r.adapter is not None}),
                waiting_adapters=sorted({r.adapter for r in s.waiting if r.adapter is not None}),
                max_loras=self._config.max_loras,
                rss_bytes=self._process.memory_info().rss,
            )
        )
        if not s.running and not s.waiting:
            s.check_integrity()


def _input(item: Work) -> ChunkInput:
    row = item.row
    assert row.slot is not None
    return ChunkInput(
        tokens=row.next_tokens(item.count),
        context=row.computed,
        slot=row.slot,
        adapter=row.adapter_slot,
        all_logits=row.wants_prompt_logprobs,
        wants_logits=item.count == row.remaining,
    )


def _cache_sizes(model: LoadedModel, config: TransformersConfig) -> tuple[int, int]:
    """Bytes of the KV pool and of the prefix cache: a quarter and an eighth of what memory is free after loading."""
    if model.device.type == "cpu":
        free = psutil.virtual_memory().available
    else:
        free = torch.accelerator.get_memory_info(model.device)[0]
    per_token = sum(s.floats for s in model.shapes) * model.dtype.itemsize
    kv = config.kv_cache_bytes or min(free // 4, config.max_num_seqs * model.max_model_len * per_token)
    if kv < 256 * per_token:
        raise InvalidInput(
            f"kv_cache_bytes={kv} holds {kv // per_token} tokens of this model; 256 are needed at least "
            f"({256 * per_token} bytes).",
            param="kv_cache_bytes",
        )
    if not config.enable_prefix_caching:
        return kv, 0
    return kv, config.prefix_cache_bytes if config.prefix_cache_bytes is not None else min(free // 8, kv)


def _not_finite(row: Row) -> TuneloopError:
    who = "The adapter" if row.adapter is not None else "The model"
    return Unavailable(
        f"{who} produced numbers that are not finite, so no token can be chosen. Its weights overflow here.",
        code="not_finite",
    )
