"""The matrix products of a training step, by oneDNN where torch would take a slower library for them.

torch multiplies float32 matrices on a CPU by MKL, which on processors that are not Intel's uses half of what AVX-512
can do, and is behind oneDNN on AVX2 too. oneDNN takes plain and transposed weights alike, so nothing is packed and no
second copy of a weight exists. It knows no modules.
"""

import platform
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@cache
def _onednn() -> Any:
    """oneDNN's product, or None where it is not there or not known to be better."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    return torch.ops.mkldnn._linear_pointwise.default


def is_fast(*tensors: Tensor) -> bool:
    """Whether `product` has something to gain on these, and nothing like autocast is to be done first."""
    return (
        all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
        and _onednn() is not None
        and not torch.is_autocast_enabled("cpu")
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [rows, in] and weight [out, in], each possibly a transposed view -> [rows, out]. Without gradients."""
    run = _onednn()
    if run is None or not is_fast(x, weight) or not x.numel() or not weight.numel():
        return F.linear(x, weight, bias)
    y: Tensor = run(x, weight, bias, "none", [], "")
    return y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` with gradients of what needs them."""
    y: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """x Wᵀ + bias + scaling x Aᵀ Bᵀ with gradients for x, A [rank, in] and B [out, rank]; W and bias are frozen."""
    y: Tensor = _LoraLinear.apply(x, weight, bias, a, b, scaling)  # type: ignore[no-untyped-call]
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight)
        ctx.shape = x.shape
        return product(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            product(grad, weight.t()).view(ctx.shape) if for_x else None,
            product(grad.t(), rows.t()) if for_weight else None,
            grad.sum(0) if for_bias else None,
        )


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = product(rows, weight, bias)
        low = product(rows, a)
        y.addmm_(low, b.t(), alpha=scaling)
        ctx.save_for_backward(rows, weight, a, b, low)
        ctx.shape, ctx.scaling = x.shape, scaling
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, low = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_low = product(grad, b.t()).mul_(ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = product(grad, weight.t()).addmm_(grad_low, a).view(ctx.shape)
        # Products with a rank on one side are several times faster with the rank as the rows.
        grad_b = (low.t() @ grad).mul_(ctx.scaling).t()
        return grad_x, None, None, grad_low.t() @ rows, grad_b, None
