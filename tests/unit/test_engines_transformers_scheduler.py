"""The scheduler under a stub model: whatever it does to a row, the row's tokens stay what they are alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tuneloop.engines.transformers import scheduler as scheduler_module
from tuneloop.engines.transformers.protocol import Abort, LoadAdapter, Submit, ToWorker, UnloadAdapter

from tests.support.engine import Crank, engine_core, greedy, submit
from tests.support.stub_model import (
    BROKEN_TOKEN,
    BYTES_PER_TOKEN,
    Shelf,
    StubExecutor,
    expected,
    shelf,
    stub_model,
)

__all__ = ["shelf"]


@contextmanager
def stub_core(pool_tokens: int = 4096, prefix_tokens: int = 512, **changes: Any) -> Iterator[Crank]:
    model = stub_model()
    fields = {
        "kv_cache_bytes": pool_tokens * BYTES_PER_TOKEN,
        "prefix_cache_bytes": prefix_tokens * BYTES_PER_TOKEN,
        "max_num_batched_tokens": 64,
        **changes,
    }
    with engine_core(model, **fields) as crank:
        assert isinstance(model.executor, StubExecutor)
        model.executor.adapters = crank.scheduler.adapters
        yield crank


def steps_of(crank: Crank) -> list[tuple[int, int]]:
    executor = crank.core._model.executor
    assert isinstance(executor, StubExecutor)
    return executor.steps


def prompt(length: int, seed: int = 0) -> list[int]:
    return [(seed * 7 + i * i) % 90 + 3 for i in range(length)]


def turn_until(crank: Crank, done: Any, turns: int = 2000) -> None:
    while not done():
        turns -= 1
        assert turns > 0
        crank.turn()


requests = st.lists(
    st.fixed_dictionaries(
        {
            "length": st.sampled_from([1, 2, 15, 16, 17, 60, 200, 255, 300]),
            "seed": st.integers(0, 2),
            "output": st.sampled_from([1, 2, 5, 60]),
            "n": st.sampled_from([1, 1, 1, 3]),
            "adapter": st.sampled_from([None, None, "sha256:a", "sha256:b", "sha256:c"]),
            "priority": st.integers(-1, 1),
            "wait": st.integers(0, 6),  # turns before it is sent
            "abort": st.none() | st.integers(0, 40),  # turns until it is aborted
            "logprobs": st.sampled_from([None, None, None, 0]),
        }
    ),
    min_size=1,
    max_size=8,
)


@given(
    requests, st.sampled_from([700, 1100, 4096]), st.sampled_from([0, 128, 2048]), st.integers(1, 3), st.integers(1, 5)
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_give_their_own_tokens_whatever_happens_around_them(
    shelf: Shelf, plans: list[dict[str, Any]], pool: int, prefix: int, slots: int, rows: int
) -> None:
    with stub_core(pool, prefix, max_loras=slots, max_num_seqs=rows) as crank:
        clock = 0
        pending = {f"r{i}": plan for i, plan in enumerate(plans)}
        aborts: dict[str, int] = {}
        while pending or crank.scheduler.running or crank.scheduler.waiting:
            messages: list[ToWorker] = []
            for name in [n for n, p in pending.items() if p["wait"] <= clock]:
                plan = pending.pop(name)
                if plan["abort"] is not None:
                    aborts[name] = clock + plan["abort"]
                sampling = greedy(plan["output"], n=plan["n"], prompt_logprobs=plan["logprobs"])
                adapter = (plan["adapter"], "/a") if plan["adapter"] else None
                tokens = prompt(plan["length"], plan["seed"])
                messages.append(submit(name, tokens, sampling, adapter=adapter, priority=plan["priority"]))
            messages += [Abort(name) for name in [n for n, at in aborts.items() if at <= clock]]
            crank.turn(*messages)
            clock += 1
            assert clock < 20_000, "no progress"
        assert not crank.failed
        for number, plan in enumerate(plans):
            for index in range(plan["n"]):
                got = crank.ids(f"r{number}/{index}")
                whole = expected(prompt(plan["length"], plan["seed"]), plan["output"], plan["adapter"])
                assert got == whole[: len(got)]
                if plan["abort"] is None:
                    assert got == whole
        assert crank.scheduler.pool.usage == 0
        assert all(r.users == 0 for r in crank.scheduler.adapters._device.values())


def test_preempted_rows_go_on_where_they_were() -> None:
    with stub_core(pool_tokens=1024) as crank:
        crank.run(*(submit(f"r{i}", prompt(250, i), greedy(40)) for i in range(4)))
        assert crank.scheduler.preemptions > 0
        for i in range(4):
            assert crank.ids(f"r{i}/0") == expected(prompt(250, i), 40)


def test_the_last_arrival_is_preempted_and_the_first_never() -> None:
    with stub_core(pool_tokens=1024, max_num_batched_tokens=2048) as crank:
        crank.run(*(submit(f"r{i}", prompt(250, i), greedy(40)) for i in range(4)))
        ends = list(crank.finished)
        assert ends[0] == "r0/0" and ends[-1] == "r3/0"


def test_lower_priority_numbers_run_first() -> None:
    with stub_core(max_num_seqs=1) as crank:
        crank.run(
            submit("late", prompt(20), greedy(3), priority=5),
            submit("soon", prompt(20), greedy(3), priority=-5),
            submit("between", prompt(20), greedy(3)),
        )
        assert list(crank.finished) == ["soon/0", "between/0", "late/0"]


def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    with stub_core(max_waiting=3, max_num_seqs=1) as crank:
        crank.turn(*(submit(f"r{i}", prompt(5), greedy(9)) for i in range(3)))
        crank.turn(*(submit(f"s{i}", prompt(5), greedy(9)) for i in range(2)))
        problem = crank.failed["s1"].problem
        assert (problem.kind, "s0" in crank.failed) == ("Overloaded", False)
        assert problem.retry_after >= 1.0
        crank.run()
        assert len(crank.finished) == 4


def test_all_rows_of_a_request_are_queued_or_none() -> None:
    with stub_core(max_waiting=3) as crank:
        crank.turn(submit("wide", prompt(5), greedy(2, n=4)))
        assert crank.failed["wide"].problem.kind == "Overloaded"
        assert not crank.scheduler.waiting


def test_rows_past_their_deadline_fail_waiting_or_running(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    fake = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(scheduler_module, "time", fake)
    monkeypatch.setattr("tuneloop.engines.transformers.core.time", fake)
    with stub_core(max_num_seqs=1) as crank:
        crank.turn(
            submit("runs", prompt(5), greedy(100, n=1), seconds_left=5.0),
            submit("waits", prompt(5), greedy(100, n=2), seconds_left=5.0),
            submit("patient", prompt(5), greedy(3)),
        )
        assert [r.request_id for r in crank.scheduler.running] == ["runs"]
        now += 6
        crank.run()
        assert {k: f.problem.kind for k, f in crank.failed.items()} == dict.fromkeys(
            ("runs", "waits"), "DeadlineExceeded"
        )
        assert list(crank.finished) == ["patient/0"]


def test_a_deadline_that_has_passed_before_it_came_runs_no_step() -> None:
    with stub_core() as crank:
        crank.turn(submit("late", prompt(5), greedy(3), seconds_left=-1.0))
        assert crank.failed["late"].problem.kind == "DeadlineExceeded" and not steps_of(crank)


def test_running_streams_gain_a_token_in_every_step_of_a_long_prompt() -> None:
    with stub_core(max_num_batched_tokens=32) as crank:
        crank.turn(*(submit(f"s{i}", prompt(5, i), greedy(60)) for i in range(3)))
        crank.turn(submit("long", prompt(600), greedy(2)))
        while "long/0" not in crank.tokens:
            before = {n: len(crank.ids(n)) for n in ("s0/0", "s1/0", "s2/0")}
            crank.turn()
            assert all(len(crank.ids(n)) == had + 1 for n, had in before.items())
        assert max(tokens for tokens, _ in steps_of(crank)[1:]) <= 32


def test_the_prompt_of_n_completions_is_computed_once() -> None:
    with stub_core(prefix_tokens=0, max_num_batched_tokens=512) as crank:
        crank.run(submit("wide", prompt(100), greedy(5, n=4)))
        assert sum(tokens for tokens, _ in steps_of(crank)) == 100
        assert all(crank.ids(f"wide/{i}") == expected(prompt(100), 5) for i in range(4))


def test_aborting_one_of_n_leaves_the_others() -> None:
    with stub_core() as crank:
        crank.turn(submit("wide", prompt(40), greedy(5, n=3)))
        crank.run(Abort("wide", 0))
        assert set(crank.finished) == {"wide/1", "wide/2"}


def test_an_adapter_that_loads_slowly_delays_nobody(shelf: Shelf) -> None:
    gate = shelf.slow("sha256:slow")
    with stub_core() as crank:
        crank.turn(submit("cold", prompt(5), greedy(3), adapter=("sha256:slow", "/a")))
        crank.turn(submit("base", prompt(5), greedy(3)), submit("plain", prompt(9), greedy(3)))
        turn_until(crank, lambda: len(crank.finished) == 2)
        assert "cold/0" not in crank.tokens
        gate.set()
        turn_until(crank, lambda: len(crank.finished) == 3)
        assert crank.ids("cold/0") == expected(prompt(5), 3, "sha256:slow")


def test_a_request_for_an_adapter_that_cannot_be_loaded_fails_with_its_reason(shelf: Shelf) -> None:
    shelf.broken.add("sha256:bad")
    with stub_core() as crank:
        crank.turn(
            submit("bad", prompt(5), greedy(3, n=2), adapter=("sha256:bad", "/a")),
            submit("good", prompt(5), greedy(3), adapter=("sha256:good", "/a")),
        )
        turn_until(crank, lambda: crank.finished and crank.failed)
        assert crank.failed["bad"].problem.message == "sha256:bad is broken."
        assert list(crank.finished) == ["good/0"]


def test_busy_adapters_do_not_starve_one_that_waits_for_a_slot(shelf: Shelf) -> None:
    """Requests for adapter `a` overlap without end; `b` gets the only slot after a bounded number of them."""
    with stub_core(max_loras=1, max_num_seqs=4) as crank:
        a, b = ("sha256:a", "/a"), ("sha256:b", "/b")
        crank.turn(submit("a0", prompt(5), greedy(7), adapter=a), LoadAdapter("sha256:b", "/b"))
        turn_until(crank, lambda: "sha256:b" in crank.scheduler.adapters.on_host or "a0/0" in crank.tokens)
        crank.turn(submit("b", prompt(5), greedy(3), adapter=b))
        limit = crank.scheduler.limits.max_passed
        for number in range(1, 40 * limit):
            messages: list[Submit] = []
            if len(crank.scheduler.waiting) < 4:
                messages.append(submit(f"a{number}", prompt(5), greedy(7), adapter=a))
            crank.turn(*messages)
            if "b/0" in crank.finished:
                break
        assert "b/0" in crank.finished
        overtook = sum(1 for name in crank.finished if name.startswith("a"))
        assert overtook <= limit + 8
        crank.run()
        assert all(f == "length" for f in crank.finished.values())


def test_one_failing_row_ends_its_request() -> None:
    with stub_core(max_num_seqs=2) as crank:
        biased = greedy(9, n=3, logit_bias={BROKEN_TOKEN: 100.0})  # each row's second token is broken
        crank.run(submit("bad", prompt(20), biased), submit("good", prompt(20), greedy(9)))
        assert crank.failed["bad"].problem.code == "not_finite"
        assert crank.ids("good/0") == expected(prompt(20), 9)


@pytest.mark.parametrize("turns", [1, 2, 3, 4])
def test_broken_numbers_of_an_aborted_prompt_reach_nobody(turns: int) -> None:
    """NaN in a slot that no logits have shown yet: neither the next row there nor the prefix cache may get it."""
    bad = [*prompt(40), BROKEN_TOKEN, *prompt(60)]
    with stub_core(max_num_batched_tokens=48) as crank:
        crank.turn(submit("bad", bad, greedy(5)))
        for _ in range(turns - 1):
            crank.turn()
        crank.turn(Abort("bad"))
        crank.run(submit("next", prompt(20), greedy(5)), submit("again", [*prompt(40), 5], greedy(5)))
        assert crank.ids("next/0") == expected(prompt(20), 5)
        assert crank.ids("again/0") == expected([*prompt(40), 5], 5)


def test_a_broken_prompt_is_not_cached() -> None:
    bad = [*prompt(40), BROKEN_TOKEN, *prompt(60)]
    with stub_core() as crank:
        crank.run(submit("bad", bad, greedy(5)))
        assert crank.failed["bad"].problem.code == "not_finite"
        assert len(crank.scheduler.prefix) == 0


def test_a_repeated_prompt_is_read_from_the_prefix_cache() -> None:
    with stub_core() as crank:
        crank.run(submit("first", prompt(100), greedy(4)))
        crank.run(submit("second", prompt(100), greedy(4)))
        assert crank.ids("second/0") == crank.ids("first/0") == expected(prompt(100), 4)
        assert [crank.tokens[f"{n}/0"][0].cached for n in ("first", "second")] == [0, 96]
        assert (crank.scheduler.prefix_queries, crank.scheduler.prefix_hits) == (200, 96)


def test_an_unloaded_adapter_leaves_when_its_last_row_ends(shelf: Shelf) -> None:
    with stub_core() as crank:
        adapters = crank.scheduler.adapters
        crank.turn(submit("r", prompt(5), greedy(20), adapter=("sha256:a", "/a")))
        turn_until(crank, lambda: "r/0" in crank.tokens)
        crank.turn(UnloadAdapter("sha256:a"))
        assert adapters.on_device == ["sha256:a"] and adapters.on_host == []
        crank.run()
        assert adapters.on_device == []
        assert crank.ids("r/0") == expected(prompt(5), 20, "sha256:a")
