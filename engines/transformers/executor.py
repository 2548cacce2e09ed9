"""Runs one batch through a model and returns the wanted logits. Two ways, the same result.

`FlatExecutor` feeds all tokens as one sequence; attention reads the pool (models on transformers' AttentionInterface).
`GroupExecutor` feeds one prompt chunk or one group of decoding rows at a time through the model's own attention and
masks (BLOOM's ALiBi, and whatever else computes its own); rows of unequal length share a call only where nothing but
the mask depends on the length.
"""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .attention import PoolCache, write
from .batch import Batch, DecodeGroup, PrefillSpan, current, plan_lora


class Executor(ABC):
    @abstractmethod
    def run(self, batch: Batch) -> Tensor:
        """Logits [len(batch.logits_at), vocab] in float32."""


class FlatExecutor(Executor):
    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache = PoolCache()

    def run(self, batch: Batch) -> Tensor:
        current.batch = batch
        try:
            out = self._model(
                input_ids=batch.input_ids[None],
                position_ids=batch.positions[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=batch.logits_at,
            )
        finally:
            current.batch = None
        logits: Tensor = out.logits[0]
        return logits.float()


class _GroupCache(Cache):  # type: ignore[misc]
    """The pool as one group's cache: what it returns holds the group's rows up to `length` tokens."""

    def __init__(self, batch: Batch, length: int, new: int) -> None:
        super().__init__(layers=[])
        self._batch, self._length, self._new = batch, length, new

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        rows, heads, new, _ = key_states.shape
        write(
            self._batch,
            layer_idx,
            key_states.transpose(1, 2).reshape(rows * new, heads, -1),
            value_states.transpose(1, 2).reshape(rows * new, heads, -1),
        )
        if self._batch.prefills:
            slot = self._batch.prefills[0].slot
            layer, index = slot.lane.layers[layer_idx], torch.tensor([slot.index], device=key_states.device)
        else:
            group = self._batch.decodes[0]
            layer, index = group.lane.layers[layer_idx], group.slots
        return layer.keys[index, :, : self._length], layer.values[index, :, : self._length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length - self._new

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._length - self._new

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._length, 0


class GroupExecutor(Executor):
    """`same_length_only`: sliding windows and length-dependent rotary scaling look at positions, so that rows may share
    a call only if they are equally long."""

    def __init__(self, model: Any, *, same_length_only: bool, takes_positions: bool) -> None:
        self._model, self._same_length_only, self._takes_positions = model, same_length_only, takes_positions

    def run(self, batch: Batch) -> Tensor:
        wanted = batch.logits_at.tolist()
        pieces: dict[int, Tensor] = {}
        for start, stop, part, mask in self._parts(batch):
            keep = [i for i in wanted if start <= i < stop]
            rows = 1 if part.prefills else stop - start
            logits = self._call(batch, start, stop, part, mask)
            flat = logits.reshape(rows * ((stop - start) // rows), -1)
            for i in keep:
                pieces[i] = flat[i - start]
        return torch.stack([pieces[i] for i in wanted]).float() if wanted else torch.empty(0)

    def _parts(self, batch: Batch) -> list[tuple[int, int, Batch, Tensor]]:
        parts: list[tuple[int, int, Batch, Tensor]] = []
        device = batch.input_ids.device
        for span in batch.prefills:
            moved = PrefillSpan(0, span.stop - span.start, span.slot, span.context)
            mask = torch.ones(1, span.context + moved.stop, dtype=torch.long, device=device)
            parts.append((span.start, span.stop, replace(batch, prefills=[moved], decodes=[]), mask))
        for group in batch.decodes:
            for first, last in self._runs(group):
                positions = group.positions[first:last]
                length = int(positions.max()) + 1
                moved_group = DecodeGroup(
                    start=0,
                    stop=last - first,
                    lane=group.lane,
                    slots=group.slots[first:last],
                    positions=positions,
                    top=group.top,
                    whole=False,
                    length=length,
                )
                mask = (torch.arange(length, device=device)[None, :] <= positions[:, None]).long()
                start = group.start + first
                parts.append((start, group.start + last, replace(batch, prefills=[], decodes=[moved_group]), mask))
        return parts

    def _runs(self, group: DecodeGroup) -> list[tuple[int, int]]:
        rows = group.stop - group.start
        return [(i, i + 1) for i in range(rows)] if self._same_length_only else [(0, rows)]

    def _call(self, batch: Batch, start: int, stop: int, part: Batch, mask: Tensor) -> Tensor:
        ids = batch.input_ids[start:stop]
        positions = batch.positions[start:stop]
        if part.prefills:
            ids, positions, new = ids[None], positions[None], stop - start
        else:
            ids, positions, new = ids[:, None], positions[:, None], 1
        own = [(a - start, b - start, adapter) for a, b, adapter in batch.owners if start <= a and b <= stop]
        plan = plan_lora(own, ids.device)
        current.batch = replace(part, lora=plan, head_lora=plan)
        extra = {"position_ids": positions} if self._takes_positions else {}
        try:
            out = self._model(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=_GroupCache(part, mask.shape[1], new),
                use_cache=True,
                **extra,
            )
        finally:
            current.batch = None
        logits: Tensor = out.logits
        return logits
