"""Recipes from YAML and `key=value` words: values mean what the person wrote, or are refused with a sentence."""

from pathlib import Path
from typing import Any

import pytest
from tuneloop.finetune.recipe.nearest import nearest
from tuneloop.finetune.recipe.read import parse_recipe, read_recipe
from tuneloop.finetune.recipe.recipe import Recipe
from tuneloop.storage.errors import InvalidInput


def recipe(*words: str, yaml: str = "", tmp_path: Path | None = None) -> Recipe:
    path = None
    if tmp_path is not None:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml, "utf-8")
    return read_recipe(path, words)[0]


def given(**values: Any) -> Recipe:
    return parse_recipe({"model_name_or_path": "m", **values}, where="in `tuning`")[0]


def refusal(**values: Any) -> tuple[str, str | None]:
    with pytest.raises(InvalidInput) as error:
        given(**values)
    assert error.value.message.endswith((".", "?"))
    return error.value.message, error.value.param


def test_yaml_and_words_make_one_recipe(tmp_path: Path) -> None:
    text = "model_name_or_path: m\nlearning_rate: 1e-4\ndataset: a, b\nlora_rank: 16\nbf16: true\n"
    made = recipe("lora_rank=32", "bf16=False", "output_dir=", yaml=text, tmp_path=tmp_path)
    assert (made.learning_rate, made.dataset, made.lora_rank, made.bf16, made.output_dir) == (
        1e-4, ("a", "b"), 32, False, None,
    )  # fmt: skip


def test_words_alone_are_enough() -> None:
    made = recipe(
        "model_name_or_path=m", "lr_scheduler_kwargs={min_lr_rate: 1e-2}", "dataset=[a,b]", "save_strategy=no"
    )
    assert made.lr_scheduler_kwargs == {"min_lr_rate": 0.01}
    assert made.dataset == ("a", "b")
    assert made.save_strategy == "no"  # YAML 1.1 reads a bare no as false


@pytest.mark.parametrize(
    ("key", "value", "result"),
    [
        ("learning_rate", "2e-5", 2e-5),
        ("learning_rate", 1, 1.0),
        ("lora_rank", "8", 8),
        ("lora_rank", 8.0, 8),
        ("max_steps", "1e3", 1000),
        ("lora_target", "q_proj,v_proj", ("q_proj", "v_proj")),
        ("lora_target", ["q_proj"], ("q_proj",)),
        ("interleave_probs", "1.0", (1.0,)),
        ("run_name", 2024, "2024"),
        ("gradient_checkpointing", "auto", "auto"),
        ("gradient_checkpointing", False, False),
        ("resume_from_checkpoint", "step-5", "step-5"),
        ("resume_from_checkpoint", True, True),
        ("rank_pattern", {"q_proj": 4}, {"q_proj": 4}),
        ("lr_scheduler_kwargs", '{"num_cycles": 2}', {"num_cycles": 2}),
        ("save_total_limit", None, None),
        ("lora_alpha", None, None),
    ],
)
def test_values_become_what_their_key_wants(key: str, value: Any, result: Any) -> None:
    more = {"mix_strategy": "interleave_under"} if key == "interleave_probs" else {}
    assert getattr(given(**{key: value}, **more), key) == result


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("bf16", "true", "bf16 in `tuning` is 'true'; write true or false, without quotes."),
        ("bf16", 1, "is 1; write true or false"),
        ("gradient_checkpointing", "maybe", "write true or false or auto"),
        ("lora_rank", True, "is true; it must be a whole number."),
        ("lora_rank", "many", "is 'many'; it must be a whole number."),
        ("lora_rank", 8.5, "is 8.5; it must be a whole number."),
        ("save_steps", 0.1, "a whole number, not a share of all steps."),
        ("lora_rank", 0, "lora_rank is 0; it must be greater than or equal to 1."),
        ("learning_rate", float("nan"), "it must be finite"),
        ("learning_rate", [1], "it must be a number"),
        ("lr_scheduler_type", "cosin", "it can be linear, cosine, "),
        ("rank_pattern", "q_proj", "it must be a mapping, as {name: value}"),
        ("run_name", ["a"], "it must be a text"),
        ("dataset", [["a"]], "it must be a text"),
    ],
)
def test_wrong_values_are_refused(key: str, value: Any, words: str) -> None:
    message, param = refusal(**{key: value})
    assert words in message
    assert param == key


@pytest.mark.parametrize(
    ("name", "near"),
    [("lora_rnak", "lora_rank"), ("LoRA-rank", "lora_rank"), ("learning-rate", "learning_rate"),
     ("cut_off_len", "cutoff_len"), ("zzzz", None), ("epochs", "num_train_epochs"), ("neat_pack", "neat_packing")],
)  # fmt: skip
def test_unknown_keys_are_refused_with_the_nearest(name: str, near: str | None) -> None:
    message, param = refusal(**{name: 1})
    assert f"{name} in `tuning` is not a known key." in message
    assert param == name
    assert f"Did you mean {near}?" in message if near else "docs/recipe.md" in message


