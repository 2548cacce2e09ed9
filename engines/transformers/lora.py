"""LoRA weights in the shape that the batch needs: prepared on the host, then installed into device slots.

A *prepared* adapter holds, for each fused linear, A [R, in] and B [R, out] with the scale (and DoRA's magnitude) folded
into B. R is the rank padded to a power of two times the number of parts of that linear. Knows nothing of requests.

Sources: LoRA arXiv:2106.09685, rsLoRA arXiv:2312.03732, DoRA arXiv:2402.09353; PEFT's file format and pattern rules.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ...adapters.base import AdapterLimits
from ...adapters.peft_config import LoraSettings, read_settings
from ...storage.errors import InvalidInput
from .linear import AdaptedLinear

_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class PreparedLinear:
    """`magnitude` [out] multiplies the base product's rows (DoRA); it is None for plain LoRA."""

    a: Tensor
    b: Tensor
    magnitude: Tensor | None


@dataclass(frozen=True, slots=True)
class PreparedAdapter:
    digest: str
    rank_class: int
    linears: Mapping[str, PreparedLinear]  # by AdaptedLinear.name
    size_bytes: int

    @property
    def uses_dora(self) -> bool:
        return any(p.magnitude is not None for p in self.linears.values())


def rank_class(rank: int) -> int:
    """The rank that adapters of `rank` are padded to: a power of two, 8 at least."""
    return max(8, 1 << (rank - 1).bit_length())


def _read(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    with safe_open(path / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - safe_open is not a mapping
            tensors[key] = file.get_tensor(key).float()
    return tensors


def prepare(
    path: Path, digest: str, modules: Mapping[str, tuple[AdaptedLinear, int]], max_rank: int
) -> PreparedAdapter:
    """Read a validated PEFT folder. `modules` maps a PEFT module name to its fused linear and part number.

    Raises InvalidInput for what validation cannot have let through for this base model (an adapter of another base).
    """
    settings = read_settings(path, AdapterLimits(max_rank=max_rank))
    tensors = _read(path)
    by_linear: dict[str, dict[int, str]] = {}
    for key in tensors:
        if not key.endswith(".lora_A.weight"):
            continue
        module = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        if module not in modules:
            raise InvalidInput(f"The adapter's module '{module}' does not exist in this base model.", param="adapter")
        linear, part = modules[module]
        by_linear.setdefault(linear.name, {})[part] = module
    ranks = {k: t.shape[0] for k, t in tensors.items() if k.endswith(".lora_A.weight")}
    largest = max(ranks.values(), default=0)
    if largest == 0:
        raise InvalidInput("The adapter has no LoRA matrices.", param="adapter")
    if largest > max_rank:
        raise InvalidInput(f"The adapter's rank {largest} is over max_lora_rank={max_rank}.", param="adapter")
    padded = rank_class(largest)
    by_name = {linear.name: linear for linear, _ in modules.values()}
    prepared: dict[str, PreparedLinear] = {}
    for name, parts in by_linear.items():
        prepared[name] = _prepare_linear(by_name[name], parts, settings, tensors, padded)
    size = sum(p.a.nbytes + p.b.nbytes for p in prepared.values())
    return PreparedAdapter(digest, padded, prepared, size)


def _prepare_linear(
    linear: AdaptedLinear,
    parts: Mapping[int, str],
    settings: LoraSettings,
    tensors: Mapping[str, Tensor],
    padded: int,
) -> PreparedLinear:
    a = torch.zeros(padded * len(linear.parts), linear.in_features)
    b = torch.zeros(padded * len(linear.parts), linear.out_features)
    magnitude: Tensor | None = None
    for part, module in parts.items():
        start, size = linear.parts[part].offset, linear.parts[part].size
        a_part = tensors[f"{_PREFIX}{module}.lora_A.weight"]
        b_part = tensors[f"{_PREFIX}{module}.lora_B.weight"]
        rank = a_part.shape[0]
        b_scaled = b_part * settings.scaling_of(module)
        m = tensors.get(f"{_PREFIX}{module}.lora_magnitude_vector")
        if m is not None:
            base = linear.dense()[start : start + size]
            norm = torch.linalg.vector_norm(base + b_scaled @ a_part, dim=1)
            factor = m.reshape(-1) / norm
            b_scaled = b_scaled * factor[:, None]
            magnitude = torch.ones(linear.out_features) if magnitude is None else magnitude
            magnitude[start : start + size] = factor
        row = part * padded
        a[row : row + rank] = a_part
        b[row : row + rank, start : start + size] = b_scaled.t()
    return PreparedLinear(a, b, magnitude)
