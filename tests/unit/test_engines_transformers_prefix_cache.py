"""The prefix cache: never another prefix's KV, the least recently used leaf goes first, roots are worlds of their own.

A reference of a few lines, a list of known prefixes in order of use, says what must be found.
"""

from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tuneloop.engines.transformers.kv import KVPool, KVShape, Slot
from tuneloop.engines.transformers.prefix_cache import BLOCK, PrefixCache

SHAPES = [KVShape(2, 3, 1)]
CPU = torch.device("cpu")
Prefix = tuple[str, tuple[int, ...]]

# few different blocks, so that prompts share prefixes and a block's tokens return under other parents
blocks = st.lists(st.integers(0, 2), max_size=5)
roots = st.sampled_from(["", "sha256:a", "sha256:b"])
tails = st.integers(0, BLOCK - 1)


def make_cache(count: int) -> PrefixCache:
    per_block = SHAPES[0].floats * BLOCK * 4
    return PrefixCache(SHAPES, torch.float32, CPU, count * per_block)


def make_slot() -> Slot:
    pool = KVPool(SHAPES, torch.float32, CPU, 1 << 20, 256)
    slot = pool.allocate(200)
    assert slot is not None
    return slot


def tokens_of(numbers: list[int], tail: int) -> list[int]:
    return [n for n in numbers for _ in range(BLOCK)] + [9] * tail


def kv_of(root: str, tokens: list[int]) -> torch.Tensor:
    """[tokens, 8]: a position's KV depends on the root and on all tokens up to it, as a model's does."""
    rows = [[float(hash((root, tuple(tokens[: i + 1]), d)) % 65_521) for d in range(8)] for i in range(len(tokens))]
    return torch.tensor(rows).reshape(len(tokens), 8)


def fill(slot: Slot, kv: torch.Tensor) -> None:
    layer, length = slot.lane.layers[0], len(kv)
    layer.keys[slot.index, :, :length] = kv[:, :6].reshape(length, 2, 3).transpose(0, 1)
    layer.values[slot.index, :, :length] = kv[:, 6:].reshape(length, 2, 1).transpose(0, 1)


def read(slot: Slot, length: int) -> torch.Tensor:
    layer = slot.lane.layers[0]
    keys = layer.keys[slot.index, :, :length].transpose(0, 1).reshape(length, 6)
    values = layer.values[slot.index, :, :length].transpose(0, 1).reshape(length, 2)
    return torch.cat([keys, values], 1)


class CacheMachine(RuleBasedStateMachine):
    @initialize(capacity=st.integers(0, 12))
    def start(self, capacity: int) -> None:
        self.capacity = capacity
        self.cache = make_cache(capacity)
        self.known: list[Prefix] = []  # least recently used first
        self.slot = make_slot()

    def chain(self, root: str, tokens: list[int], limit: int) -> list[Prefix]:
        return [(root, tuple(tokens[:end])) for end in range(BLOCK, limit + 1, BLOCK)]

    def use(self, chain: list[Prefix]) -> None:
        for prefix in reversed(chain):
            self.known.remove(prefix)
            self.known.append(prefix)

    def is_leaf(self, prefix: Prefix) -> bool:
        return not any(r == prefix[0] and t[:-BLOCK] == prefix[1] for r, t in self.known)

    @rule(root=roots, numbers=blocks, tail=tails)
    def store(self, root: str, numbers: list[int], tail: int) -> None:
        tokens = tokens_of(numbers, tail)
        self.slot.lane.clear(self.slot.index)
        fill(self.slot, kv_of(root, tokens))
        self.cache.store(root, tokens, self.slot)
        held: list[Prefix] = []
        for prefix in self.chain(root, tokens, len(tokens))[: self.capacity]:
            if prefix not in self.known:
                if len(self.known) == self.capacity:
                    victim = next((p for p in self.known if self.is_leaf(p) and p not in held[-1:]), None)
                    if victim is None:
                        break
                    self.known.remove(victim)
                self.known.append(prefix)
            held.append(prefix)
        self.use(held)

    @rule(root=roots, numbers=blocks, tail=tails, spare=st.integers(0, 40))
    def fetch(self, root: str, numbers: list[int], tail: int, spare: int) -> None:
        tokens = tokens_of(numbers, tail)
        limit = max(0, len(tokens) - spare)
        found: list[Prefix] = []
        for prefix in self.chain(root, tokens, limit):
            if prefix not in self.known:
                break
            found.append(prefix)
        fill(self.slot, torch.full((200, 8), -1.0))
        length = self.cache.restore(self.cache.match(root, tokens, limit), self.slot)
        assert length == len(found) * BLOCK <= limit
        assert torch.equal(read(self.slot, length), kv_of(root, tokens[:length]))
        assert bool((read(self.slot, 200)[length:] == -1.0).all()), "nothing is written beyond the match"
        self.use(found)

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.known.clear()

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "cache"):
            self.cache.check_integrity()
            assert len(self.cache) == len(self.known) <= self.capacity


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def _stored(cache: PrefixCache, root: str, tokens: list[int]) -> None:
    slot = make_slot()
    fill(slot, kv_of(root, tokens))
    cache.store(root, tokens, slot)


def test_two_versions_of_an_adapter_share_nothing() -> None:
    cache: Any = make_cache(10)
    tokens = tokens_of([1, 2], 0)
    _stored(cache, "sha256:old", tokens)
    assert cache.match("sha256:new", tokens, len(tokens)) == []
    assert cache.match("", tokens, len(tokens)) == []
    assert len(cache.match("sha256:old", tokens, len(tokens))) == 2


def test_a_limit_inside_a_block_leaves_that_block_out() -> None:
    cache = make_cache(10)
    tokens = tokens_of([1, 2], 0)
    _stored(cache, "", tokens)
    assert len(cache.match("", tokens, len(tokens) - 1)) == 1


def test_a_used_prefix_outlives_an_unused_one() -> None:
    cache = make_cache(4)
    first, second, third = tokens_of([0, 0], 0), tokens_of([1, 1], 0), tokens_of([2, 2], 0)
    _stored(cache, "", first)
    _stored(cache, "", second)
    cache.match("", first, len(first))
    _stored(cache, "", third)
    assert len(cache.match("", first, len(first))) == 2
    assert cache.match("", second, len(second)) == []