def test_nearest_knows_when_nothing_is_near() -> None:
    assert nearest("zzz", ["lora_rank", "seed"]) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\nseed: 1\nseed: 2\n", ", line 4 is not valid YAML: seed stands there already, in line 3."),
        ("lr_scheduler_kwargs:\n  a: 1\n  a: 2\n", ", line 3 is not valid YAML: a stands there already, in line 2."),
        ("a: [1\n", "is not valid YAML"),
        ("- a\n", "must hold `key: value` lines."),
        ("", "The recipe names no model; set model_name_or_path."),
        ("model_name_or_path: m\nseeed: 1\n", "Did you mean seed?"),
    ],
)
def test_bad_files_are_refused(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as error:
        recipe(yaml=text, tmp_path=tmp_path)
    assert words in error.value.message


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be read: No such file"):
        read_recipe(tmp_path / "none.yaml", [])
    (tmp_path / "latin.yaml").write_bytes("a: é".encode("latin-1"))
    with pytest.raises(InvalidInput, match="no UTF-8 text"):
        read_recipe(tmp_path / "latin.yaml", [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lora_rank"], "'lora_rank' is no override; write key=value"),
        (["seed=1", "seed=2"], "seed is given twice on the command line"),
        (["run_name=[a"], "run_name=[a is no YAML value"),
    ],
)
def test_bad_words_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(InvalidInput) as error:
        read_recipe(None, ["model_name_or_path=m", *words])
    assert message in error.value.message


def test_auto_is_a_value_of_some_keys_only() -> None:
    _, auto, _ = read_recipe(None, ["model_name_or_path=m", "learning_rate=auto", "num_train_epochs=auto"])
    assert auto == ("num_train_epochs", "learning_rate")
    assert "it must be a whole number" in refusal(lora_rank="auto")[0]


def test_one_interval_key_says_what_the_others_mean() -> None:
    assert given(save_steps=500).save_strategy == "steps"
    assert given(save_strategy="steps").save_steps == 500
    assert given(eval_steps=5).eval_strategy == "steps"
    assert given(eval_strategy="steps", logging_steps=10).eval_steps == 10
    best = given(eval_steps=5, load_best_model_at_end=True)
    assert (best.save_strategy, best.save_steps) == ("steps", 5)
    unneeded, _, notices = parse_recipe(
        {"model_name_or_path": "m", "save_strategy": "epoch", "save_steps": 500}, where="in `tuning`"
    )
    assert unneeded.save_steps is None
    assert notices == ["save_steps has no effect: save_strategy is epoch."]


CONTRADICTIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"bf16": True, "fp16": True}, "bf16", "fp16 and bf16 are different number formats"),
    ({"fp32": True, "pure_bf16": True}, "pure_bf16", "different number formats"),
    ({"streaming": True}, "max_steps", "set max_steps"),
    ({"streaming": True, "max_steps": 5}, "save_strategy", "streaming has no epochs"),
    ({"streaming": True, "max_steps": 5, "val_size": 0.1}, "val_size", "a share of rows it has not seen"),
    ({"eval_dataset": "a", "val_size": 0.1}, "val_size", "leave one of them out"),
    ({"val_size": 2.5}, "val_size", "a share below 1 or a whole number"),
    ({"interleave_probs": "0.5,0.5"}, "interleave_probs", "needs mix_strategy"),
    (
        {"interleave_probs": "1", "dataset": "a,b", "mix_strategy": "interleave_over"},
        "interleave_probs",
        "1 shares for 2 data sets",
    ),
    ({"interleave_probs": "0.5,0.4", "mix_strategy": "interleave_over"}, "interleave_probs", "they sum to 0.9"),
    ({"mask_history": True, "train_on_prompt": True}, "mask_history", "leave one out"),
    ({"warmup_steps": 5, "warmup_ratio": 0.1}, "warmup_ratio", "leave one of them out"),
    ({"freeze_trainable_layers": 3}, "freeze_trainable_layers", "belongs to finetuning_type freeze"),
    ({"finetuning_type": "full", "use_dora": True}, "use_dora", "belongs to finetuning_type lora"),
    ({"create_new_adapter": True}, "create_new_adapter", "adapter_name_or_path, which is not given"),
    ({"adapter_name_or_path": "a,b"}, "adapter_name_or_path", "a run goes on from one"),
    ({"eval_strategy": "steps"}, "eval_steps", "must say every how many"),
    ({"early_stopping_steps": 2, "eval_strategy": "no"}, "early_stopping_steps", "eval_strategy is no"),
    ({"load_best_model_at_end": True, "eval_strategy": "no"}, "load_best_model_at_end", "needs validation"),
    (
        {"load_best_model_at_end": True, "eval_steps": 4, "save_steps": 6},
        "load_best_model_at_end",
        "a multiple of eval_steps",
    ),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_kwargs", "min_lr_rate"),
    ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_kwargs", "num_decay_steps"),
]


@pytest.mark.parametrize(("values", "param", "words"), CONTRADICTIONS)
def test_contradictions_are_told(values: dict[str, Any], param: str, words: str) -> None:
    message, named = refusal(**values)
    assert words in message
    assert named == param


def test_a_recipe_travels_as_json() -> None:
    made = given(
        lora_target="q_proj", lr_scheduler_kwargs={"a": 1}, interleave_probs="1", mix_strategy="interleave_over"
    )
    assert Recipe.model_validate_json(made.model_dump_json()) == made


def test_dora_may_have_dropout() -> None:
    assert given(use_dora=True, lora_dropout=0.1).lora_dropout == 0.1
