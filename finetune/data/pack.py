"""Decides which sequences make which step, from their lengths alone: pure and deterministic, without a state to save.

A micro-batch is a list of sequence indices that the trainer lays end to end in one flat row, so no order wastes
padding; what is left to decide is the order of the data and equal work for all micro-batches of a step.
"""

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..recipe.recipe import Recipe

Bin = list[int]
_WINDOW = 4096  # sequences packed together: more would fill bins better and mix the data less


def plan_steps(
    lengths: ArrayLike, *, recipe: Recipe, epoch: int, rank: int = 0, world: int = 1
) -> list[list[list[int]]]:
    """The steps of one epoch (counted from 0) for one rank: steps -> micro-batches -> indices of sequences.

    Every index occurs exactly once over all ranks. A step has `gradient_accumulation_steps` micro-batches of
    `per_device_train_batch_size` sequences, or of so many packed rows; the last step has what is left. All ranks have
    the same number of steps and of micro-batches; in a last step that is too short to go round, some of a rank's
    micro-batches are empty. The same lengths, recipe and epoch always give the same plan, so that a run goes on by
    leaving out the steps it has done.
    """
    sizes = np.asarray(lengths, np.int64)
    seed = recipe.seed if recipe.data_seed is None else recipe.data_seed
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(sizes))
    bins = _packed(sizes, order, recipe.cutoff_len, random) if recipe.packing else [[int(i)] for i in order]
    per_batch = recipe.per_device_train_batch_size
    per_step = per_batch * recipe.gradient_accumulation_steps * world
    steps = []
    for start in range(0, len(bins), per_step):
        chosen = bins[start : start + per_step]
        rounds = -(-len(chosen) // (per_batch * world))
        batches = _balanced(chosen, sizes, count=rounds * world, limit=per_batch)
        steps.append(batches[rank::world])
    return steps


def _packed(
    sizes: NDArray[np.int64], order: NDArray[np.int64], capacity: int, random: np.random.Generator
) -> list[Bin]:
    """First-fit decreasing within windows of the shuffled order; the bins are shuffled again, as length sorted them."""
    bins: list[Bin] = []
    for start in range(0, len(order), _WINDOW):
        bins += _first_fit(order[start : start + _WINDOW], sizes, capacity)
    return [bins[i] for i in random.permutation(len(bins))]


def _first_fit(window: NDArray[np.int64], sizes: NDArray[np.int64], capacity: int) -> list[Bin]:
    free = np.full(len(window), capacity, np.int64)  # never more bins than sequences
    bins: list[Bin] = [[] for _ in window]
    used = 0
    for index in window[np.argsort(-sizes[window], kind="stable")]:
        size = sizes[index]
        assert size <= capacity, "cut.py leaves no sequence longer than cutoff_len"
        place = int(np.argmax(free[: used + 1] >= size))
        bins[place].append(int(index))
        free[place] -= size
        used = max(used, place + 1)
    return bins[:used]


def _balanced(chosen: Sequence[Bin], sizes: NDArray[np.int64], *, count: int, limit: int) -> list[list[int]]:
    """Share bins among `count` micro-batches of at most `limit` bins, about equal in tokens (longest first)."""
    tokens = [int(sizes[members].sum()) for members in chosen]
    batches: list[list[int]] = [[] for _ in range(count)]
    least = [(0, batch, 0) for batch in range(count)]  # tokens, micro-batch, bins
    for place in sorted(range(len(chosen)), key=lambda place: -tokens[place]):
        load, batch, held = heapq.heappop(least)
        batches[batch] += chosen[place]
        if held + 1 < limit:
            heapq.heappush(least, (load + tokens[place], batch, held + 1))
    return batches
