"""The step loop over a tiny real model: log-probabilities against a direct forward, caches, preemption, refusals."""

from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from tuneloop.engines.transformers.protocol import AdapterDone, LoadAdapter, Stats, Token, UnloadAdapter

from tests.support.engine import VOCAB, Crank, checkpoint, engine_core, greedy, loaded, submit


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


@cache
def reference() -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.float32).eval()


@torch.inference_mode()
def forward(tokens: list[int]) -> torch.Tensor:
    """Log-probabilities [len(tokens), vocab] of what follows each token."""
    logits: torch.Tensor = reference()(torch.tensor([tokens])).logits[0]
    return torch.log_softmax(logits.float(), -1)


def check_entry(entry: Any, row: torch.Tensor, token: int, top: int) -> None:
    assert entry.token_id == token
    assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
    own = row[token]
    assert int((row > own + 1e-4).sum()) + 1 <= entry.rank <= int((row > own - 1e-4).sum())  # a tie may go either way
    values, _ = row.topk(top)
    assert [v for _, v in entry.top[:top]] == pytest.approx(values.tolist(), abs=1e-4)
    for token_id, value in entry.top[:top]:
        assert value == pytest.approx(float(row[token_id]), abs=1e-4)


@pytest.mark.parametrize("length", [1, 2, 24, 70])
def test_logprobs_of_output_and_prompt_are_the_models_own(length: int) -> None:
    """Chunked, beside others, with penalties and bias that the raw distribution must not show."""
    ids = prompt(length)
    changes = {"logit_bias": {5: 3.0}, "presence_penalty": 1.0, "temperature": 0.8, "seed": 1}
    with engine_core(loaded("llama"), max_num_batched_tokens=24) as crank:
        crank.run(
            submit("other", prompt(33, 1), greedy(6, logprobs=0)),
            submit("r", ids, greedy(6, logprobs=3, prompt_logprobs=2, **changes)),
        )
    said: list[Token] = crank.tokens["r/0"]
    whole = forward([*ids, *(t.token_id for t in said)])
    for number, token in enumerate(said):
        check_entry(token.logprob, whole[length - 1 + number], token.token_id, 3)
    prompts = said[0].prompt_logprobs
    assert prompts is not None and prompts[0] is None and len(prompts) == length
    for number, entry in enumerate(prompts[1:]):
        check_entry(entry, whole[number], ids[number + 1], 2)
    assert all(t.prompt_logprobs is None for t in said[1:])
    others = crank.tokens["other/0"]
    assert all(t.logprob is not None and t.prompt_logprobs is None for t in others)


def test_prompt_logprobs_are_computed_though_the_prompt_is_cached() -> None:
    ids = prompt(64)
    with engine_core(loaded("llama"), max_num_batched_tokens=40) as crank:
        crank.run(submit("first", ids, greedy(2)))
        crank.run(submit("second", ids, greedy(2, n=2, prompt_logprobs=0)))
    entries = crank.tokens["second/0"][0].prompt_logprobs
    assert entries is not None and len(entries) == 64
    whole = forward(ids)
    for number, entry in enumerate(entries[1:]):
        check_entry(entry, whole[number], ids[number + 1], 0)
    assert crank.tokens["second/1"][0].prompt_logprobs is None
    assert crank.ids("first/0") == crank.ids("second/0") == crank.ids("second/1")


def alone(ids: list[int], count: int) -> list[int]:
    with engine_core(loaded("llama")) as crank:
        crank.run(submit("r", ids, greedy(count)))
        return crank.ids("r/0")


def test_preempted_rows_of_a_real_model_go_on_where_they_were() -> None:
    prompts = [prompt(n, n) for n in (250, 200, 240, 230)]
    expected = [alone(p, 30) for p in prompts]
    with engine_core(loaded("llama")) as probe:
        per_token = probe.scheduler.pool.bytes_per_token
    with engine_core(loaded("llama"), kv_cache_bytes=900 * per_token, prefix_cache_bytes=300 * per_token) as crank:
        crank.run(*(submit(f"r{i}", p, greedy(30)) for i, p in enumerate(prompts)))
        assert crank.scheduler.preemptions > 0
        assert [crank.ids(f"r{i}/0") for i in range(4)] == expected


