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

_BLOCK = 256  # tokens whose weights are summed together
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
    def cuts(self) -> bool:
        p = self.params
        return p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0

    @property
    def changes_logits(self) -> bool:
        return self.has_penalties or bool(self.params.logit_bias) or self.given < self.params.min_tokens


def sample(logits: Tensor, states: Sequence[SamplerState]) -> list[int]:
    """logits [rows, vocab] float32, not changed; one token id a row. A row whose logits aren't finite gives -1."""
    best, tokens = _best(logits)
    finite = torch.isfinite(best).tolist()
    adjusted: dict[int, Tensor] = {}
    drawing: list[int] = []
    for row, state in enumerate(states):
        if not finite[row]:
            tokens[row] = -1
            continue
        if state.changes_logits:
            adjusted[row] = _adjusted(logits[row].clone(), state)
        if state.params.temperature > 0:
            drawing.append(row)
        elif row in adjusted:
            tokens[row] = int(adjusted[row].argmax())
    if drawing:
        scores = logits[drawing] if len(drawing) < len(states) or adjusted else logits
        for number, row in enumerate(drawing):
            if row in adjusted:
                scores[number] = adjusted[row]
        for row, token in zip(drawing, _draw(scores, [states[r] for r in drawing]), strict=True):
            tokens[row] = token
    return tokens


def _best(logits: Tensor) -> tuple[Tensor, list[int]]:
    """The largest logit of each row [rows] and its token: block by block, as a search for the place is slow."""
    blocks = _in_blocks(logits, -torch.inf)
    peaks = blocks.amax(-1)
    best, at = peaks.max(-1)
    inside = blocks[torch.arange(blocks.shape[0], device=logits.device), at].argmax(-1)
    return best, (at * _BLOCK + inside).tolist()


def _in_blocks(rows: Tensor, filler: float) -> Tensor:
    """[rows, vocab] -> [rows, blocks, _BLOCK]; the last block is filled up."""
    missing = -rows.shape[1] % _BLOCK
    padded = torch.nn.functional.pad(rows, (0, missing), value=filler) if missing else rows
    return padded.view(rows.shape[0], -1, _BLOCK)


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


def _draw(scores: Tensor, states: Sequence[SamplerState]) -> list[int]:
    """Inverse-CDF sampling from scores [rows, vocab]: one uniform number a token, whatever else is in the batch."""
    uniforms = [_uniform(state) for state in states]
    cold = torch.tensor([max(s.params.temperature, _COLDEST) for s in states], device=scores.device)
    weights = (scores - scores.amax(-1, keepdim=True)).div_(cold[:, None]).exp_()  # the most likely token weighs 1
    plain = [i for i, s in enumerate(states) if not s.cuts]
    cut = [i for i, s in enumerate(states) if s.cuts]
    tokens = [0] * len(states)
    if plain:
        rows = weights if len(plain) == len(states) else weights[plain]
        for i, token in zip(plain, _pick_rows(rows, [uniforms[i] for i in plain]), strict=True):
            tokens[i] = token
    if cut:
        vocab = weights.shape[1]
        rows = weights if len(cut) == len(states) else weights[cut]
        width = min(max([_NUCLEUS, *(states[i].params.top_k for i in cut)]), vocab)
        values, ids = torch.topk(rows, width)
        totals = rows.sum(-1, dtype=torch.float64).tolist()
        for number, i in enumerate(cut):
            p = states[i].params
            best, index = values[number], ids[number]
            if not _covers(best, totals[number], p) and width < vocab:
                best, index = torch.sort(rows[number], descending=True)
            tokens[i] = int(index[_pick(_kept(best, totals[number], p), uniforms[i])])
    return tokens


def _uniform(state: SamplerState) -> float:
    assert state.generator is not None
    return float(torch.rand((), generator=state.generator, dtype=torch.float64))


def _covers(best: Tensor, total: float, p: SamplingParams) -> bool:
    """Whether the most likely tokens (weights, descending) contain all that the parameters keep."""
    if 0 < p.top_k <= best.shape[0]:
        return True
    if p.min_p > 0.0:
        return float(best[-1]) < p.min_p
    return p.top_p < 1.0 and float(best.sum()) >= p.top_p * total


def _kept(best: Tensor, total: float, p: SamplingParams) -> Tensor:
    """The weights that min_p, top_k and top_p leave, the others 0; the most likely token always stays."""
    if p.top_k:
        best = best[: p.top_k]
    if p.min_p > 0.0:
        best = torch.where(best < p.min_p, 0.0, best)
    if p.top_p < 1.0:
        if p.top_k or p.min_p:
            total = float(best.sum(dtype=torch.float64))
        before = best.double().cumsum(-1) - best
        before[0] = -1.0
        best = torch.where(before < p.top_p * total, best, 0.0)
    return best


def _pick(weights: Tensor, uniform: float) -> int:
    """The token at `uniform` of the way through weights [n]."""
    total = weights.double().cumsum(-1)
    found = int(torch.searchsorted(total, uniform * float(total[-1]), right=True))
    if found < weights.shape[0] and float(weights[found]) > 0:
        return found
    return int(weights.nonzero()[-1])


def _pick_rows(weights: Tensor, uniforms: Sequence[float]) -> list[int]:
    """`_pick` for each row of weights [rows, vocab], by sums of blocks first: most of the vocabulary is added once."""
    sums = _in_blocks(weights, 0.0).sum(-1)
    ends = sums.double().cumsum(-1)
    targets = torch.tensor(uniforms, dtype=torch.float64, device=weights.device) * ends[:, -1]
    blocks = torch.searchsorted(ends, targets[:, None], right=True)[:, 0].clamp_(max=sums.shape[1] - 1).tolist()
    picked: list[int] = []
    for row, block in enumerate(blocks):
        while float(sums[row, block]) == 0.0:
            block -= 1  # rounding put the target behind the last token that can come
        first = block * _BLOCK
        inside = weights[row, first : first + _BLOCK].double().cumsum(-1)
        left = float(targets[row] - ends[row, block] + sums[row, block])
        found = int(torch.searchsorted(inside, left, right=True))
        if found >= inside.shape[0] or float(weights[row, first + found]) == 0.0:
            found = int(weights[row, first : first + _BLOCK].nonzero()[-1])
        picked.append(first + found)
    return picked


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
