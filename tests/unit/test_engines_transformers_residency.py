"""Adapters between device slots, host memory and disk: bounded, least recently used first, forgotten when told."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tuneloop.engines.transformers.protocol import AdapterDone, LoadAdapter
from tuneloop.engines.transformers.residency import AdapterResidency

from tests.support.engine import engine_core
from tests.support.stub_model import BYTES_PER_TOKEN, Shelf, shelf, stub_model

__all__ = ["shelf"]

A_PATH = Path("/a")


@contextmanager
def residency(slots: int = 2, cpu_bytes: int = 1000) -> Iterator[AdapterResidency]:
    found = AdapterResidency({}, slots, 64, cpu_bytes, lambda: None)
    try:
        yield found
        found.check_integrity()
    finally:
        found.close()
        assert found._thread is not None
        found._thread.join(30)  # what is still queued is read from this test's shelf


def until(condition: Callable[[], object]) -> None:
    for _ in range(5000):
        if condition():
            return
        time.sleep(0.001)
    raise AssertionError("the loader is silent")


def bring(adapters: AdapterResidency, *digests: str) -> None:
    """Claim and release each in turn, waiting for its load."""

    def claimed(digest: str) -> bool:
        adapters.collect()
        return adapters.claim(digest, A_PATH) is not None

    for digest in digests:
        until(partial(claimed, digest))
        adapters.release(digest)


def test_the_least_recently_used_adapter_gives_up_its_slot(shelf: Shelf) -> None:
    with residency() as adapters:
        bring(adapters, "a", "b", "a", "c")
        assert set(adapters.on_device) == {"a", "c"}
        assert shelf.reads == ["a", "b", "c"]


def test_used_slots_are_never_taken(shelf: Shelf) -> None:
    with residency() as adapters:
        bring(adapters, "a", "b", "c")
        held = [adapters.claim(d, A_PATH) for d in ("b", "c")]
        assert all(held)
        assert adapters.claim("a", A_PATH) is None and adapters.waits_for_slot("a")
        adapters.release("c")
        assert adapters.claim("a", A_PATH) is not None
        assert set(adapters.on_device) == {"a", "b"}


def test_an_evicted_adapter_comes_back_from_host_memory(shelf: Shelf) -> None:
    with residency(slots=1) as adapters:
        bring(adapters, "a", "b", "a", "b")
        assert shelf.reads == ["a", "b"]


def test_host_memory_is_bounded(shelf: Shelf) -> None:
    shelf.size = 400
    with residency(slots=1, cpu_bytes=1000) as adapters:
        bring(adapters, "a", "b", "c")
        assert adapters.on_host == ["b", "c"]
        bring(adapters, "a")
        assert shelf.reads == ["a", "b", "c", "a"]


def test_concurrent_requests_share_one_read(shelf: Shelf) -> None:
    gate = shelf.slow("a")
    with residency() as adapters:
        assert [adapters.claim("a", A_PATH) for _ in range(3)] == [None] * 3
        gate.set()
        until(adapters.collect)
        assert [adapters.claim("a", A_PATH) is not None for _ in range(3)] == [True] * 3
        assert shelf.reads == ["a"]


def test_a_forgotten_adapter_leaves_at_once_or_with_its_last_user(shelf: Shelf) -> None:
    with residency() as adapters:
        bring(adapters, "a", "b")
        assert adapters.claim("a", A_PATH) and adapters.claim("a", A_PATH)
        adapters.forget("a")
        adapters.forget("b")
        adapters.forget("unknown")
        assert (adapters.on_device, adapters.on_host) == (["a"], [])
        adapters.release("a")
        assert adapters.on_device == ["a"]
        adapters.release("a")
        assert adapters.on_device == []


def test_a_new_load_keeps_what_was_forgotten(shelf: Shelf) -> None:
    with residency() as adapters:
        bring(adapters, "a")
        assert adapters.claim("a", A_PATH)
        adapters.forget("a")
        adapters.request("a", A_PATH)
        adapters.release("a")
        assert adapters.on_device == ["a"]


def test_what_is_forgotten_while_it_is_read_does_not_arrive(shelf: Shelf) -> None:
    gate = shelf.slow("a")
    with residency() as adapters:
        adapters.request("a", A_PATH)
        adapters.forget("a")
        gate.set()
        bring(adapters, "b")
        assert adapters.on_host == ["b"]


def test_a_failed_read_is_told_once_and_tried_again_on_request(shelf: Shelf) -> None:
    shelf.broken.add("a")
    with residency() as adapters:
        adapters.request("a", A_PATH)
        until(lambda: not adapters._done.empty())
        assert [d for d, error in adapters.collect() if error is not None] == ["a"]
        assert adapters.collect() == []
        shelf.broken.clear()
        bring(adapters, "a")
        assert adapters.on_device == ["a"]


def test_kept_adapters_leave_last(shelf: Shelf) -> None:
    shelf.size = 400
    with residency(slots=2, cpu_bytes=1000) as adapters:
        adapters.keep({"a": A_PATH})
        bring(adapters, "a", "b", "c", "d")
        assert set(adapters.on_device) == {"a", "d"} and "a" in adapters.on_host
        adapters.keep({})
        bring(adapters, "e", "f")
        assert set(adapters.on_device) == {"e", "f"}


@given(
    st.lists(st.tuples(st.sampled_from(["claim", "release", "forget", "wait"]), st.sampled_from("abcd")), max_size=60),
    st.integers(1, 3),
    st.sampled_from([0, 25, 1000]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_slots_and_users_add_up(shelf: Shelf, steps: list[tuple[str, str]], slots: int, cpu_bytes: int) -> None:
    users: dict[str, int] = {}
    with residency(slots, cpu_bytes) as adapters:
        for step, digest in steps:
            if step == "claim" and adapters.claim(digest, A_PATH) is not None:
                users[digest] = users.get(digest, 0) + 1
            elif step == "release" and users.get(digest):
                adapters.release(digest)
                users[digest] -= 1
            elif step == "forget":
                adapters.forget(digest)
                assert digest not in adapters.on_host
            elif step == "wait":
                adapters.collect()
            adapters.check_integrity()
            assert all(d in adapters.on_device for d, n in users.items() if n)
            places = {(r.slot.rank_class, r.slot.index) for r in adapters._device.values()}
            assert len(places) == len(adapters.on_device) <= slots


def test_every_load_is_answered_though_host_memory_holds_one(shelf: Shelf) -> None:
    """Several loads that finish in one turn push each other out of host memory; none may wait for ever."""
    gates = [shelf.slow(d) for d in "abc"]
    bounds = {"kv_cache_bytes": 1024 * BYTES_PER_TOKEN, "prefix_cache_bytes": 0}
    with engine_core(stub_model(), adapter_cpu_bytes=5, max_loras=1, **bounds) as crank:
        crank.turn(*(LoadAdapter(d, "/a") for d in "abc"))
        for gate in gates:
            gate.set()
        until(lambda: crank.scheduler.adapters._done.qsize() == 3)
        crank.turn()
        assert sorted(m.digest for m in crank.sent if isinstance(m, AdapterDone)) == ["a", "b", "c"]


@pytest.mark.parametrize("count", [1, 3, 9, 33])
def test_slots_grow_with_the_adapters(shelf: Shelf, count: int) -> None:
    with residency(slots=32) as adapters:
        bring(adapters, *(f"d{i}" for i in range(count)))
        assert len(adapters.on_device) == min(count, 32)
