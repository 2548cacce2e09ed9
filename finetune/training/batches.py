"""The batches of a run: which sequences each step learns from, laid end to end as tensors. It knows no model.

Everything follows from the token store, the recipe and the step's number, so a run that goes on from step k sees just
what it would have seen without the break.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from ..data.base import TokenSequence
from ..data.pack import plan_steps
from ..data.token_store import TokenStore
from ..methods.base import Batch

if TYPE_CHECKING:
    from ..recipe.recipe import Recipe

StepBatches = list[Batch]  # the micro-batches of one optimiser step, on the CPU


class StepDataset(Dataset[StepBatches]):
    """Item k is the whole of step k + 1, epoch after epoch. `max_tokens` bounds a micro-batch of several sequences."""

    def __init__(
        self, store: TokenStore, recipe: "Recipe", *, total_steps: int, max_tokens: int, rank: int = 0, world: int = 1
    ) -> None:
        self._store = store
        self._max_tokens = max_tokens
        self.epoch_ends: list[int] = []  # the step with which each epoch ends
        self._steps: list[list[list[int]]] = []
        epoch = 0
        while len(self._steps) < total_steps:
            self._steps += plan_steps(store.lengths, recipe=recipe, epoch=epoch, rank=rank, world=world)
            self.epoch_ends.append(len(self._steps))
            epoch += 1
        del self._steps[total_steps:]

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, step: int) -> StepBatches:
        parts = [part for batch in self._steps[step] for part in self._split(batch)]
        if not parts:  # a last step too short to go round: this process takes part and counts nothing
            return [collate([self._store.ids(0)], [np.zeros_like(self._store.supervised(0))])]
        return [self._collate(part) for part in parts]

    def _collate(self, part: Sequence[int]) -> Batch:
        return collate([self._store.ids(i) for i in part], [self._store.supervised(i) for i in part])

    def epoch_of(self, step: int) -> float | None:
        """How many passes over the data are done after `step` steps."""
        begin = 0
        for epoch, end in enumerate(self.epoch_ends):
            if step <= end:
                return epoch + (step - begin) / (end - begin)
            begin = end
        return float(len(self.epoch_ends))

    def _split(self, batch: Sequence[int]) -> Iterator[list[int]]:
        return split_by_tokens(batch, [int(self._store.lengths[i]) for i in batch], self._max_tokens)


class StreamDataset(IterableDataset[StepBatches]):
    """The same from an endless stream of sequences, of which nobody knows how many make an epoch."""

    epoch_ends: Sequence[int] = ()

    def __init__(
        self, sequences: Iterator[TokenSequence], recipe: "Recipe", *, max_tokens: int, rank: int = 0, world: int = 1
    ) -> None:
        self._sequences = sequences
        self._recipe = recipe
        self._max_tokens = max_tokens
        self._rank = rank
        self._world = world

    def epoch_of(self, step: int) -> float | None:
        """Not known."""
        return None

    def __iter__(self) -> Iterator[StepBatches]:
        size = self._recipe.per_device_train_batch_size * self._recipe.gradient_accumulation_steps
        while group := list(islice(self._sequences, size * self._world)):
            mine = group[self._rank :: self._world] or group[:1]  # every rank has work in every step
            parts = split_by_tokens(range(len(mine)), [len(s.ids) for s in mine], self._max_tokens)
            yield [
                collate(
                    [np.asarray(mine[i].ids, np.int32) for i in part],
                    [np.asarray(mine[i].supervised, bool) for i in part],
                )
                for part in parts
            ]


def validation_batches(store: TokenStore, *, max_tokens: int) -> list[Batch]:
    """All sequences once, the longest first, so that a lack of memory shows at once."""
    order = [int(i) for i in np.argsort(-store.lengths, kind="stable")]
    parts = split_by_tokens(order, [int(store.lengths[i]) for i in order], max_tokens)
    return [collate([store.ids(i) for i in part], [store.supervised(i) for i in part]) for part in parts]


def split_by_tokens(items: Sequence[int], lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Groups in order, none of more than `max_tokens` unless a single sequence is; evenly filled."""
    total = sum(lengths)
    parts = max(1, -(-total // max_tokens))
    share = min(max_tokens, -(-total // parts) + max(lengths, default=0) // 2)
    group: list[int] = []
    held = 0
    for item, length in zip(items, lengths, strict=True):
        if group and held + length > share:
            yield group
            group, held = [], 0
        group.append(item)
        held += length
    if group:
        yield group


def collate(ids: Sequence[np.ndarray], supervised: Sequence[np.ndarray]) -> Batch:
    """Sequences end to end. A supervised token is the label of the position before it, in its own sequence."""
    lengths = [len(one) for one in ids]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    flat = np.concatenate(ids).astype(np.int64)
    marks = np.concatenate(supervised).copy()
    marks[starts[:-1]] = False
    labelled = np.flatnonzero(marks)
    positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
    return Batch(
        ids=torch.from_numpy(flat)[None],
        positions=torch.from_numpy(positions)[None],
        starts=torch.from_numpy(starts),
        targets=torch.from_numpy(labelled - 1),
        labels=torch.from_numpy(flat[labelled]),
    )


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch on another device."""
    if device.type == "cpu":
        return batch
    return Batch(*(getattr(batch, field.name).to(device, non_blocking=True) for field in fields(batch)))
