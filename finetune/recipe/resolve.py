"""Chooses what a recipe leaves `auto`, by how much data there is. The rules are few, bounded, and in docs/recipe.md.

It knows lengths and no data, names of methods and no model.
"""

import math
from collections.abc import Sequence
from typing import Any

from numpy.typing import ArrayLike

from ..data.pack import plan_steps
from .recipe import Recipe

_LEARNING_RATES = {"lora": 2e-4, "freeze": 5e-5, "full": 2e-5}
_WARMUP_RATIO = 0.1
_STEPS_WANTED = 100  # a set of 50 rows is learned by about so many steps
_MOST_EPOCHS = 50
_STEPS_AN_EPOCH = 64  # what the batch size aims at, within:
_LEAST_BATCH, _LARGEST_BATCH = 2, 16
_TOKENS_A_BATCH = 8192  # more at once would cost memory and no longer save time


def resolve(
    recipe: Recipe, auto: Sequence[str], *, sequences: int, tokens: int, learning_rate_multiplier: float
) -> Recipe:
    """The recipe with every key of `auto` chosen, for training data of so many sequences and tokens.

    An `auto` batch size may also raise gradient_accumulation_steps, to the same examples a step in smaller pieces.
    """
    chosen: dict[str, Any] = {}
    if "learning_rate" in auto:
        chosen["learning_rate"] = _LEARNING_RATES[recipe.finetuning_type] * learning_rate_multiplier
    if "warmup_ratio" in auto:
        chosen["warmup_ratio"] = _WARMUP_RATIO
    # A packed row holds several sequences, and a batch counts rows.
    rows = max(1, math.ceil(tokens / recipe.cutoff_len)) if recipe.packing else max(1, sequences)
    if "per_device_train_batch_size" in auto:
        chosen |= _batch(recipe, rows, tokens)
    if "num_train_epochs" in auto:
        chosen["num_train_epochs"] = _epochs(recipe.model_copy(update=chosen), rows)
    return recipe.model_copy(update=chosen)


def total_steps(recipe: Recipe, lengths: ArrayLike) -> int:
    """Optimiser steps of the whole run, for training sequences of these lengths."""
    if recipe.max_steps is not None:
        return recipe.max_steps
    whole, part = divmod(recipe.num_train_epochs, 1)
    counts = [
        len(plan_steps(lengths, recipe=recipe, epoch=epoch, world=recipe.num_processes))
        for epoch in range(int(whole) + bool(part))
    ]
    steps = sum(counts[: int(whole)]) + (math.ceil(counts[-1] * part) if part else 0)
    return max(1, steps)


def _batch(recipe: Recipe, rows: int, tokens: int) -> dict[str, int]:
    """Small sets need small batches, or they end before they are learned; large ones gain from steadier steps."""
    wanted = 2 ** round(math.log2(max(1.0, rows / _STEPS_AN_EPOCH)))
    step = min(max(wanted, _LEAST_BATCH), _LARGEST_BATCH)
    size = max(1, step // (recipe.gradient_accumulation_steps * recipe.num_processes))
    pieces = recipe.gradient_accumulation_steps
    while size % 2 == 0 and size * tokens / rows > _TOKENS_A_BATCH:
        size, pieces = size // 2, pieces * 2
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": pieces}


def _epochs(recipe: Recipe, rows: int) -> float:
    """Three passes, fewer over large sets, and more over small ones until there are enough steps."""
    a_step = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps * recipe.num_processes
    steps = math.ceil(rows / a_step)
    usual = 3 if rows <= 5_000 else 2 if rows <= 20_000 else 1
    return float(min(max(usual, math.ceil(_STEPS_WANTED / steps)), _MOST_EPOCHS))
