"""The KV pool: never over its bound, no slot twice, and a row's keys and values survive whatever moves them."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, MultipleResults, RuleBasedStateMachine, consumes, invariant, multiple, rule
from tuneloop.engines.transformers.kv import KVPool, KVShape, Slot

SHAPES = [KVShape(1, 1, 1), KVShape(2, 1, 2)]
LONGEST = 2000


def make_pool(tokens: int, longest: int = LONGEST) -> KVPool:
    pool = KVPool(SHAPES, torch.float32, torch.device("cpu"), 0, longest)
    pool.max_bytes = tokens * pool.bytes_per_token
    return pool


def write(slot: Slot, first: int, last: int, stamp: float) -> None:
    for number, layer in enumerate(slot.lane.layers):
        at = torch.arange(first, last, dtype=torch.float32)[:, None] + 10_000 * number
        layer.keys[slot.index, :, first:last] = stamp + at
        layer.values[slot.index, :, first:last] = -stamp - at


def holds(slot: Slot, length: int, stamp: float) -> bool:
    expected = stamp + torch.arange(length, dtype=torch.float32)[:, None]
    return all(
        bool((layer.keys[slot.index, :, :length] == expected + 10_000 * n).all())
        and bool((layer.values[slot.index, :, :length] == -expected - 10_000 * n).all())
        for n, layer in enumerate(slot.lane.layers)
    )


class PoolMachine(RuleBasedStateMachine):
    """Rows come, grow, leave and are compacted; `rows` is the model: what each slot must hold."""

    slots: Bundle[Slot] = Bundle("slots")

    def __init__(self) -> None:
        super().__init__()
        self.pool = make_pool(8000)
        self.rows: dict[Slot, tuple[int, float]] = {}  # slot -> (length, stamp)
        self.stamp = 0.0

    @rule(target=slots, tokens=st.integers(1, LONGEST), length=st.floats(0, 1))
    def allocate(self, tokens: int, length: float) -> Slot | MultipleResults[Slot]:
        before = self.pool.allocated_bytes
        slot = self.pool.allocate(tokens)
        if slot is None:
            assert before > 0, "an empty pool has room for one row"
            return multiple()
        assert slot.lane.capacity >= tokens
        self.stamp += 100_000
        self.rows[slot] = (int(tokens * length), self.stamp)
        write(slot, 0, int(tokens * length), self.stamp)
        return slot

    @rule(slot=slots, tokens=st.integers(1, LONGEST))
    def extend(self, slot: Slot, tokens: int) -> None:
        length, stamp = self.rows[slot]
        if tokens >= length and self.pool.extend(slot, tokens, length):
            write(slot, length, tokens, stamp)
            self.rows[slot] = (tokens, stamp)

    @rule(slot=consumes(slots))
    def release(self, slot: Slot) -> None:
        del self.rows[slot]
        self.pool.release(slot)

    @rule()
    def compact(self) -> None:
        self.pool.compact(list(self.rows), [length for length, _ in self.rows.values()])
        for lane in self.pool.lanes.values():
            if lane.used:
                assert max(lane.owners) + 1 <= 2 * lane.used

    @invariant()
    def sound(self) -> None:
        self.pool.check_integrity()
        assert self.pool.allocated_bytes <= self.pool.max_bytes
        assert 0 <= self.pool.usage <= 1
        places = {(s.lane.capacity, s.index) for s in self.rows}
        assert len(places) == len(self.rows)
        assert all(holds(slot, length, stamp) for slot, (length, stamp) in self.rows.items())


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_a_full_pool_refuses_and_gives_room_after_a_release() -> None:
    pool = make_pool(4 * 256)
    slots = [pool.allocate(200) for _ in range(4)]
    assert all(slots) and pool.allocate(1) is None
    assert slots[1] is not None
    pool.release(slots[1])
    assert pool.allocate(200) is not None


def test_room_is_found_whatever_the_place_of_free_slots() -> None:
    """One row at a lane's top must not keep the free slots below it from a longer row."""
    pool = make_pool(8 * 256, longest=1024)
    slots = [pool.allocate(256) for _ in range(8)]
    for number, slot in enumerate(slots):
        assert slot is not None
        write(slot, 0, 256, number)
    for slot in slots[:5]:
        assert slot is not None
        pool.release(slot)
    long = pool.allocate(1000)
    assert long is not None
    pool.check_integrity()
    for number, slot in enumerate(slots[5:], start=5):
        assert slot is not None and holds(slot, 256, number)


def test_the_longest_row_always_fits_an_empty_pool() -> None:
    pool = make_pool(LONGEST)
    short = pool.allocate(10)
    assert short is not None
    assert pool.allocate(LONGEST) is None
    pool.release(short)
    assert pool.allocate(LONGEST) is not None


def test_new_and_cleared_slots_are_finite() -> None:
    pool = make_pool(4096)
    slot = pool.allocate(10)
    assert slot is not None and slot.lane.finite(slot.index, 0, 256)
    slot.lane.layers[1].values[slot.index, 0, 7] = float("nan")
    assert not slot.lane.finite(slot.index, 0, 8)
    assert slot.lane.finite(slot.index, 0, 7) and slot.lane.finite(slot.index, 8, 256)
    slot.lane.clear(slot.index)
    assert slot.lane.finite(slot.index, 0, 256)
