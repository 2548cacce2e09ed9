"""Which weights of a model are trained without adapters: all (`full`), or some layers and modules (`freeze`)."""

from typing import Any

from ...storage.errors import InvalidInput
from ..recipe.recipe import Recipe


def unfreeze(model: Any, recipe: Recipe) -> None:
    """Set `requires_grad` as the recipe says. Raises InvalidInput for what the model doesn't have.

    `freeze_trainable_layers` counts layers from the end, negative numbers from the beginning, as LLaMA-Factory does.
    """
    if recipe.finetuning_type == "full":
        model.requires_grad_(True)
        return
    model.requires_grad_(False)
    prefix, count = decoder_layers(model)
    trained = _trained(model, recipe, prefix, count)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def decoder_layers(model: Any) -> tuple[str, int]:
    """The name of the list of decoder layers (`model.layers`) and how many there are."""
    import torch

    lists = [(name, len(module)) for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    if not lists:
        raise InvalidInput(
            "The model has no list of layers, so `freeze` cannot choose some; use lora or full.",
            param="finetuning_type",
        )
    return max(lists, key=lambda item: item[1])


def _trained(model: Any, recipe: Recipe, prefix: str, count: int) -> set[str]:
    names = [name for name, _ in model.named_parameters()]
    chosen = recipe.freeze_trainable_layers
    if abs(chosen) > count or chosen == 0:
        raise InvalidInput(
            f"freeze_trainable_layers is {chosen}, and the model has {count} layers; give 1 to {count}, or -1 to "
            f"-{count} to count from the first.",
            param="freeze_trainable_layers",
        )
    layers = range(count - chosen, count) if chosen > 0 else range(-chosen)
    inside = {name: name.removeprefix(f"{prefix}.").split(".", 1) for name in names if name.startswith(f"{prefix}.")}
    trained = {
        name
        for name, (layer, rest) in inside.items()
        if int(layer) in layers
        and (recipe.freeze_trainable_modules == ("all",) or _has_part(rest, recipe.freeze_trainable_modules))
    }
    _check(recipe.freeze_trainable_modules, [rest for _, rest in inside.values()], "freeze_trainable_modules")
    outside = [name for name in names if name not in inside]
    _check(recipe.freeze_extra_modules, outside, "freeze_extra_modules")
    return trained | {name for name in outside if _has_part(name, recipe.freeze_extra_modules)}


def _has_part(name: str, parts: tuple[str, ...]) -> bool:
    return any(f".{part}." in f".{name}." for part in parts)


def _check(parts: tuple[str, ...], names: list[str], key: str) -> None:
    for part in parts:
        if part != "all" and not any(_has_part(name, (part,)) for name in names):
            known = sorted({piece for name in names for piece in name.split(".")[:-1] if not piece.isdigit()})
            raise InvalidInput(f"{key} {part!r} is no module there. There are {', '.join(known)}.", param=key)
