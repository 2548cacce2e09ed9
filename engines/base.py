"""The Engine contract: token ids and adapters in, token chunks out. It knows nothing of HTTP, users or chat roles.

One engine serves one base model with any number of LoRA adapters. Implementations: `transformers/` (our own worker
process) and `fake.py` (scripted, for fast tests). All methods are called from the event loop and never block it.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..adapters.base import AdapterVersion, ModuleShape

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen. Names and meanings are vLLM's; values are validated at the edge.

    Penalties see the prompt (repetition) and the output (repetition, presence, frequency), as in vLLM.
    Order: logit_bias, min_tokens, penalties, temperature, min_p, top_k, top_p.
    """

    n: int = 1  # completions per prompt; the prompt is prefilled once
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None  # the same seed and prompt give the same tokens, whatever else is in the batch
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()  # cut from the output unless include_stop; may span tokens
    include_stop: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    min_tokens: int = 0  # no stop token is sampled and no stop string ends the row before this many tokens
    max_tokens: int = 16  # already clipped to the context by the caller
    logprobs: int | None = None  # None: off; k: the sampled token's and the k most likely ones' log-probabilities
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """One prompt. `deadline` is a `time.monotonic()` value; past it the rows end with DeadlineExceeded."""

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    adapter: AdapterVersion | None = None
    priority: int = 0  # lower runs first, as in vLLM
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token under the model's raw distribution (before temperature, penalties and bias).

    `rank` starts at 1; `top` holds the k most likely tokens as (id, logprob), best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Chunk:
    """What one row (completion `index`) gained since its last chunk. The last chunk of a row has a finish_reason.

    `text` never ends inside a character; text that could be the beginning of a stop string is held back.
    `prompt_logprobs` (first chunk only, if asked for) has one entry a prompt token, None for the first.
    """

    index: int
    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token id or stop string; None for EOS
    cached_tokens: int = 0  # prompt tokens that came from the prefix cache (first chunk only)
    queue_seconds: float | None = None  # from arrival until a row was first taken up (first chunk only)
    prompt_logprobs: list[TokenLogprob | None] | None = None


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What a loaded model is. `modules` are the linear modules that an adapter may target, by their PEFT name."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    device: str
    dtype: str
    kernel: str  # which matrix kernels were chosen and why
    modules: Mapping[str, ModuleShape]
    kv_cache_tokens: int  # capacity of the KV pool
    load_seconds: float
    pid: int | None = None


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """A snapshot for metrics, readiness and tests. Adapter keys are digests."""

    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0  # 0..1
    prefix_cache_queries: int = 0  # tokens, cumulative
    prefix_cache_hits: int = 0  # tokens, cumulative
    preemptions: int = 0  # cumulative
    steps: int = 0  # cumulative
    adapters_on_device: Sequence[str] = ()
    adapters_on_cpu: Sequence[str] = ()
    running_adapters: Sequence[str] = ()
    waiting_adapters: Sequence[str] = ()
    max_loras: int = 0
    rss_bytes: int = 0


class Engine(ABC):
    """One base model that generates.

    After `start()` returned, everything else may be called at any time and concurrently. When the engine has died
    (`alive` is False) every call raises Unavailable with the reason; the registry then starts a new one.
    """

    @abstractmethod
    async def start(self) -> EngineInfo:
        """Load the model. Raises InvalidInput if it cannot be served, Unavailable if the worker dies meanwhile."""

    @property
    @abstractmethod
    def info(self) -> EngineInfo: ...

    @property
    @abstractmethod
    def death(self) -> str | None:
        """Why the engine does not run (it died, was closed, or was never started); None while it does."""

    @property
    def alive(self) -> bool:
        return self.death is None

    @abstractmethod
    def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """Stream the chunks of all `sampling.n` rows, interleaved, until each has finished.

        Closing the iterator frees the rows at once. A request for an adapter that is not loaded waits for that load
        and delays nobody else. Raises, before the first chunk where it can: Overloaded when the queue is full,
        ContextTooLong, InvalidInput (a token id outside the vocabulary, an adapter that the engine cannot hold),
        DeadlineExceeded, Unavailable when the engine dies.
        """

    @abstractmethod
    async def load_adapter(self, version: AdapterVersion) -> None:
        """Make a version resident ahead of its first request. Loading twice is safe. Raises InvalidInput if unfit."""

    @abstractmethod
    async def unload_adapter(self, digest: str) -> None:
        """Forget a version: its weights leave memory when its last running request ends. Unknown digests are safe."""

    @abstractmethod
    async def keep_adapters(self, versions: Sequence[AdapterVersion]) -> None:
        """Load these versions and keep them in memory until the next call says otherwise; it replaces the last one.

        Kept ones leave device slots only when every slot is kept and another adapter is asked for.
        """

    @abstractmethod
    def stats(self) -> EngineStats:
        """The latest snapshot; costs nothing."""

    @abstractmethod
    async def close(self) -> None:
        """End the worker and give its memory back. Requests still in flight fail with Unavailable. Safe to repeat."""
