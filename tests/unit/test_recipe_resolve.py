"""`auto`: bounded, by the amount of data, and the same wherever it is computed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tuneloop.finetune.data.pack import plan_steps
from tuneloop.finetune.recipe.read import AUTO_KEYS
from tuneloop.finetune.recipe.recipe import Recipe
from tuneloop.finetune.recipe.resolve import resolve, total_steps


def resolved(sequences: int, *, tokens: int | None = None, multiplier: float = 1.0, **keys: object) -> Recipe:
    recipe = Recipe.model_validate({"model_name_or_path": "m", **keys})
    count = sequences * 100 if tokens is None else tokens
    return resolve(recipe, AUTO_KEYS, sequences=sequences, tokens=count, learning_rate_multiplier=multiplier)


@pytest.mark.parametrize(("kind", "rate"), [("lora", 2e-4), ("freeze", 5e-5), ("full", 2e-5)])
def test_the_learning_rate_follows_the_method_and_the_multiplier(kind: str, rate: float) -> None:
    assert resolved(50, finetuning_type=kind).learning_rate == rate
    assert resolved(50, finetuning_type=kind, multiplier=0.5).learning_rate == rate / 2


@pytest.mark.parametrize("rows", [10, 50, 91, 200])
def test_small_sets_get_enough_steps(rows: int) -> None:
    recipe = resolved(rows)
    assert 100 <= total_steps(recipe, [100] * rows) <= 300


@pytest.mark.parametrize(("rows", "epochs"), [(1_000, 3), (6_000, 2), (50_000, 1)])
def test_large_sets_get_few_passes_in_larger_batches(rows: int, epochs: int) -> None:
    recipe = resolved(rows)
    assert recipe.num_train_epochs == epochs
    assert recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps == 16


def test_long_rows_are_trained_in_smaller_pieces_of_the_same_step() -> None:
    recipe = resolved(2_000, tokens=2_000 * 4_000)
    assert (recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps) == (2, 8)


def test_packed_rows_count_as_rows() -> None:
    packed = resolved(10_000, tokens=10_000 * 100, packing=True, cutoff_len=2048)
    assert packed.per_device_train_batch_size * packed.gradient_accumulation_steps == 8  # of 489 rows
    assert packed.num_train_epochs == 3


def test_processes_share_a_step() -> None:
    assert resolved(2_000, num_processes=4).per_device_train_batch_size == 4


def test_what_is_not_auto_stays() -> None:
    recipe = Recipe(model_name_or_path="m", learning_rate=1.0, num_train_epochs=7)
    assert resolve(recipe, (), sequences=5, tokens=5, learning_rate_multiplier=3) == recipe


@given(st.integers(0, 10**7), st.integers(0, 10**10), st.booleans(), st.integers(1, 64))
def test_every_amount_of_data_gives_a_valid_recipe(rows: int, tokens: int, packing: bool, processes: int) -> None:
    recipe = resolved(rows, tokens=tokens, packing=packing, num_processes=processes)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert 1 <= recipe.num_train_epochs <= 50
    assert 1 <= recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps <= 16


@pytest.mark.parametrize("packing", [False, True])
def test_steps_are_those_of_the_plan(packing: bool) -> None:
    recipe = Recipe(
        model_name_or_path="m", num_train_epochs=2.5, per_device_train_batch_size=3, packing=packing, cutoff_len=64
    )
    lengths = [10, 20, 30, 40, 50, 60] * 5
    first = [len(plan_steps(lengths, recipe=recipe, epoch=epoch)) for epoch in range(3)]
    assert total_steps(recipe, lengths) == first[0] + first[1] + -(-first[2] // 2)
    assert total_steps(recipe.model_copy(update={"max_steps": 7}), lengths) == 7
    assert total_steps(recipe.model_copy(update={"num_train_epochs": 0.01}), lengths) == 1
