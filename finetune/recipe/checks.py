"""What keys of a recipe contradict each other, each told in a sentence. It knows no file and no model."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ...storage.errors import InvalidInput

if TYPE_CHECKING:
    from .recipe import Recipe

_FREEZE_KEYS = ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules")
_LORA_KEYS = (
    "adapter_name_or_path", "create_new_adapter", "lora_rank", "lora_alpha", "lora_dropout", "lora_target",
    "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "additional_target",
)  # fmt: skip
_SUM_TOLERANCE = 1e-6


def contradiction(recipe: "Recipe") -> tuple[str, str] | None:
    """The first key that cannot stand beside the others, and why; None if all can."""
    for part in (_method, _data, _optimisation, _precision, _validation):
        found = next(part(recipe), None)
        if found is not None:
            return found
    return None


def require_data(recipe: "Recipe", *, train: bool, validation: bool) -> None:
    """Refuse a recipe whose data are not there: `train` and `validation` say which files or data sets a run has.

    A share of the training data (`val_size`) counts as validation data by itself. Raises InvalidInput.
    """
    if not train:
        raise InvalidInput(
            "The recipe names no data. Set `dataset` to names of dataset_info.json, files, or sources as hf:org/name.",
            param="dataset",
        )
    if validation or recipe.val_size:
        return
    wishes = {
        "eval_strategy": recipe.eval_strategy not in (None, "no"),
        "early_stopping_steps": recipe.early_stopping_steps is not None,
        "load_best_model_at_end": recipe.load_best_model_at_end,
    }
    for key, wished in wishes.items():
        if wished:
            raise InvalidInput(
                f"{key} needs validation data, and there are none. Give some (eval_dataset, a validation file), set "
                f"val_size to split some off, or leave {key} out.",
                param=key,
            )


def _method(recipe: "Recipe") -> Iterator[tuple[str, str]]:
    kind = recipe.finetuning_type
    for keys, owner in ((_FREEZE_KEYS, "freeze"), (_LORA_KEYS, "lora")):
        for key in keys if kind != owner else ():
            if getattr(recipe, key) != type(recipe).model_fields[key].default:
                yield (
                    key,
                    f"{key} belongs to finetuning_type {owner}, and this recipe has {kind}; leave one of them out",
                )
    if recipe.create_new_adapter and recipe.adapter_name_or_path is None:
        yield (
            "create_new_adapter",
            (
                "create_new_adapter trains a new adapter on top of adapter_name_or_path, which is not given; a run "
                "without it makes a new adapter in any case"
            ),
        )
    if recipe.adapter_name_or_path and "," in recipe.adapter_name_or_path:
        yield (
            "adapter_name_or_path",
            (
                "adapter_name_or_path names several adapters, and a run goes on from one; merge the others into the "
                "base model first"
            ),
        )


def _data(recipe: "Recipe") -> Iterator[tuple[str, str]]:
    shares = recipe.interleave_probs
    if shares and recipe.mix_strategy == "concat":
        yield "interleave_probs", "interleave_probs needs mix_strategy interleave_under or interleave_over"
    if shares and recipe.dataset and len(shares) != len(recipe.dataset):
        yield (
            "interleave_probs",
            (f"interleave_probs has {len(shares)} shares for {len(recipe.dataset)} data sets; give one for each"),
        )
    if shares and (min(shares) < 0 or abs(sum(shares) - 1) > _SUM_TOLERANCE):
        yield "interleave_probs", f"interleave_probs must be shares that sum to 1, and they sum to {sum(shares):g}"
    if recipe.val_size and recipe.eval_dataset:
        yield "val_size", "val_size splits validation data off, and eval_dataset names some; leave one of them out"
    if recipe.val_size > 1 and recipe.val_size != int(recipe.val_size):
        yield "val_size", f"val_size is {recipe.val_size:g}; give a share below 1 or a whole number of rows"
    if recipe.mask_history and recipe.train_on_prompt:
        yield "mask_history", "mask_history trains on the last answer only, train_on_prompt on all; leave one out"
    if recipe.streaming:
        yield from _streaming(recipe)


def _streaming(recipe: "Recipe") -> Iterator[tuple[str, str]]:
    if recipe.max_steps is None:
        yield "max_steps", "streaming does not know how many rows will come; set max_steps"
    if 0 < recipe.val_size < 1:
        yield "val_size", "streaming cannot take a share of rows it has not seen; set val_size to a number of rows"
    if recipe.max_samples is not None:
        yield "max_samples", "streaming ends by max_steps; leave max_samples out, or streaming"
    if recipe.save_strategy == "epoch":
        yield "save_strategy", "streaming has no epochs; set save_strategy to steps (with save_steps) or to no"
    if recipe.eval_strategy == "epoch":
        yield "eval_strategy", "streaming has no epochs; set eval_strategy to steps (with eval_steps) or to no"


def _optimisation(recipe: "Recipe") -> Iterator[tuple[str, str]]:
    if recipe.warmup_steps and recipe.warmup_ratio:
        yield "warmup_ratio", "warmup_steps and warmup_ratio both say how long to warm up; leave one of them out"
    if recipe.lr_scheduler_type == "cosine_with_min_lr" and not {"min_lr", "min_lr_rate"} & set(
        recipe.lr_scheduler_kwargs
    ):
        yield (
            "lr_scheduler_kwargs",
            ("lr_scheduler_type cosine_with_min_lr needs its end; set lr_scheduler_kwargs to {min_lr_rate: 0.1}"),
        )
    if recipe.lr_scheduler_type == "warmup_stable_decay" and "num_decay_steps" not in recipe.lr_scheduler_kwargs:
        yield (
            "lr_scheduler_kwargs",
            (
                "lr_scheduler_type warmup_stable_decay needs its last part; set lr_scheduler_kwargs to "
                "{num_decay_steps: 100}"
            ),
        )


def _precision(recipe: "Recipe") -> Iterator[tuple[str, str]]:
    chosen = [key for key in ("fp32", "fp16", "bf16", "pure_bf16") if getattr(recipe, key)]
    if len(chosen) > 1 and chosen != ["bf16", "pure_bf16"]:
        yield chosen[1], f"{' and '.join(chosen)} are different number formats; leave all but one out"


def _validation(recipe: "Recipe") -> Iterator[tuple[str, str]]:
    for what in ("eval", "save"):
        if getattr(recipe, f"{what}_strategy") == "steps" and getattr(recipe, f"{what}_steps") is None:
            yield f"{what}_steps", f"{what}_strategy is steps, so {what}_steps must say every how many"
    evaluates = recipe.eval_strategy or "epoch"
    if recipe.early_stopping_steps is not None and evaluates == "no":
        yield "early_stopping_steps", "early_stopping_steps counts validations, and eval_strategy is no; set another"
    if not recipe.load_best_model_at_end:
        return
    if evaluates == "no":
        yield "load_best_model_at_end", "load_best_model_at_end needs validation, and eval_strategy is no; set another"
    saves = recipe.save_strategy
    if saves != evaluates or (saves == "steps" and (recipe.save_steps or 0) % (recipe.eval_steps or 1)):
        yield (
            "load_best_model_at_end",
            (
                "load_best_model_at_end needs a validation for each checkpoint; set save_strategy as eval_strategy, "
                "and save_steps to a multiple of eval_steps"
            ),
        )
