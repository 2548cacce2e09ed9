"""What a request for a job says becomes a recipe, or is refused under the name of its field."""

from typing import Any

import pytest
from tuneloop.finetune.recipe.recipe import Recipe
from tuneloop.finetune.recipe.request import FORBIDDEN, recipe_from_request
from tuneloop.storage.errors import InvalidInput


def made(
    hyperparameters: dict[str, Any] | None = None,
    *,
    tuning: dict[str, Any] | None = None,
    deprecated: dict[str, Any] | None = None,
    seed: int | None = 1,
) -> tuple[Recipe, tuple[str, ...], float]:
    method = (
        None if hyperparameters is None else {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    )
    return recipe_from_request(base="m", method=method, hyperparameters=deprecated, tuning=tuning, seed=seed)


def refused(*arguments: Any, **options: Any) -> tuple[str, str | None]:
    with pytest.raises(InvalidInput) as error:
        made(*arguments, **options)
    return error.value.message, error.value.param


def test_nothing_said_is_auto() -> None:
    for recipe, auto, multiplier in (made(), made({}), made({"n_epochs": "auto", "batch_size": None})):
        assert recipe == Recipe(model_name_or_path="m", seed=1)
        assert set(auto) == {"num_train_epochs", "per_device_train_batch_size", "learning_rate", "warmup_ratio"}
        assert multiplier == 1.0


def test_hyperparameters_are_taken_from_both_places() -> None:
    wishes = {"n_epochs": 5, "batch_size": 4, "learning_rate_multiplier": 0.5}
    for recipe, auto, multiplier in (made(wishes), made(deprecated=wishes)):
        assert (recipe.num_train_epochs, recipe.per_device_train_batch_size) == (5, 4)
        assert auto == ("learning_rate", "warmup_ratio")
        assert multiplier == 0.5


def test_tuning_holds_recipe_keys_and_llamafactorys_names() -> None:
    tuning = {"lora_rank": 16, "neat_packing": True, "learning_rate": "5e-5", "num_train_epochs": 2, "save_steps": 10}
    recipe, auto, _ = made(tuning=tuning)
    assert (recipe.lora_rank, recipe.packing, recipe.learning_rate, recipe.num_train_epochs) == (16, True, 5e-5, 2)
    assert recipe.save_strategy == "steps"
    assert auto == ("per_device_train_batch_size",)


def test_a_seed_is_drawn_once_when_none_is_given() -> None:
    seeds = {made(seed=None)[0].seed for _ in range(5)}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize("key", sorted(FORBIDDEN))
def test_what_a_client_must_not_set_is_refused(key: str) -> None:
    assert key in Recipe.model_fields
    message, param = refused(tuning={key: "x"})
    assert message == f"{key} cannot be set in `tuning`. {FORBIDDEN[key]}"
    assert param == f"tuning.{key}"


@pytest.mark.parametrize(
    ("tuning", "param", "words"),
    [
        ({"lora_rnk": 1}, "tuning.lora_rnk", "Did you mean lora_rank?"),
        ({"lora_rank": 0}, "tuning.lora_rank", "lora_rank is 0"),
        ({"bf16": "true"}, "tuning.bf16", "write true or false"),
        ({"template": "qwen"}, "tuning.template", "would have no effect: the checkpoint's own chat template"),
        ({"quantization_bit": 4}, "tuning.quantization_bit", "not supported yet"),
        ({"hf_hub_token": "secret"}, "tuning.hf_hub_token", "Secrets do not belong"),
        ({"bf16": True, "fp16": True}, "tuning.bf16", "different number formats"),
    ],
)
def test_wrong_tuning_is_refused_under_its_name(tuning: dict[str, Any], param: str, words: str) -> None:
    message, named = refused(tuning=tuning)
    assert words in message
    assert "secret" not in message.replace("Secrets", "")
    assert named == param


def test_the_same_thing_is_said_once() -> None:
    assert refused({"n_epochs": 1}, deprecated={"n_epochs": 1})[1] == "hyperparameters"
    assert refused({"n_epochs": 1}, tuning={"num_train_epochs": 2})[1] == "tuning.num_train_epochs"
    message, param = refused({"learning_rate_multiplier": 2}, tuning={"learning_rate": 1e-4})
    assert param == "tuning.learning_rate"
    assert "leave one of them out" in message


@pytest.mark.parametrize("value", [0, -1, True, "many", float("inf")])
def test_hyperparameters_are_positive_numbers(value: object) -> None:
    for key in ("n_epochs", "batch_size", "learning_rate_multiplier"):
        message, param = refused({key: value})
        assert param == f"method.supervised.hyperparameters.{key}"
        assert "it must be a number above 0, or 'auto'." in message
    assert refused(deprecated={"n_epochs": value})[1] == "hyperparameters.n_epochs"


def test_a_batch_is_a_whole_number_of_rows() -> None:
    message, param = refused({"batch_size": 2.5})
    assert "whole number" in message
    assert param == "method.supervised.hyperparameters.batch_size"


def test_unknown_hyperparameters_and_methods_are_refused() -> None:
    assert refused({"beta": 0.1})[1] == "method.supervised.hyperparameters.beta"
    with pytest.raises(InvalidInput, match="'dpo' is not supported yet"):
        recipe_from_request(base="m", method={"type": "dpo"}, hyperparameters=None, tuning=None, seed=1)
