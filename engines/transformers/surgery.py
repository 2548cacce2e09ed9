"""Puts adapted linears into a freshly loaded model. It changes modules only; weights stay what the checkpoint says.

Every `nn.Linear` (and GPT-2's Conv1D) becomes an `AdaptedLinear`; q/k/v and gate/up of known layer types become one
product each. The result is a map from PEFT's module names to (linear, part number).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .batch import current
from .fused import FUSED_ATTENTION, FUSED_NORM, FusedAttention, FusedMLP, FusedNorm
from .kernels import Kernel, KernelFactory, ModuleKernel
from .linear import AdaptedLinear, LoraPlan, Part


@dataclass
class Surgeon:
    """Replaces the modules of one model. `fuse` is False for the path that keeps the model's own attention."""

    kernel: KernelFactory
    dtype: torch.dtype
    device: torch.device
    fuse: bool
    head: str | None  # module name of the LM head, whose rows are not the batch's tokens
    modules: dict[str, tuple[AdaptedLinear, int]] = field(default_factory=dict)

    def operate(self, model: nn.Module) -> None:
        if self.fuse:
            self._fuse(model)
        for name, module in list(model.named_modules()):
            for child_name, child in list(module.named_children()):
                if isinstance(child, (nn.Linear, Conv1D)):
                    setattr(module, child_name, self._linear([(f"{name}.{child_name}".lstrip("."), child)]))

    def _fuse(self, model: nn.Module) -> None:
        for name, module in list(model.named_modules()):
            for child_name, child in list(module.named_children()):
                path = f"{name}.{child_name}".lstrip(".")
                if type(child).__name__ in FUSED_ATTENTION and _plain(child, "q_proj", "k_proj", "v_proj", "o_proj"):
                    parts = [(f"{path}.{p}", getattr(child, p)) for p in ("q_proj", "k_proj", "v_proj")]
                    out = self._linear([(f"{path}.o_proj", child.o_proj)])
                    setattr(module, child_name, FusedAttention(child, self._linear(parts), out))
                elif type(child).__name__ in FUSED_NORM and self.dtype == torch.float32:
                    norm: Any = child
                    setattr(module, child_name, FusedNorm(norm.weight.data, norm.variance_epsilon))
                elif _is_gated_mlp(child):
                    parts = [(f"{path}.{p}", getattr(child, p)) for p in ("gate_proj", "up_proj")]
                    down = self._linear([(f"{path}.down_proj", child.down_proj)])
                    setattr(module, child_name, FusedMLP(self._linear(parts), down, child.act_fn))

    def _linear(self, named: list[tuple[str, Any]]) -> AdaptedLinear:
        weights = [_weight(m) for _, m in named]
        parts: list[Part] = []
        for (name, _), weight in zip(named, weights, strict=True):
            parts.append(Part(name, sum(p.size for p in parts), weight.shape[0]))
        bias = _joined_bias([m.bias for _, m in named], parts, weights[0])
        if len(named) == 1 and type(named[0][1]) not in (nn.Linear, Conv1D):
            kernel: Kernel = ModuleKernel(named[0][1])
        else:
            kernel = self.kernel(weights[0] if len(weights) == 1 else torch.cat(weights), bias)
        name = "+".join(n for n, _ in named)
        plan: Callable[[], LoraPlan | None] = current.head_plan if name == self.head else current.body_plan
        linear = AdaptedLinear(
            name,
            parts,
            kernel,
            in_features=weights[0].shape[1],
            bias=bias,
            dtype=self.dtype,
            device=self.device,
            plan=plan,
        )
        for number, (part_name, _) in enumerate(named):
            self.modules[part_name] = (linear, number)
        return linear


def _weight(module: Any) -> Tensor:
    """[out, in]; Conv1D stores the transpose."""
    weight: Tensor = module.weight.data
    return weight.t() if isinstance(module, Conv1D) else weight


def _joined_bias(biases: list[Tensor | None], parts: list[Part], like: Tensor) -> Tensor | None:
    if all(b is None for b in biases):
        return None
    pieces = [torch.zeros(p.size) if b is None else b.data for b, p in zip(biases, parts, strict=True)]
    return torch.cat([p.to(like.device, like.dtype) for p in pieces])


def _plain(module: nn.Module, *names: str) -> bool:
    return all(type(getattr(module, n, None)) is nn.Linear for n in names)


def _is_gated_mlp(module: nn.Module) -> bool:
    """`down(act(gate(x)) * up(x))`, by its class name and its parts."""
    return (
        type(module).__name__
        in ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "GemmaMLP", "Gemma2MLP", "Gemma3MLP")
        and _plain(module, "gate_proj", "up_proj", "down_proj")
        and callable(getattr(module, "act_fn", None))
    )