def test_shared_beginnings_are_computed_once_and_change_nothing() -> None:
    shared = prompt(80)
    prompts = [[*shared, *prompt(n, n)] for n in (5, 17, 30)]
    expected = [alone(p, 8) for p in prompts]
    with engine_core(loaded("llama")) as crank:
        crank.run(submit("warm", shared, greedy(1)))
        crank.run(*(submit(f"r{i}", p, greedy(8)) for i, p in enumerate(prompts)))
        assert [crank.ids(f"r{i}/0") for i in range(3)] == expected
        assert [crank.tokens[f"r{i}/0"][0].cached for i in range(3)] == [80, 80, 80]


def test_without_a_prefix_cache_nothing_is_kept() -> None:
    with engine_core(loaded("llama"), enable_prefix_caching=False) as crank:
        for name in ("a", "b"):
            crank.run(submit(name, prompt(40), greedy(3)))
        assert crank.tokens["b/0"][0].cached == 0 and len(crank.scheduler.prefix) == 0


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ({"stop_token_ids": [VOCAB], "min_tokens": 2}, "stop_token_ids"),
        ({"stop_token_ids": [-1], "min_tokens": 2}, "stop_token_ids"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_a_request_that_points_outside_is_refused_and_the_core_goes_on(changes: dict[str, Any], param: str) -> None:
    with engine_core(loaded("llama")) as crank:
        sampling = greedy(**{"max_tokens": 4, **changes})
        crank.turn(submit("bad", prompt(5), sampling))
        problem = crank.failed["bad"].problem
        assert (problem.kind, problem.param) == ("InvalidInput", param)
        crank.run(submit("bad prompt", [3, VOCAB], greedy(2)), submit("good", prompt(5), greedy(2)))
        assert crank.failed["bad prompt"].problem.param == "prompt"
        assert len(crank.ids("good/0")) == 2


def test_a_request_over_the_context_is_refused() -> None:
    with engine_core(loaded("llama"), max_num_seqs=2) as crank:
        crank.turn(submit("long", prompt(500), greedy(13)))
        assert crank.failed["long"].problem.kind == "ContextTooLong"
        crank.run(submit("fits", prompt(500), greedy(12)))
        assert len(crank.ids("fits/0")) == 12


def test_the_pool_bounds_the_context() -> None:
    with engine_core(loaded("llama")) as probe:
        per_token = probe.scheduler.pool.bytes_per_token
    with engine_core(loaded("llama"), kv_cache_bytes=300 * per_token) as crank:
        assert crank.core.max_model_len == 300
        crank.run(*(submit(f"r{i}", prompt(200), greedy(100)) for i in range(2)))
        assert crank.ids("r0/0") == crank.ids("r1/0")
        assert len(crank.ids("r0/0")) == 100
    with (
        pytest.raises(Exception, match="256 are needed at least"),
        engine_core(loaded("llama"), kv_cache_bytes=200 * per_token),
    ):
        pass


def _done(crank: Crank) -> dict[str, str | None]:
    found = [m for m in crank.sent if isinstance(m, AdapterDone)]
    return {m.digest: m.problem.kind if m.problem is not None else None for m in found}


def test_stats_tell_what_runs() -> None:
    with engine_core(loaded("llama"), max_num_seqs=2) as crank:
        crank.core._last_stats = (-10.0, 0)
        crank.turn(*(submit(f"r{i}", prompt(20), greedy(4)) for i in range(3)))
        stats = [m for m in crank.sent if isinstance(m, Stats)][-1]
        assert (stats.running, stats.waiting, stats.steps) == (2, 1, 1)
        assert 0 < stats.kv_cache_usage < 1 and stats.rss_bytes > 0
        crank.run()


def test_loads_are_told_and_unknown_unloads_are_safe() -> None:
    with engine_core(loaded("llama")) as crank:
        crank.turn(UnloadAdapter("sha256:never"), LoadAdapter("sha256:x", "/nowhere"))
        while "sha256:x" not in _done(crank):
            crank.turn()
        assert _done(crank) == {"sha256:x": "InvalidInput"}
