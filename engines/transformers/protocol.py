"""What the server process and an engine worker say to each other: length-prefixed msgpack over a socket pair.

The server says Submit, Abort, LoadAdapter, UnloadAdapter, KeepAdapters; the worker says Ready or Refused once, then a
StepDone a step, and Failed, AdapterDone and Stats when there is something to tell. Closing the socket ends the worker.
"""

import struct
from typing import Any

import msgspec

from ...storage import errors
from ...storage.errors import Overloaded, TuneloopError

_LENGTH = struct.Struct("<I")


class WireSampling(msgspec.Struct, frozen=True, array_like=True):
    """The part of SamplingParams that the worker needs: text never crosses the pipe."""

    n: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int | None
    logit_bias: dict[int, float]
    stop_token_ids: list[int]
    ignore_eos: bool
    min_tokens: int
    max_tokens: int
    logprobs: int | None
    prompt_logprobs: int | None


class Submit(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    prompt: list[int]
    sampling: WireSampling
    adapter: str | None
    adapter_path: str | None
    priority: int
    seconds_left: float | None


class Abort(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    index: int | None = None


class LoadAdapter(msgspec.Struct, frozen=True, tag=True):
    digest: str
    path: str


class UnloadAdapter(msgspec.Struct, frozen=True, tag=True):
    digest: str


class KeepAdapters(msgspec.Struct, frozen=True, tag=True):
    paths: dict[str, str]  # by digest; it replaces the last one


class Ready(msgspec.Struct, frozen=True, tag=True):
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    device: str
    dtype: str
    kernel: str
    modules: dict[str, tuple[int, int]]  # name -> (in_features, out_features)
    kv_cache_tokens: int
    load_seconds: float


class Problem(msgspec.Struct, frozen=True, array_like=True):
    """A TuneloopError on the wire."""

    kind: str
    message: str
    param: str | None
    code: str
    retry_after: float


class Refused(msgspec.Struct, frozen=True, tag=True):
    problem: Problem


class WireLogprob(msgspec.Struct, frozen=True, array_like=True):
    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


class Token(msgspec.Struct, frozen=True, array_like=True):
    """One row's new token. `finish` is "stop" (an end or stop token), "length", or None."""

    request_id: str
    index: int
    token_id: int
    finish: str | None
    cached: int
    waited: float | None  # seconds in the queue, with the row's first token
    logprob: WireLogprob | None
    prompt_logprobs: list[WireLogprob | None] | None


class StepDone(msgspec.Struct, frozen=True, tag=True):
    tokens: list[Token]


class Failed(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    problem: Problem


class AdapterDone(msgspec.Struct, frozen=True, tag=True):
    digest: str
    problem: Problem | None


class Stats(msgspec.Struct, frozen=True, tag=True):
    running: int
    waiting: int
    kv_cache_usage: float
    prefix_cache_queries: int
    prefix_cache_hits: int
    preemptions: int
    steps: int
    adapters_on_device: list[str]
    adapters_on_cpu: list[str]
    running_adapters: list[str]
    waiting_adapters: list[str]
    max_loras: int
    rss_bytes: int


ToWorker = Submit | Abort | LoadAdapter | UnloadAdapter | KeepAdapters
FromWorker = Ready | Refused | StepDone | Failed | AdapterDone | Stats

_encoder = msgspec.msgpack.Encoder()
to_worker_decoder: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
from_worker_decoder: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


def frame(message: ToWorker | FromWorker) -> bytes:
    payload = _encoder.encode(message)
    return _LENGTH.pack(len(payload)) + payload


def frame_length(header: bytes) -> int:
    length: int = _LENGTH.unpack(header)[0]
    return length


HEADER_BYTES = _LENGTH.size


def to_problem(error: TuneloopError) -> Problem:
    retry = error.retry_after if isinstance(error, Overloaded) else 0.0
    return Problem(type(error).__name__, error.message, error.param, error.code, retry)


def from_problem(problem: Problem) -> TuneloopError:
    kind: type[TuneloopError] = getattr(errors, problem.kind, TuneloopError)
    extra: dict[str, Any] = {"retry_after": problem.retry_after} if kind is Overloaded else {}
    return kind(problem.message, param=problem.param, code=problem.code, **extra)
