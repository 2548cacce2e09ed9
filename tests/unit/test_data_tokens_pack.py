"""Plans of steps: every sequence once an epoch, no packed row too long, the same work for all ranks."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tuneloop.finetune.data.pack import plan_steps
from tuneloop.finetune.recipe.recipe import Recipe

LENGTHS = st.lists(st.integers(1, 64), max_size=120)


def recipe(**keys: Any) -> Recipe:
    return Recipe(model_name_or_path="m", cutoff_len=64, **keys)


@given(
    lengths=LENGTHS,
    packing=st.booleans(),
    batch=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    world=st.integers(1, 3),
    epoch=st.integers(0, 3),
)
def test_every_sequence_once(
    lengths: list[int], packing: bool, batch: int, accumulation: int, world: int, epoch: int
) -> None:
    plan = recipe(packing=packing, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    ranks = [plan_steps(lengths, recipe=plan, epoch=epoch, rank=rank, world=world) for rank in range(world)]
    seen = [i for steps in ranks for micro in steps for members in micro for i in members]
    assert sorted(seen) == list(range(len(lengths)))
    assert len({tuple(len(micro) for micro in steps) for steps in ranks}) == 1
    for steps in ranks:
        assert all(len(micro) == accumulation for micro in steps[:-1])
        for micro in steps:
            for members in micro:
                assert len(members) <= batch or packing
                assert sum(lengths[i] for i in members) <= 64 * batch
    if world == 1:
        assert all(members for steps in ranks for micro in steps for members in micro)


def test_the_same_plan_again_and_another_one_next_epoch() -> None:
    lengths = list(range(1, 60))
    first = plan_steps(lengths, recipe=recipe(), epoch=0)
    assert plan_steps(lengths, recipe=recipe(), epoch=0) == first
    assert plan_steps(lengths, recipe=recipe(), epoch=1) != first
    assert plan_steps(lengths, recipe=recipe(data_seed=7), epoch=0) != first
    assert plan_steps(lengths, recipe=recipe(seed=7, data_seed=42), epoch=0) == first


def test_packed_rows_are_full() -> None:
    lengths = [10, 20, 30, 34, 44, 54] * 50
    plan = plan_steps(lengths, recipe=recipe(packing=True, per_device_train_batch_size=1), epoch=0)
    assert len(plan) == 150


@pytest.mark.parametrize("packing", [False, True])
def test_micro_batches_of_a_step_have_about_equal_tokens(packing: bool) -> None:
    lengths = [1 + (i * 37) % 64 for i in range(256)]
    plan = recipe(packing=packing, per_device_train_batch_size=8, gradient_accumulation_steps=4)
    for micro in plan_steps(lengths, recipe=plan, epoch=0)[:-1]:
        sums = [sum(lengths[i] for i in members) for members in micro]
        assert max(sums) - min(sums) <= 64


def test_a_hundred_thousand_sequences_are_planned_in_no_time() -> None:
    lengths = [1 + (i * 37) % 64 for i in range(100_000)]
    assert len(plan_steps(lengths, recipe=recipe(packing=True, per_device_train_batch_size=4), epoch=0)) > 10_000
