"""The prefix cache: KV of whole blocks of tokens, kept after their row left. Knows nothing of requests or time.

A block is found by its parent block and its own tokens, and the chain starts at a root for (adapter digest), so two
versions of an adapter never share KV, whatever their name. Blocks are copied in and out of the rows' slots: a copy
costs microseconds a token where prefill costs milliseconds. The least recently used leaf goes first.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .kv import KVShape, Slot

BLOCK = 16  # tokens

_Key = tuple[int | str, tuple[int, ...]]


@dataclass(slots=True)
class _Block:
    index: int
    key: _Key
    children: int = 0


class PrefixCache:
    """At most `max_bytes` of KV. With max_bytes 0 it is off and every method is a cheap no-op."""

    def __init__(self, shapes: list[KVShape], dtype: torch.dtype, device: torch.device, max_bytes: int) -> None:
        bytes_per_block = sum(s.floats for s in shapes) * BLOCK * dtype.itemsize
        self.max_blocks = max_bytes // bytes_per_block
        self._blocks: OrderedDict[_Key, _Block] = OrderedDict()  # least recently used first
        self._by_index: dict[int, _Block] = {}
        self._free: list[int] = []
        self._keys = [torch.empty(0, s.heads, BLOCK, s.key_dim, dtype=dtype, device=device) for s in shapes]
        self._values = [torch.empty(0, s.heads, BLOCK, s.value_dim, dtype=dtype, device=device) for s in shapes]
        self._device = device

    def __len__(self) -> int:
        return len(self._blocks)

    def match(self, root: str, tokens: Sequence[int], limit: int) -> list[int]:
        """Block indices of the longest cached prefix of at most `limit` tokens; marks them as used."""
        found: list[_Block] = []
        parent: int | str = root
        for start in range(0, limit - BLOCK + 1, BLOCK):
            block = self._blocks.get((parent, tuple(tokens[start : start + BLOCK])))
            if block is None:
                break
            found.append(block)
            parent = block.index
        for block in reversed(found):  # parents end up newer than their children
            self._blocks.move_to_end(block.key)
        return [b.index for b in found]

    def restore(self, blocks: Sequence[int], slot: Slot) -> int:
        """Copy matched blocks to the beginning of a slot; returns the number of tokens."""
        if not blocks:
            return 0
        index = torch.tensor(blocks, device=self._device)
        length = len(blocks) * BLOCK
        for i, layer in enumerate(slot.lane.layers):
            for source, target in ((self._keys[i], layer.keys), (self._values[i], layer.values)):
                heads, dim = source.shape[1], source.shape[3]
                target[slot.index, :, :length] = source[index].transpose(0, 1).reshape(heads, length, dim)
        return length

    def store(self, root: str, tokens: Sequence[int], slot: Slot) -> None:
        """Keep the whole blocks of `tokens`, whose KV is at the beginning of `slot`. Known ones cost nothing."""
        parent: int | str = root
        new: list[tuple[int, int]] = []  # (position of the block in the slot, block index)
        chain: list[_Block] = []
        for number in range(min(len(tokens) // BLOCK, self.max_blocks)):
            key = (parent, tuple(tokens[number * BLOCK : (number + 1) * BLOCK]))
            block = self._blocks.get(key)
            if block is None:
                index = self._take(chain[-1] if chain else None)
                if index is None:
                    break
                block = _Block(index, key)
                self._blocks[key] = self._by_index[index] = block
                if chain:
                    chain[-1].children += 1
                new.append((number, index))
            chain.append(block)
            parent = block.index
        for block in reversed(chain):
            self._blocks.move_to_end(block.key)
        if new:
            self._copy_in(new, slot)

    def _copy_in(self, new: Sequence[tuple[int, int]], slot: Slot) -> None:
        first, count = new[0][0], len(new)  # new blocks are always a tail of the chain
        index = torch.tensor([i for _, i in new], device=self._device)
        for i, layer in enumerate(slot.lane.layers):
            for source, target in ((layer.keys, self._keys[i]), (layer.values, self._values[i])):
                heads, dim = source.shape[1], source.shape[3]
                piece = source[slot.index, :, first * BLOCK : (first + count) * BLOCK]
                target[index] = piece.reshape(heads, count, BLOCK, dim).transpose(0, 1)

    def _take(self, keep: _Block | None) -> int | None:
        """A free block's index, evicting the least recently used leaf but `keep`; None if there is none."""
        if self._free:
            return self._free.pop()
        if self._keys[0].shape[0] < self.max_blocks:
            self._grow()
            return self._free.pop()
        for key, block in self._blocks.items():
            if block.children == 0 and block is not keep:
                self._evict(key)
                return self._free.pop()
        return None

    def _evict(self, key: _Key) -> None:
        block = self._blocks.pop(key)
        del self._by_index[block.index]
        if isinstance(key[0], int):
            self._by_index[key[0]].children -= 1
        self._free.append(block.index)

    def _grow(self) -> None:
        old = self._keys[0].shape[0]
        size = min(self.max_blocks, max(64, old * 2))
        for tensors in (self._keys, self._values):
            for i, tensor in enumerate(tensors):
                tensors[i] = torch.empty((size, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
                tensors[i][:old] = tensor
        self._free.extend(range(size - 1, old - 1, -1))

    def clear(self) -> None:
        self._blocks.clear()
        self._by_index.clear()
        self._free = list(range(self._keys[0].shape[0] - 1, -1, -1))

    def check_integrity(self) -> None:
        """Assert the invariants that tests and idle time rely on."""
        indices = {b.index for b in self._blocks.values()}
        assert len(indices) == len(self._blocks) and not indices & set(self._free)
        assert len(indices) + len(self._free) == self._keys[0].shape[0] <= max(self.max_blocks, 0)
        children = dict.fromkeys(indices, 0)
        for block in self._blocks.values():
            if isinstance(block.key[0], int):
                children[block.key[0]] += 1
        assert all(b.children == children[b.index] for b in self._blocks.values())
