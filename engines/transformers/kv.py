"""The KV pool: each running row owns one contiguous slot of a lane. Knows nothing of tokens or adapters.

A *lane* holds the slots of one capacity class (256, 1024, 4096 ... tokens) as dense tensors, per layer
[slots, kv_heads, capacity, head_dim], so that one batched product serves all decoding rows of a lane and short rows
are not padded to long ones. A row that outgrows its class moves to the next one. Lanes grow by doubling and are given
back when empty; what is allocated never exceeds `max_bytes`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

_FIRST_CAPACITY = 256
_GROWTH = 4
_FIRST_SLOTS = 4


@dataclass(slots=True)
class LayerKV:
    keys: Tensor  # [slots, kv_heads, capacity, key_dim]
    values: Tensor  # [slots, kv_heads, capacity, value_dim]


@dataclass(frozen=True, slots=True)
class KVShape:
    """One layer's key and value width. Measured from the model at load, not guessed from its configuration."""

    heads: int
    key_dim: int
    value_dim: int

    @property
    def floats(self) -> int:
        return self.heads * (self.key_dim + self.value_dim)


class Lane:
    """Slots of one capacity. `layers[i]` is model layer i's storage."""

    def __init__(self, capacity: int, shapes: list[KVShape], dtype: torch.dtype, device: torch.device) -> None:
        self.capacity = capacity
        self.slots = 0
        self.free: set[int] = set()
        self.owners: dict[int, Slot] = {}
        self.layers: list[LayerKV] = [
            LayerKV(
                torch.empty(0, s.heads, capacity, s.key_dim, dtype=dtype, device=device),
                torch.empty(0, s.heads, capacity, s.value_dim, dtype=dtype, device=device),
            )
            for s in shapes
        ]

    @property
    def used(self) -> int:
        return self.slots - len(self.free)

    def resize(self, slots: int) -> None:
        keep = min(slots, self.slots)
        for layer in self.layers:
            layer.keys = _resized(layer.keys, slots, keep)
            layer.values = _resized(layer.values, slots, keep)
        self.free |= set(range(self.slots, slots))
        self.free = {i for i in self.free if i < slots}
        self.slots = slots

    def clear(self, index: int) -> None:
        """Zero a slot: masked keys and values still take part in products, so they must stay finite."""
        for layer in self.layers:
            layer.keys[index].zero_()
            layer.values[index].zero_()

    def finite(self, index: int, first: int, last: int) -> bool:
        """Whether the keys and values of tokens first..last-1 of a slot are all finite."""
        parts = (t[index, :, first:last] for layer in self.layers for t in (layer.keys, layer.values))
        return bool(torch.stack([torch.isfinite(part).all() for part in parts]).all())

    def move(self, slot: "Slot", index: int, length: int) -> None:
        """Bring one of this lane's slots, with its first `length` tokens, to the free place `index`."""
        self.copy(slot, index, length)
        self.free.discard(index)
        self.free.add(slot.index)
        del self.owners[slot.index]
        self.owners[index] = slot
        slot.index = index

    def copy(self, source: "Slot", index: int, length: int) -> None:
        """Copy the first `length` tokens of another slot into slot `index` of this lane."""
        for mine, theirs in zip(self.layers, source.lane.layers, strict=True):
            mine.keys[index, :, :length] = theirs.keys[source.index, :, :length]
            mine.values[index, :, :length] = theirs.values[source.index, :, :length]


def _resized(old: Tensor, slots: int, keep: int) -> Tensor:
    new = torch.zeros((slots, *old.shape[1:]), dtype=old.dtype, device=old.device)  # zeros: see Lane.clear
    new[:keep] = old[:keep]
    return new


@dataclass(slots=True, eq=False)
class Slot:
    lane: Lane
    index: int


