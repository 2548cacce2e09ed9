"""Every kernel computes x Wᵀ + b, to the precision that its storage promises, and tells the weight it multiplies by."""

import pytest
import torch
from tuneloop.engines.transformers.kernels import KERNELS, choose_kernel
from tuneloop.storage.errors import InvalidInput

TOLERANCE = {"native": 1e-6, "float32": 1e-6, "float16": 1e-3, "int8": 0.03}  # of the largest result


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_products(name: str, biased: bool, rows: int) -> None:
    torch.manual_seed(rows)
    weight = torch.randn(96, 288) * 0.05
    bias = torch.randn(96) if biased else None
    x = torch.randn(rows, 288)
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    kernel = KERNELS[name](weight.clone(), bias)
    error = (kernel(x).double() - expected).abs().max() / expected.abs().max()
    assert float(error) < TOLERANCE[name]
    assert torch.allclose(kernel.dense(), weight, atol=TOLERANCE[name] * float(weight.abs().max()))


@pytest.mark.parametrize("name", KERNELS)
def test_sums_do_not_overflow(name: str) -> None:
    """All products at their largest and of one sign: 8-bit by 8-bit ones overflow the 16-bit sums of AVX2."""
    weight = torch.full((32, 1024), 0.1)
    x = torch.ones(4, 1024)
    result = KERNELS[name](weight, None)(x)
    assert torch.allclose(result, torch.full_like(result, 102.4), rtol=0.02)


def test_the_choice_follows_the_checkpoint_and_the_device() -> None:
    cpu = torch.device("cpu")
    assert choose_kernel("auto", cpu, 16)[0] is KERNELS["float16"]
    assert choose_kernel("auto", cpu, 32)[0] is KERNELS["float32"]
    assert choose_kernel("int8", cpu, 16)[0] is KERNELS["int8"]
    assert choose_kernel("auto", torch.device("cuda"), 16)[0] is KERNELS["native"]
    with pytest.raises(InvalidInput, match="storage for CPUs"):
        choose_kernel("int8", torch.device("cuda"), 16)


def test_weights_beyond_float16_are_refused() -> None:
    with pytest.raises(InvalidInput, match="does not fit float16"):
        KERNELS["float16"](torch.full((8, 8), 1e6), None)
