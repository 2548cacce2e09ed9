"""LoRA by PEFT: which modules get an adapter, and adapters that a run goes on from."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...storage.errors import InvalidInput
from ..recipe.recipe import Recipe
from .stack import check_stackable

if TYPE_CHECKING:
    import torch

_REGEX_SIGNS = frozenset("\\[](){}|^$*+?")


def add_lora(model: Any, recipe: Recipe, *, base_name: str, adapter: Path | None) -> Any:
    """A PeftModel around `model`: with a new adapter, with `adapter` to train on, or with a new one on top of it.

    On top means that the old adapter is merged into the weights that are trained on; `stack.py` joins both when the
    result is saved. Raises InvalidInput for targets that the model doesn't have.
    """
    from peft import PeftModel, get_peft_model

    if adapter is not None:
        if recipe.create_new_adapter:
            check_stackable(adapter, use_dora=recipe.use_dora)
        old = PeftModel.from_pretrained(
            model, adapter, is_trainable=not recipe.create_new_adapter, autocast_adapter_dtype=not recipe.pure_bf16
        )
        if not recipe.create_new_adapter:
            old.peft_config["default"].base_model_name_or_path = base_name
            return old
        model = old.merge_and_unload()
    config = lora_config(model, recipe)
    tuned = get_peft_model(model, config, autocast_adapter_dtype=not recipe.pure_bf16)
    tuned.peft_config["default"].base_model_name_or_path = base_name
    return tuned


def lora_config(model: Any, recipe: Recipe) -> Any:
    """PEFT's configuration of a new adapter."""
    from peft import LoraConfig

    targets = _targets(model, recipe.lora_target)
    _check_extra(model, recipe)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha if recipe.lora_alpha is not None else 2 * recipe.lora_rank,
        lora_dropout=recipe.lora_dropout,
        target_modules=targets,
        use_rslora=recipe.use_rslora,
        use_dora=recipe.use_dora,
        rank_pattern=dict(recipe.rank_pattern),
        alpha_pattern=dict(recipe.alpha_pattern),
        modules_to_save=list(recipe.additional_target) or None,
    )


def _targets(model: Any, wanted: tuple[str, ...]) -> Any:
    """What PEFT takes for `target_modules`, after checking that each part matches linear modules and nothing else."""
    modules = dict(model.named_modules())
    linear = _linear_modules(modules)
    if wanted == ("all",):
        return "all-linear"
    shown = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
    if len(wanted) == 1 and _REGEX_SIGNS & set(wanted[0]):
        matches = [name for name in modules if _full_match(wanted[0], name)]
        _check_linear(wanted[0], matches, linear, shown)
        return wanted[0]
    for part in wanted:
        matches = [name for name in modules if name == part or name.endswith(f".{part}")]
        _check_linear(part, matches, linear, shown)
    return list(wanted)


def _check_linear(part: str, matches: list[str], linear: Mapping[str, Any], shown: str) -> None:
    if not matches:
        raise InvalidInput(
            f"lora_target {part!r} matches no module of the model. Its linear modules are {shown}; `all` takes all.",
            param="lora_target",
        )
    other = next((name for name in matches if name not in linear), None)
    if other is not None:
        raise InvalidInput(
            f"lora_target {part!r} matches {other!r}, which is no linear layer, so that its adapter could not be "
            f"served. The linear modules are {shown}.",
            param="lora_target",
        )


def _check_extra(model: Any, recipe: Recipe) -> None:
    modules = [name for name, _ in model.named_modules()]
    for part in recipe.additional_target:
        if not any(name == part or name.endswith(f".{part}") for name in modules):
            raise InvalidInput(
                f"additional_target {part!r} matches no module of the model; embed_tokens and lm_head are usual ones.",
                param="additional_target",
            )


def _linear_modules(modules: Mapping[str, "torch.nn.Module"]) -> dict[str, Any]:
    import torch
    from transformers.pytorch_utils import Conv1D

    return {name: module for name, module in modules.items() if isinstance(module, (torch.nn.Linear, Conv1D))}


def _full_match(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise InvalidInput(
            f"lora_target {pattern!r} is no valid regular expression: {error}.", param="lora_target"
        ) from error
