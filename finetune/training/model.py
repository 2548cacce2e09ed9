"""The model of a run: loaded, with those weights unfrozen that the recipe trains. It knows no data and no loop."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...storage.errors import InvalidInput
from ..recipe.recipe import Recipe
from ..run_folder import RunSpec
from .arguments import mixed_precision
from .freeze import unfreeze
from .lora import add_lora

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """`model` is a PeftModel for LoRA, else transformers' own. `saved_dtype` is what a result model is stored in."""

    model: Any
    is_lora: bool
    saved_dtype: "torch.dtype"

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def trainable_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)


def load_model(spec: RunSpec, recipe: Recipe, device: "torch.device") -> TrainedModel:
    """Read the checkpoint and prepare what is trained. Raises InvalidInput for modules that the model doesn't have."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(spec.model_path, trust_remote_code=recipe.trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise InvalidInput(
            "The base model's checkpoint is quantised, and quantised weights cannot be trained. Name the "
            "full-precision model.",
            param="model_name_or_path",
        )
    model = AutoModelForCausalLM.from_pretrained(
        spec.model_path,
        config=config,
        dtype=_loaded_dtype(recipe, device),
        trust_remote_code=recipe.trust_remote_code,
        use_safetensors=True,
    )
    model.config.use_cache = False
    model.to(device)
    is_lora = recipe.finetuning_type == "lora"
    if is_lora:
        model = add_lora(model, recipe, base_name=spec.base_name, adapter=spec.adapter_path)
    else:
        unfreeze(model, recipe)
    saved = getattr(config, "dtype", None)
    return TrainedModel(
        model=model, is_lora=is_lora, saved_dtype=saved if isinstance(saved, torch.dtype) else torch.float32
    )


def _loaded_dtype(recipe: Recipe, device: "torch.device") -> "torch.dtype":
    """Frozen weights may be kept in 16 bits; what an optimiser changes in small steps may not, unless it is wished."""
    import torch

    precision = mixed_precision(recipe, device)
    if recipe.pure_bf16 or (recipe.finetuning_type == "lora" and precision == "bf16"):
        return torch.bfloat16
    if recipe.finetuning_type == "lora" and precision == "fp16":
        return torch.float16
    return torch.float32
