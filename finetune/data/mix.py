"""Decides from which data set each next row comes, and which rows are for validation. It sees numbers, never rows.

The orders are those of the `datasets` library's `interleave_datasets` and `train_test_split`, draw for draw, so that a
recipe gives the same rows as elsewhere: with a seed the same numbers always give the same order.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

Interleaving = Literal["interleave_under", "interleave_over"]
_DRAWS = 1000  # at a time, as `datasets` draws


def interleave(
    counts: Sequence[int],
    strategy: Interleaving,
    probabilities: Sequence[float],
    seed: int,
) -> Iterator[int]:
    """The index of the data set that each next row comes from; a set that is used up begins anew.

    `interleave_under` ends when the first set is used up, `interleave_over` when every set has been read once. Without
    probabilities the sets take turns, in whole rounds. `counts` are positive.
    """
    under = strategy == "interleave_under"
    if not probabilities:
        for _ in range(min(counts) if under else max(counts)):
            yield from range(len(counts))
        return
    drawn = [0] * len(counts)
    unfinished = {index for index, share in enumerate(probabilities) if share > 0}
    generator = np.random.default_rng(seed)
    while True:
        for index in generator.choice(len(counts), size=_DRAWS, p=probabilities).tolist():
            yield index
            drawn[index] += 1
            if drawn[index] >= counts[index]:
                unfinished.discard(index)
                if under or not unfinished:
                    return


def validation_rows(count: int, size: float, seed: int) -> frozenset[int]:
    """The numbers (from 0) of the rows kept for validation: a share of them below 1, else so many."""
    wanted = math.ceil(size * count) if size < 1 else int(size)
    return frozenset(np.random.default_rng(seed).permutation(count)[:wanted].tolist())


def sampled_rows(count: int, wanted: int, seed: int) -> tuple[int, frozenset[int]]:
    """For a data set that is to give `wanted` rows: how often all of them, and which of them once more."""
    whole, rest = divmod(wanted, count)
    return whole, frozenset(np.random.default_rng(seed).permutation(count)[:rest].tolist())
