"""One linear layer for mixed batches: the base product on all rows, then each row's own adapter.

Rows that decode are grouped into tiles of one adapter and multiplied by two batched products; prompt chunks are
contiguous and get two plain products each. All of it is planned once a step (`LoraPlan`), not once a layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .kernels import Kernel


@dataclass(frozen=True, slots=True)
class Part:
    """One module of the checkpoint inside a fused linear: its PEFT name and its output columns."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class TileGroup:
    """Decode rows of one rank class. `rows` [tiles * width] indexes the batch (padding repeats a row);
    `back` [rows of this group] finds each row's result among the tiles, `members` are those rows in the batch."""

    rank_class: int
    slots: Tensor | slice  # [tiles]: a slice where the slots are consecutive, so that nothing is copied
    tiles: int
    width: int
    first: int | None  # the tiles are the batch's rows from here on, in order and without padding; else None
    rows: Tensor
    back: Tensor
    members: Tensor
    whole: bool  # members are exactly rows 0..n-1 of the batch in order


@dataclass(frozen=True, slots=True)
class Span:
    """Prompt tokens `start:stop` of one adapter."""

    start: int
    stop: int
    rank_class: int
    slot: int


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """Which rows of this product have which adapter. `scaled` are the DoRA rows, (row indices, rank class, slots)."""

    tiles: Sequence[TileGroup]
    spans: Sequence[Span]
    scaled: Sequence[tuple[Tensor, int, Tensor]]


class Stack:
    """The device slots of one rank class in one linear: a [slots, R, in], b [slots, R, out]."""

    def __init__(self) -> None:
        self.a: Tensor | None = None
        self.b: Tensor | None = None
        self.magnitude: Tensor | None = None
        self.filled: set[int] = set()


class AdaptedLinear(nn.Module):
    """A kernel and its adapters. `plan` returns the plan of the running batch, or None where no row has an adapter."""

    def __init__(
        self,
        name: str,
        parts: Sequence[Part],
        kernel: Kernel,
        *,
        in_features: int,
        bias: Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
        plan: Callable[[], LoraPlan | None],
    ) -> None:
        super().__init__()
        self.name = name
        self.parts = tuple(parts)
        self.in_features = in_features
        self.out_features = sum(p.size for p in parts)
        self.stacks: dict[int, Stack] = {}
        self._kernel, self._bias, self._plan = kernel, bias, plan
        self._dtype, self._device = dtype, device

    def dense(self) -> Tensor:
        """The base weight, [out, in] float32 on the CPU."""
        return self._kernel.dense().cpu()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        flat = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        y = self._kernel(flat)
        plan = self._plan()
        if plan is not None and self.stacks:
            y = self._adapt(flat, y, plan)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)

    def _adapt(self, x: Tensor, y: Tensor, plan: LoraPlan) -> Tensor:
        for rows, rank, slots in plan.scaled:
            stack = self.stacks.get(rank)
            if stack is not None and stack.magnitude is not None:
                y[rows] = self._scale(y[rows], stack.magnitude[slots])
        for group in plan.tiles:
            self._tiles(x, y, group)
        for span in plan.spans:
            stack = self.stacks.get(span.rank_class)
            if stack is not None and span.slot in stack.filled:
                assert stack.a is not None and stack.b is not None
                h = torch.mm(x[span.start : span.stop], stack.a[span.slot].t())
                y[span.start : span.stop].addmm_(h, stack.b[span.slot])
        return y

    def _tiles(self, x: Tensor, y: Tensor, group: TileGroup) -> None:
        stack = self.stacks.get(group.rank_class)
        if stack is None or stack.a is None or stack.b is None:
            return
        a, b = stack.a[group.slots], stack.b[group.slots]
        if group.first is not None:
            rows = slice(group.first, group.first + group.tiles * group.width)
            tiled = x[rows].view(group.tiles, group.width, self.in_features)
            y[rows].view(group.tiles, group.width, self.out_features).baddbmm_(torch.bmm(tiled, a.transpose(1, 2)), b)
            return
        tiled = x[group.rows].view(group.tiles, group.width, self.in_features)
        delta = torch.bmm(torch.bmm(tiled, a.transpose(1, 2)), b).view(-1, self.out_features)[group.back]
        if group.whole:
            y += delta
        else:
            y.index_add_(0, group.members, delta)

    def _scale(self, y: Tensor, magnitude: Tensor) -> Tensor:
        if self._bias is None:
            return y * magnitude
        return (y - self._bias) * magnitude + self._bias

    def install(self, rank: int, slot: int, slots: int, a: Tensor, b: Tensor, magnitude: Tensor | None) -> None:
        """Write a prepared adapter into `slot` of a stack of `slots` slots."""
        stack = self.stacks.setdefault(rank, Stack())
        if magnitude is not None and stack.magnitude is None:
            stack.magnitude = torch.ones(0, self.out_features, dtype=self._dtype, device=self._device)
        self.reserve(rank, slots)
        assert stack.a is not None and stack.b is not None
        stack.a[slot].copy_(a)
        stack.b[slot].copy_(b)
        if stack.magnitude is not None:
            stack.magnitude[slot] = 1.0 if magnitude is None else magnitude.to(self._device, self._dtype)
        stack.filled.add(slot)

    def reserve(self, rank: int, slots: int) -> None:
        """Let the stack of `rank`, if there is one, reach slot `slots - 1`: a batch indexes it by any slot in use."""
        stack = self.stacks.get(rank)
        if stack is None:
            return
        width = rank * len(self.parts)
        stack.a = self._grown(stack.a, slots, (width, self.in_features))
        stack.b = self._grown(stack.b, slots, (width, self.out_features))
        if stack.magnitude is not None:
            stack.magnitude = self._grown(stack.magnitude, slots, (self.out_features,), fill=1.0)

    def clear(self, rank: int, slot: int) -> None:
        """Make `slot` a zero adapter again; a stack without any adapter gives its memory back."""
        stack = self.stacks.get(rank)
        if stack is None or slot not in stack.filled:
            return
        stack.filled.discard(slot)
        if not stack.filled:
            del self.stacks[rank]
            return
        assert stack.a is not None and stack.b is not None
        stack.a[slot].zero_()
        stack.b[slot].zero_()
        if stack.magnitude is not None:
            stack.magnitude[slot] = 1.0

    def _grown(self, old: Tensor | None, slots: int, shape: tuple[int, ...], fill: float = 0.0) -> Tensor:
        if old is not None and old.shape[0] >= slots:
            return old
        new = torch.full((slots, *shape), fill, dtype=self._dtype, device=self._device)
        if old is not None:
            new[: old.shape[0]] = old
        return new
