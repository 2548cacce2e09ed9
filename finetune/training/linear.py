"""Puts faster products into a model that is to be trained on a CPU in float32. It changes no weight and no name.

Linear layers multiply by `products.py`; a LoRA layer of PEFT's computes base and update as one function, which keeps
its input once, makes no temporaries of its output's size, and needs one sum less in each direction. Whatever else PEFT
can do in a layer (dropout, DoRA, biases, merged or mixed adapters) is left to PEFT, whose inner layers are fast too.
"""

from typing import Any

from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from .products import is_fast, linear, lora_linear


class FastLinear(nn.Linear):
    """torch's linear layer by another library."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's name
        return linear(input, self.weight, self.bias) if is_fast(input, self.weight) else super().forward(input)


class FastLoraLinear(PeftLinear):  # type: ignore[misc]
    """PEFT's LoRA layer with the plain case as one function."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self._plain_adapter()
        if name is not None and not args and not kwargs:
            base, a, b = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
            if is_fast(x, base.weight, a, b):
                return lora_linear(x, base.weight, base.bias, a, b, self.scaling[name])
        slow: Tensor = super().forward(x, *args, **kwargs)
        return slow

    def _plain_adapter(self) -> str | None:
        """The one active adapter, if it is nothing but A and B on a frozen layer."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        name: str = self.active_adapters[0]
        if name not in self.lora_A or name in self.lora_variant or self.lora_B[name].bias is not None:
            return None
        if self.training and not isinstance(self.lora_dropout[name], nn.Identity):
            return None
        base = self.base_layer
        trained = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
        return None if type(base) is not FastLinear or trained else name


def install(model: nn.Module) -> None:
    """Let the linear layers of `model` compute by the classes above where it pays: on x86 CPUs, in float32.

    Call it once all layers are there (after PEFT). Losses and gradients stay the same up to rounding.
    """
    for module in model.modules():
        if "forward" in module.__dict__:
            continue  # somebody else's
        if type(module) is nn.Linear and is_fast(module.weight):
            module.__class__ = FastLinear
        elif type(module) is PeftLinear and isinstance(module.base_layer, nn.Linear):
            module.__class__ = FastLoraLinear
