"""How many tokens a micro-batch may have and whether activations are computed twice: memory, estimated before a run.

Cutting a step into smaller micro-batches costs nothing here (no padding, one loss for the whole step), so that is done
first; gradient checkpointing, which costs a third of the speed, only if one sequence alone would not fit.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    import torch

    from ..recipe.recipe import Recipe

_FLOATS_PER_HIDDEN = 18  # of one token in one decoder layer that backward needs: norms, q, k, v, attention, residuals
_FLOATS_PER_INTERMEDIATE = 5
_SHARE = 0.4  # of the free memory: the loss, gradients, optimiser and buffers need some too
_CPU_TOKENS = 1024  # on a CPU more tokens make products no faster, only memory larger


@dataclass(frozen=True, kw_only=True)
class Budget:
    max_tokens: int
    checkpointing: bool


def plan_memory(model: Any, recipe: "Recipe", device: "torch.device", longest: int) -> Budget:
    """`longest` is the length of the longest sequence (or packed row) in tokens."""
    per_token = bytes_per_token(model.config, 2 if recipe.bf16 or recipe.fp16 or recipe.pure_bf16 else 4)
    fitting = max(1, int(_free_bytes(device) * _SHARE / per_token))
    checkpointing = fitting < longest if recipe.gradient_checkpointing == "auto" else recipe.gradient_checkpointing
    if checkpointing:  # only each layer's input is kept, and one layer's activations at a time
        layers = max(1, int(getattr(model.config.get_text_config(), "num_hidden_layers", 1)))
        fitting = max(longest, fitting * layers // 4)
    if device.type == "cpu":
        fitting = min(fitting, _CPU_TOKENS)
    return Budget(max_tokens=max(fitting, 1), checkpointing=bool(checkpointing))


def bytes_per_token(config: Any, width: int) -> int:
    """Memory of one token's activations in all layers, in bytes."""
    text = config.get_text_config()
    hidden = int(getattr(text, "hidden_size", 4096))
    intermediate = getattr(text, "intermediate_size", None) or 4 * hidden
    layers = int(getattr(text, "num_hidden_layers", 32))
    return layers * (hidden * _FLOATS_PER_HIDDEN + int(intermediate) * _FLOATS_PER_INTERMEDIATE) * width


def _free_bytes(device: "torch.device") -> int:
    import torch

    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    module = torch.get_device_module(device)
    free = getattr(module, "mem_get_info", None)
    return int(free(device)[0]) if free is not None else int(psutil.virtual_memory().available)
