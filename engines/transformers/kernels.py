"""Matrix kernels: how one linear layer's weight is stored and multiplied. Knows nothing of adapters or batches.

On a CPU the product is bound by the bytes of the weight in decode and by GEMM speed in prefill. fbgemm's fp16-stored
weights (fp32 maths) halve those bytes; oneDNN's reordered float32 weights are exact and still beat the plain product.
Other devices use the framework's own product.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...storage.errors import InvalidInput


class Kernel(ABC):
    """y = x Wᵀ + b for x [rows, in_features]; the returned y may be written to by the caller."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight as multiplied, [out_features, in_features] in float32 (DoRA needs its norms)."""


class NativeKernel(Kernel):
    """`F.linear` on the module's own weight: any device, any dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)

    def dense(self) -> Tensor:
        return self._weight.float()


class ModuleKernel(Kernel):
    """A layer that stores its weight in its own way (a quantised base): called as it is."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._module(x)
        return y

    def dense(self) -> Tensor:
        eye = torch.eye(int(self._module.in_features), device=next(self._module.parameters()).device)  # type: ignore[arg-type]
        bias = getattr(self._module, "bias", None)
        y: Tensor = self._module(eye).float()
        return (y if bias is None else y - bias.float()).t()


class OneDnnKernel(Kernel):
    """oneDNN with the weight reordered once into its blocked layout: float32, exact."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.float().contiguous(), None)
        self._bias = bias.float() if bias is not None else None
        self._run = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._run(x, self._weight, self._bias, "none", [], "")
        return y

    def dense(self) -> Tensor:
        dense: Tensor = self._weight.to_dense()
        return dense


class Float16Kernel(Kernel):
    """fbgemm: weights stored in fp16, products and sums in float32. Exact to the rounding of the weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        saturated = weight.abs().max().item() if weight.numel() else 0.0
        if saturated > torch.finfo(torch.float16).max:
            raise InvalidInput(
                f"A weight of {saturated:.3g} does not fit float16. Start the server with weights=float32.",
                param="weights",
            )
        self._packed = torch.ops.quantized.linear_prepack_fp16(
            weight.float(), bias.float() if bias is not None else None
        )
        self._run = torch.ops.quantized.linear_dynamic_fp16.default

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._run(x, self._packed)
        return y

    def dense(self) -> Tensor:
        weight: Tensor = torch.ops.quantized.linear_unpack_fp16(self._packed)[0]
        return weight.float()


class Int8Kernel(Kernel):
    """fbgemm: int8 weights a row, activations quantised at run time. Fast and lossy: only on the user's wish."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        weight = weight.float().contiguous()
        scales = (weight.abs().amax(dim=1) / 127.0).clamp_min(1e-12).double()
        zeros = torch.zeros_like(scales, dtype=torch.long)
        with (
            warnings.catch_warnings()
        ):  # torch means to replace its quantised tensors; fbgemm's packing takes only them
            warnings.simplefilter("ignore", UserWarning)
            quantised = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self._packed = torch.ops.quantized.linear_prepack(quantised, bias.float() if bias is not None else None)
        self._run = torch.ops.quantized.linear_dynamic.default

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._run(x, self._packed, True)  # 7-bit activations: 8 bits overflow the sums of AVX2
        return y

    def dense(self) -> Tensor:
        weight: Tensor = torch.ops.quantized.linear_unpack(self._packed)[0].dequantize()
        return weight


KernelFactory = Callable[[Tensor, Tensor | None], Kernel]  # packs a weight [out, in] and a bias; both may then go

KERNELS: dict[str, KernelFactory] = {
    "native": NativeKernel,
    "float32": OneDnnKernel,
    "float16": Float16Kernel,
    "int8": Int8Kernel,
}


def choose_kernel(weights: str, device: torch.device, bits_per_weight: float) -> tuple[KernelFactory, str]:
    """The kernel for `weights` (TransformersConfig) and the reason, for people. Raises InvalidInput if unfit."""
    if device.type != "cpu":
        if weights not in ("auto", "native"):
            raise InvalidInput(
                f"weights={weights} is a storage for CPUs, but the model is on {device}. Use weights=auto.",
                param="weights",
            )
        return NativeKernel, f"native: {device.type} has its own kernels"
    fbgemm = "fbgemm" in torch.backends.quantized.supported_engines
    if weights in ("float16", "int8") and not fbgemm:
        raise InvalidInput(
            f"weights={weights} needs fbgemm, which this build of torch lacks. Use weights=float32.", param="weights"
        )
    if weights == "auto":
        if fbgemm and bits_per_weight <= 16:
            return Float16Kernel, "float16: the checkpoint holds 16 bits or less a weight (fbgemm, float32 maths)"
        weights = "float32"
    if weights == "float32":
        if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            return NativeKernel, "native: this build of torch has no oneDNN"
        return OneDnnKernel, "float32: weights reordered by oneDNN"
    return KERNELS[weights], f"{weights}: asked for"
