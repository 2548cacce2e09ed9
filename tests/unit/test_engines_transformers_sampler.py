"""The sampler against a plain float64 reference of vLLM's rules, its seeds, and its frequencies by chi-square."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tuneloop.engines.base import SamplingParams
from tuneloop.engines.transformers.sampler import SamplerState, sample, token_logprobs

EOS = 2


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 100, **changes})


def state_of(
    p: SamplingParams, prompt: Sequence[int] = (5,), output: Sequence[int] = (), index: int = 0
) -> SamplerState:
    state = SamplerState.start(p, prompt, frozenset({EOS}), index)
    for token in output:
        state.took(token)
    return state


def reference_scores(
    logits: list[float], p: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> list[float]:
    """Bias, min_tokens, penalties."""
    scores = list(logits)
    for token, bias in p.logit_bias.items():
        scores[token] += bias
    if len(output) < p.min_tokens:
        for token in p.stop_token_ids | (frozenset() if p.ignore_eos else {EOS}):
            scores[token] = -math.inf
    for token in {*prompt, *output}:
        scores[token] = (
            scores[token] / p.repetition_penalty if scores[token] > 0 else scores[token] * p.repetition_penalty
        )
    for token, count in Counter(output).items():
        scores[token] -= p.frequency_penalty * count + p.presence_penalty
    return scores


def reference_probabilities(scores: list[float], p: SamplingParams) -> dict[int, float]:
    """Temperature, min_p, top_k, top_p; the probabilities of the tokens that stay."""
    top = max(scores)
    weights = {i: math.exp((s - top) / p.temperature) for i, s in enumerate(scores) if s > -math.inf}
    kept = {i: w for i, w in weights.items() if w >= p.min_p * max(weights.values())}
    order = sorted(kept, key=lambda i: -kept[i])
    if p.top_k:
        order = order[: p.top_k]
    total = sum(kept[i] for i in order)
    result: dict[int, float] = {}
    before = 0.0
    for i in order:
        if p.top_p < 1.0 and before >= p.top_p and result:
            break
        result[i] = kept[i]
        before += kept[i] / total
    total = sum(result.values())
    return {i: w / total for i, w in result.items()}


def edges(scores: list[float], p: SamplingParams) -> bool:
    """Whether a cut lies so near to a token's share that float32 may see it on the other side."""
    top = max(scores)
    weights = sorted((math.exp((s - top) / p.temperature) for s in scores), reverse=True)
    kept = [w for w in weights if w >= p.min_p]
    near_min = p.min_p > 0 and any(abs(w / p.min_p - 1) < 1e-4 for w in weights)
    kept = kept[: p.top_k] if p.top_k else kept
    sums, total = 0.0, sum(kept)
    for w in kept:
        sums += w / total
        if p.top_p < 1.0 and abs(sums - p.top_p) < 1e-4:
            return True
    return near_min


finite = st.floats(-8, 8, width=32)
sampling = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.01, 0.7, 1.0, 2.0]),
        "top_p": st.sampled_from([1.0, 0.95, 0.5, 0.1, 0.001]),
        "top_k": st.sampled_from([0, 1, 3, 50, 10_000]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
        "presence_penalty": st.sampled_from([0.0, 1.5, -2.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.4, -0.4]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.7]),
        "min_tokens": st.sampled_from([0, 2, 50]),
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.frozensets(st.integers(0, 9), max_size=2),
        "logit_bias": st.dictionaries(st.integers(0, 19), st.floats(-100, 100, width=32), max_size=3),
        "seed": st.integers(-(2**63), 2**63 - 1),
    }
)


@given(
    st.lists(finite, min_size=20, max_size=20, unique=True),
    sampling,
    st.lists(st.integers(0, 19), min_size=1, max_size=6),
    st.lists(st.integers(0, 19), max_size=6),
)
@settings(max_examples=300, deadline=None)
def test_only_tokens_that_the_rules_keep_are_chosen(
    logits: list[float], fields: dict[str, Any], prompt: list[int], output: list[int]
) -> None:
    p = params(**fields)
    scores = reference_scores(logits, p, prompt, output)
    best = sorted(scores, reverse=True)
    assume(best[0] - best[1] > 1e-4)
    state = state_of(p, prompt, output)
    [token] = sample(torch.tensor([logits]), [state])
    if p.temperature == 0:
        assert token == scores.index(best[0])
    else:
        assume(not edges(scores, p))
        assert token in reference_probabilities(scores, p)