@dataclass
class KVPool:
    """Allocates slots. Where the bound forbids it `allocate` gives None and `extend` False: the scheduler preempts."""

    shapes: list[KVShape]
    dtype: torch.dtype
    device: torch.device
    max_bytes: int
    max_tokens_per_row: int
    lanes: dict[int, Lane] = field(default_factory=dict)

    @property
    def bytes_per_token(self) -> int:
        return sum(s.floats for s in self.shapes) * self.dtype.itemsize

    @property
    def capacity_tokens(self) -> int:
        return self.max_bytes // self.bytes_per_token

    @property
    def allocated_bytes(self) -> int:
        return sum(lane.slots * lane.capacity for lane in self.lanes.values()) * self.bytes_per_token

    @property
    def usage(self) -> float:
        """Share of the bound that running rows own, 0..1."""
        used = sum(lane.used * lane.capacity for lane in self.lanes.values())
        return used * self.bytes_per_token / self.max_bytes

    def _capacities(self) -> Iterator[int]:
        capacity = _FIRST_CAPACITY
        while capacity < self.max_tokens_per_row:
            yield capacity
            capacity *= _GROWTH
        yield self.max_tokens_per_row

    def allocate(self, tokens: int) -> Slot | None:
        """A slot for at least `tokens` tokens, the smallest class that holds them; the lowest free index first."""
        capacity = next(c for c in self._capacities() if c >= tokens)
        lane = self.lanes.get(capacity)
        if lane is None:
            lane = self.lanes[capacity] = Lane(capacity, self.shapes, self.dtype, self.device)
        if not lane.free and not self._grow(lane):
            if lane.slots == 0:
                del self.lanes[capacity]
            return None
        index = min(lane.free)
        lane.free.discard(index)
        lane.owners[index] = slot = Slot(lane, index)
        return slot

    def extend(self, slot: Slot, tokens: int, length: int) -> bool:
        """Make `slot` hold `tokens` tokens, moving its first `length` ones if need be. False: no room."""
        if tokens <= slot.lane.capacity:
            return True
        bigger = self.allocate(tokens)
        if bigger is None:
            return False
        bigger.lane.copy(slot, bigger.index, length)
        self.release(slot)
        slot.lane, slot.index = bigger.lane, bigger.index
        slot.lane.owners[slot.index] = slot
        return True

    def release(self, slot: Slot) -> None:
        slot.lane.free.add(slot.index)
        del slot.lane.owners[slot.index]

    def compact(self, slots: list[Slot], lengths: list[int]) -> None:
        """Move rows at high indices into holes, where a lane's rows are spread over twice their number."""
        for lane in self.lanes.values():
            owners = sorted(
                ((s, n) for s, n in zip(slots, lengths, strict=True) if s.lane is lane), key=lambda o: o[0].index
            )
            while owners and lane.free and owners[-1][0].index + 1 > 2 * len(owners):
                slot, length = owners.pop()
                lane.move(slot, min(lane.free), length)
                owners.insert(0, (slot, length))

    def _grow(self, lane: Lane) -> bool:
        wanted = max(_FIRST_SLOTS, lane.slots * 2)
        for slots in (wanted, lane.slots + 1):
            if self._fits(lane, slots):
                lane.resize(slots)
                return True
        for capacity in [c for c, x in self.lanes.items() if x is not lane and x.used == 0]:
            del self.lanes[capacity]
        for other in self.lanes.values():
            self._shrink(other)
        if self._fits(lane, lane.slots + 1):
            lane.resize(lane.slots + 1)
            return True
        return False

    def _shrink(self, lane: Lane) -> None:
        """Give back all free slots: the rows above them move down, else one row at the top would keep them all."""
        for index in sorted(lane.owners, reverse=True):
            if index < lane.used:
                break
            lane.move(lane.owners[index], min(lane.free), lane.capacity)
        if lane.free:
            lane.resize(lane.used)

    def _fits(self, lane: Lane, slots: int) -> bool:
        return self.allocated_bytes + (slots - lane.slots) * lane.capacity * self.bytes_per_token <= self.max_bytes

    def check_integrity(self) -> None:
        """Assert the invariants that tests and idle time rely on."""
        assert self.allocated_bytes <= self.max_bytes
        for capacity, lane in self.lanes.items():
            assert lane.capacity == capacity
            assert lane.free | set(lane.owners) == set(range(lane.slots)) and not lane.free & set(lane.owners)
            assert all(s.lane is lane and s.index == i for i, s in lane.owners.items())
            assert all(layer.keys.shape[0] == lane.slots for layer in lane.layers)
