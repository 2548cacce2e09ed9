"""One forward step as tensors: which tokens, where their KV lives, which adapter each has. Knows nothing of requests.

Tokens are laid out flat: prompt chunks first, one after another, then the decoding rows, lane by lane. `current` holds
the running batch for the modules deep inside a Hugging Face model (attention, linears, cache); a worker runs one step
at a time in one thread, so a module variable is enough and nothing has to be threaded through foreign code.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .kv import Lane, Slot
from .linear import LoraPlan, Span, TileGroup

_MASKED = -1e30  # finite: a fully masked row gives a mean, never a NaN


@dataclass(frozen=True, slots=True)
class AdapterSlot:
    """Where an adapter lies on the device."""

    rank_class: int
    index: int
    dora: bool


@dataclass(frozen=True, slots=True)
class ChunkInput:
    """What the scheduler wants computed for one row: `tokens` continue the `context` tokens in `slot`."""

    tokens: Sequence[int]
    context: int
    slot: Slot
    adapter: AdapterSlot | None
    all_logits: bool  # logits of every token (prompt logprobs), else of the last one
    wants_logits: bool  # False for a chunk in the middle of a prompt


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    start: int
    stop: int
    slot: Slot
    context: int


@dataclass(slots=True)
class DecodeGroup:
    """Rows of one lane with one new token each. `slots` and `positions` are [rows]; `length` covers the longest row."""

    start: int
    stop: int
    lane: Lane
    slots: Tensor
    positions: Tensor
    top: int  # highest slot + 1
    whole: bool  # slots are exactly 0..top-1 in order: no scatter is needed
    length: int
    _masks: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, kv_heads: int, dtype: torch.dtype) -> Tensor:
        """Additive mask [top * kv_heads, 1, length] for a sliding window of `window` tokens (None: all), made once."""
        found = self._masks.get((window, kv_heads))
        if found is None:
            last = torch.full((self.top, 1), 0, dtype=torch.long, device=self.positions.device)
            last[self.slots, 0] = self.positions
            key = torch.arange(self.length, device=self.positions.device)[None, :]
            hidden = key > last
            if window is not None:
                hidden |= key <= last - window
            found = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            found.masked_fill_(hidden, max(_MASKED, torch.finfo(dtype).min))
            found = found.repeat_interleave(kv_heads, 0)[:, None, :]
            self._masks[window, kv_heads] = found
        return found


@dataclass(frozen=True, slots=True)
class Batch:
    """Flat tokens [T] with their positions, spans and groups; `logits_at` [n] are the tokens whose logits are wanted,
    in the order of the inputs (each input's `logits_count` says how many are its own)."""

    input_ids: Tensor
    positions: Tensor
    prefills: Sequence[PrefillSpan]
    decodes: Sequence[DecodeGroup]
    logits_at: Tensor
    logits_counts: Sequence[int]
    owners: Sequence["Owned"]
    lora: LoraPlan | None
    head_lora: LoraPlan | None
    memo: dict[int, Tensor] = field(default_factory=dict)  # by id of a tensor of this step: what layers derive from it


Owned = tuple[int, int, AdapterSlot | None]  # tokens start:stop and their adapter


class _Current:
    """The running batch and which product is being computed."""

    batch: Batch | None = None

    def body_plan(self) -> LoraPlan | None:
        return self.batch.lora if self.batch is not None else None

    def head_plan(self) -> LoraPlan | None:
        return self.batch.head_lora if self.batch is not None else None


current = _Current()


def build_batch(inputs: Sequence[ChunkInput], device: torch.device) -> Batch:
    """Lay the inputs out. Inputs may come in any order; `logits_counts` and `logits_at` follow the order given."""
    multi = [i for i, c in enumerate(inputs) if len(c.tokens) > 1]
    single = [i for i, c in enumerate(inputs) if len(c.tokens) == 1]
    single.sort(key=lambda i: _decode_order(inputs[i]))
    ids: list[int] = []
    positions: list[int] = []
    begin: dict[int, int] = {}
    prefills: list[PrefillSpan] = []
    for i in [*multi, *single]:
        chunk = inputs[i]
        begin[i] = len(ids)
        ids.extend(chunk.tokens)
        positions.extend(range(chunk.context, chunk.context + len(chunk.tokens)))
        if len(chunk.tokens) > 1:
            prefills.append(PrefillSpan(begin[i], len(ids), chunk.slot, chunk.context))
    logits_at: list[int] = []
    counts: list[int] = []
    head_owners: list[Owned] = []
    for i, chunk in enumerate(inputs):
        end = begin[i] + len(chunk.tokens)
        wanted = range(begin[i], end) if chunk.all_logits else range(end - 1, end) if chunk.wants_logits else range(0)
        logits_at.extend(wanted)
        counts.append(len(wanted))
        head_owners.extend((n, n + 1, chunk.adapter) for n in range(len(head_owners), len(logits_at)))
    owners: list[Owned] = [(begin[i], begin[i] + len(inputs[i].tokens), inputs[i].adapter) for i in [*multi, *single]]
    return Batch(
        input_ids=torch.tensor(ids, device=device),
        positions=torch.tensor(positions, device=device),
        prefills=prefills,
        decodes=_groups([inputs[i] for i in single], len(ids) - len(single), device),
        logits_at=torch.tensor(logits_at, dtype=torch.long, device=device),
        logits_counts=counts,
        owners=owners,
        lora=plan_lora(owners, device),
        head_lora=plan_lora(head_owners, device),
    )


def _decode_order(chunk: ChunkInput) -> tuple[int, int, int, int]:
    """By lane, then by adapter: each adapter's rows lie together, so that linears need no gathering. Then by slot."""
    adapter = chunk.adapter
    rank, index = (adapter.rank_class, adapter.index) if adapter is not None else (-1, -1)
    return (chunk.slot.lane.capacity, rank, index, chunk.slot.index)


def _groups(rows: Sequence[ChunkInput], start: int, device: torch.device) -> list[DecodeGroup]:
    groups: list[DecodeGroup] = []
    by_lane: dict[int, list[ChunkInput]] = {}
    for row in rows:
        by_lane.setdefault(row.slot.lane.capacity, []).append(row)
    for members in by_lane.values():
        slots = [m.slot.index for m in members]
        contexts = [m.context for m in members]
        groups.append(
            DecodeGroup(
                start=start,
                stop=start + len(members),
                lane=members[0].slot.lane,
                slots=torch.tensor(slots, device=device),
                positions=torch.tensor(contexts, device=device),
                top=max(slots) + 1,
                whole=slots == list(range(len(slots))),
                length=max(contexts) + 1,
            )
        )
        start += len(members)
    return groups


def plan_lora(owned: Sequence[Owned], device: torch.device) -> LoraPlan | None:
    """Group the token ranges by adapter: ranges of one token become tiles, longer ones spans."""
    if all(adapter is None for _, _, adapter in owned):
        return None
    total = owned[-1][1]
    spans = [Span(a, b, o.rank_class, o.index) for a, b, o in owned if o is not None and b - a > 1]
    by_class: dict[int, dict[int, list[int]]] = {}
    for start, stop, owner in owned:
        if owner is not None and stop - start == 1:
            by_class.setdefault(owner.rank_class, {}).setdefault(owner.index, []).append(start)
    tiles = [_tile_group(rank, rows, total, device) for rank, rows in sorted(by_class.items())]
    scaled: dict[int, tuple[list[int], list[int]]] = {}
    for start, stop, owner in owned:
        if owner is not None and owner.dora:
            rows, slots = scaled.setdefault(owner.rank_class, ([], []))
            rows.extend(range(start, stop))
            slots.extend([owner.index] * (stop - start))
    return LoraPlan(
        tiles=tiles,
        spans=spans,
        scaled=[
            (torch.tensor(rows, device=device), rank, torch.tensor(slots, device=device))
            for rank, (rows, slots) in scaled.items()
        ],
    )


def _tile_group(rank: int, rows: dict[int, list[int]], total: int, device: torch.device) -> TileGroup:
    """Cut each adapter's rows into tiles of one width, chosen so that padding at most doubles the work."""
    counts = [len(r) for r in rows.values()]
    width = max(counts)
    while width > 1 and sum(-(-n // width) for n in counts) * width > 2 * sum(counts):
        width = (width + 1) // 2
    slots: list[int] = []
    index: list[int] = []
    back: list[tuple[int, int]] = []  # (row in the batch, place among the tiles)
    for slot, members in sorted(rows.items()):
        for first in range(0, len(members), width):
            tile = members[first : first + width]
            back.extend((row, len(index) + n) for n, row in enumerate(tile))
            index.extend(tile + [tile[0]] * (width - len(tile)))
            slots.append(slot)
    back.sort()
    members = [row for row, _ in back]
    consecutive = slots == list(range(slots[0], slots[0] + len(slots)))
    return TileGroup(
        rank_class=rank,
        slots=slice(slots[0], slots[0] + len(slots)) if consecutive else torch.tensor(slots, device=device),
        tiles=len(slots),
        width=width,
        first=members[0] if index == members == list(range(members[0], members[0] + len(members))) else None,
        rows=torch.tensor(index, device=device),
        back=torch.tensor([place for _, place in back], device=device),
        members=torch.tensor(members, device=device),
        whole=members == list(range(total)),
    )