@given(sampling, st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_a_wide_vocabulary_is_cut_as_a_narrow_one(fields: dict[str, Any], seed: int) -> None:
    """More tokens than the nucleus search looks at first, in a flat distribution: the cuts lie far in."""
    p = params(**{**fields, "temperature": fields["temperature"] or 1.0})
    logits = torch.randn(1200, generator=torch.Generator().manual_seed(seed)).mul_(0.3)
    scores = reference_scores(logits.tolist(), p, [5], [])
    whole = reference_probabilities(scores, params(temperature=p.temperature))
    keep = reference_probabilities(scores, p)
    smallest = min(whole[t] for t in keep) * 0.999  # float32 may cut one token earlier or later
    for index in range(5):
        [token] = sample(logits[None], [state_of(p, [5], [], index)])
        assert token in keep or whole[token] >= smallest


CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 1.7, "top_k": 4},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"temperature": 1.3, "top_p": 0.9, "top_k": 6, "min_p": 0.05},
    {"logit_bias": {3: 2.0, 7: -100.0}, "presence_penalty": 0.7, "frequency_penalty": 0.3},
    {"repetition_penalty": 1.5, "min_tokens": 9},
]


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_frequencies_are_the_probabilities(fields: dict[str, Any]) -> None:
    """Chi-square over 10 tokens and 4,000 draws of one row's own random stream, at a fixed seed."""
    logits = [1.5, 0.2, -0.3, 0.9, -1.0, 0.0, 0.6, 2.0, -2.0, 0.3]
    prompt, output, draws = [1, 4], [7, 7, 0], 4000
    p = params(seed=11, **fields)
    state = state_of(p, prompt, output)
    rows = torch.tensor([logits])
    seen = Counter(sample(rows, [state])[0] for _ in range(draws))
    keep = reference_probabilities(reference_scores(logits, p, prompt, output), p)
    assert set(seen) <= set(keep)
    common = {i: q for i, q in keep.items() if q * draws >= 5}
    chi = sum((seen[i] - q * draws) ** 2 / (q * draws) for i, q in common.items())
    assert chi < 30  # 9 degrees of freedom: once in 2,000 seeds, and the seed is fixed


def test_a_seed_gives_the_same_tokens_in_any_company() -> None:
    generator = torch.Generator().manual_seed(3)
    steps = torch.randn(20, 50, generator=generator)
    alone = state_of(params(seed=5, top_p=0.9))
    single = [sample(row[None], [alone])[0] for row in steps]
    row = state_of(params(seed=5, top_p=0.9))
    others = [state_of(params(temperature=t, seed=s)) for t, s in ((0.0, None), (1.0, 9), (2.0, None))]
    together: list[int] = []
    for number, step in enumerate(steps):
        company = torch.randn(3, 50, generator=generator)
        at = number % 4  # also elsewhere in the batch
        states = [*others[:at], row, *others[at:]]
        logits = torch.cat([company[:at], step[None], company[at:]])
        together.append(sample(logits, states)[at])
    assert together == single


def test_rows_of_one_request_and_other_seeds_differ() -> None:
    logits = torch.zeros(1, 50)
    streams = [state_of(params(seed=s), index=i) for s, i in ((1, 0), (1, 1), (1, 2), (2, 0))]
    drawn = {tuple(sample(logits, [s])[0] for _ in range(8)) for s in streams}
    assert len(drawn) == 4


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-7, 1e-3])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    logits = torch.tensor([[0.0, 30.0, -50.0, 29.9, 8.0]])
    for top_p in (1.0, 0.5):
        assert sample(logits, [state_of(params(temperature=temperature, seed=1, top_p=top_p))]) == [1]


def test_logits_that_are_not_finite_give_no_token_and_trouble_nobody() -> None:
    good = torch.tensor([0.0, 1.0, 0.5])
    rows = torch.stack([good * math.nan, good, torch.tensor([0.0, math.inf, 0.0]), torch.full((3,), -math.inf), good])
    states = [state_of(params(temperature=t, seed=1, top_k=1)) for t in (1.0, 1.0, 0.0, 1.0, 0.0)]
    assert sample(rows, states) == [-1, 1, -1, -1, 1]


def test_the_given_logits_are_not_changed() -> None:
    logits = torch.randn(2, 20)
    before = logits.clone()
    p = params(logit_bias={1: 5.0}, min_tokens=5, repetition_penalty=1.2, presence_penalty=1.0, top_p=0.5, min_p=0.1)
    sample(logits, [state_of(p, output=[3]), state_of(params(temperature=0.0, logit_bias={1: 9.0}))])
    assert torch.equal(logits, before)


@given(st.lists(finite, min_size=6, max_size=6), st.integers(0, 5), st.integers(0, 9))
@settings(deadline=None)
def test_log_probabilities_and_ranks(logits: list[float], token: int, top: int) -> None:
    [found] = token_logprobs(torch.tensor([logits]), [token], top)
    total = math.log(sum(math.exp(x) for x in logits))
    assert found.token_id == token
    assert found.logprob == pytest.approx(logits[token] - total, abs=1e-4)
    assert found.rank == 1 + sum(1 for x in logits if x > logits[token] + 1e-6) or any(
        0 < abs(x - logits[token]) < 1e-5 for x in logits
    )
    assert [v for _, v in found.top] == pytest.approx(sorted((x - total for x in logits), reverse=True)[:top], abs=1e-4)
    assert len({i for i, _ in found.top}) == min(top, 6)
