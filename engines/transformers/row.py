"""One row: a completion being generated, as the scheduler sees it. Token ids and counters, no tensors."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..base import SamplingParams, TokenLogprob
from .batch import AdapterSlot
from .kv import Slot
from .sampler import SamplerState


@dataclass(slots=True, eq=False)
class Row:
    """`tokens` are prompt and output; the first `computed` of them have their KV in `slot`.

    A row runs while it has a slot and waits otherwise. `leader` is the first row of the same request with n > 1: its
    prompt is prefilled once and copied.
    """

    request_id: str
    index: int
    tokens: list[int]
    prompt_length: int
    params: SamplingParams
    sampler: SamplerState
    adapter: str | None  # digest
    adapter_path: Path | None
    priority: int
    arrival: int
    deadline: float | None  # time.monotonic()
    leader: "Row | None" = None
    slot: Slot | None = None
    adapter_slot: AdapterSlot | None = None
    computed: int = 0
    proven: int = 0  # tokens whose KV is known to be finite
    passed: int = 0  # later rows that started while this one waited for a device slot
    cached: int = 0  # prompt tokens that came from the prefix cache
    queued_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None  # when it first ran; a preempted row goes before those that never ran
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])

    @property
    def remaining(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def given(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def decoding(self) -> bool:
        return self.given > 0 and self.remaining == 1

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.params.prompt_logprobs is not None and self.given == 0

    @property
    def order(self) -> tuple[int, bool, int, int]:
        """Lower runs first and is preempted last."""
        return (self.priority, self.started_at is None, self.arrival, self.index)

    def root(self) -> str:
        """The prefix cache's root: KV depends on the adapter's content, never on its name."""
        return self.adapter or ""

    @property
    def waited(self) -> float | None:
        """Seconds from its arrival until it first ran."""
        return None if self.started_at is None else self.started_at - self.queued_at

    def next_tokens(self, count: int) -> Sequence[int]:
        return self.tokens[self.computed : self.computed + count]
