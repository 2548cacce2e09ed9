"""Chooses each row's next token from its logits. Every row has its own parameters and its own random stream.

Vectorised where rows agree (greedy) and exact where they differ: nucleus sampling looks at the most likely tokens
first and sorts the whole vocabulary only for rows whose nucleus is wider. Order as in vLLM: logit_bias, min_tokens,
penalties, temperature, min_p, top_k, top_p.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..base import SamplingParams, TokenLogprob

_NUCLEUS = 256  # tokens looked at before the whole vocabulary is sorted
_COLDEST = 1e-6  # temperatures below it choose the same tokens and would overflow


@dataclass(slots=True)
class SamplerState:
    """What one row's sampling remembers: its random stream, and which tokens it has seen and given."""

    params: SamplingParams
    stop_ids: frozenset[int]  # tokens that end this row
    generator: torch.Generator | None
    prompt_tokens: Tensor | None = None  # unique ids of the prompt, for the repetition penalty
    counts: Counter[int] = field(default_factory=Counter)
    given: int = 0

    @classmethod
    def start(cls, params: SamplingParams, prompt: Sequence[int], eos: frozenset[int], index: int) -> "SamplerState":
        stop = params.stop_token_ids | (frozenset() if params.ignore_eos else eos)
        generator = None
        if params.temperature > 0:
            generator = torch.Generator()
            if params.seed is None:
                generator.seed()
            else:
                generator.manual_seed((params.seed + index * 0x9E3779B97F4A7C15) % (1 << 63))
        seen = torch.tensor(sorted(set(prompt)), dtype=torch.long) if params.repetition_penalty != 1.0 else None
        return cls(params, stop, generator, seen)

    def took(self, token: int) -> None:
        self.given += 1
        if self.has_penalties:
            self.counts[token] += 1

    @property
    def has_penalties(self) -> bool:
        p = self.params
        return p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0

    @property
    def changes_logits(self) -> bool:
        return self.has_penalties or bool(self.params.logit_bias) or self.given < self.params.min_tokens


def sample(logits: Tensor, states: Sequence[SamplerState]) -> list[int]:
    """logits [rows, vocab] float32, not changed; one token id a row. A row whose logits aren't finite gives -1."""
    best, ids = logits.max(-1)
    tokens: list[int] = ids.tolist()
    finite = torch.isfinite(best).tolist()
    for row, state in enumerate(states):
        if not finite[row]:
            tokens[row] = -1
            continue
        if not state.changes_logits and state.params.temperature == 0:
            continue
        scores = logits[row]
        if state.changes_logits:
            scores = _adjusted(scores.clone(), state)
        tokens[row] = int(scores.argmax()) if state.params.temperature == 0 else _draw(scores, state)
    return tokens


def _adjusted(scores: Tensor, state: SamplerState) -> Tensor:
    p = state.params
    if p.logit_bias:
        index = torch.tensor(list(p.logit_bias), device=scores.device)
        scores[index] += torch.tensor(list(p.logit_bias.values()), dtype=scores.dtype, device=scores.device)
    if state.given < p.min_tokens and state.stop_ids:
        scores[torch.tensor(sorted(state.stop_ids), device=scores.device)] = -torch.inf
    if state.has_penalties:
        _penalise(scores, state)
    return scores


def _penalise(scores: Tensor, state: SamplerState) -> None:
    p = state.params
    given = torch.tensor(list(state.counts), dtype=torch.long)
    if p.repetition_penalty != 1.0:
        assert state.prompt_tokens is not None
        seen = torch.tensor(sorted({*state.prompt_tokens.tolist(), *state.counts}), device=scores.device)
        value = scores[seen]
        scores[seen] = torch.where(value > 0, value / p.repetition_penalty, value * p.repetition_penalty)
    if given.numel():
        index = given.to(scores.device)
        times = torch.tensor(list(state.counts.values()), dtype=scores.dtype, device=scores.device)
        scores[index] -= p.frequency_penalty * times + p.presence_penalty


def _draw(scores: Tensor, state: SamplerState) -> int:
    """Inverse-CDF sampling: one uniform number a token, so that a seed gives the same tokens in any batch."""
    p = state.params
    assert state.generator is not None
    uniform = float(torch.rand((), generator=state.generator, dtype=torch.float64))
    vocab = scores.shape[0]
    probabilities = torch.softmax((scores - scores.max()) / max(p.temperature, _COLDEST), -1)
    if p.top_k == 0 and p.top_p >= 1.0 and p.min_p == 0.0:
        return _pick(probabilities, uniform)
    width = min(p.top_k or _NUCLEUS, vocab)
    values, index = torch.topk(probabilities, width)
    narrow = p.top_k == 0 and width < vocab
    if narrow and not _covers(values, p):
        values, index = torch.sort(probabilities, descending=True)
    if p.min_p > 0.0:
        values = torch.where(values < p.min_p * values[0], 0.0, values)
    if p.top_p < 1.0:
        if p.top_k or p.min_p:
            values = values / values.sum()
        before = values.cumsum(-1) - values
        before[0] = -1.0  # the most likely token always stays
        values = torch.where(before < p.top_p, values, 0.0)
    return int(index[_pick(values, uniform)])


def _covers(values: Tensor, p: SamplingParams) -> bool:
    """Whether the most likely tokens contain all that top_p or min_p would keep."""
    if p.min_p > 0.0 and float(values[-1]) < p.min_p * float(values[0]):
        return True
    return p.min_p == 0.0 and p.top_p < 1.0 and float(values.sum()) >= p.top_p


def _pick(weights: Tensor, uniform: float) -> int:
    total = weights.double().cumsum(-1)
    found = int(torch.searchsorted(total, uniform * float(total[-1]), right=True))
    if found < weights.shape[0] and float(weights[found]) > 0:
        return found
    return int(weights.nonzero()[-1])


def token_logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Log-probabilities of `tokens` [rows] under raw logits [rows, vocab], with ranks and the `top` best ones."""
    logprobs = torch.log_softmax(logits, -1)
    chosen = torch.tensor(tokens, device=logits.device)[:, None]
    own = logprobs.gather(1, chosen)
    ranks = (logprobs > own).sum(-1) + 1
    values, ids = torch.topk(logprobs, min(top, logits.shape[1])) if top else (own[:, :0], chosen[:, :0])
    return [
        TokenLogprob(token, value, rank, tuple(zip(best_ids, best, strict=True)))
        for token, value, rank, best_ids, best in zip(
            tokens, own[:, 0].tolist(), ranks.tolist(), ids.tolist(), values.tolist(), strict=True
        )
    ]
