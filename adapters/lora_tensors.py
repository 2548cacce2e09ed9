"""Groups the tensors of a PEFT file by the module they update. It reads names, dtypes and shapes, never the data.

PEFT saves `base_model.model.<module>.lora_A.weight` [r, in], `.lora_B.weight` [out, r] and, with DoRA,
`.lora_magnitude_vector` [out].
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..storage.errors import InvalidInput
from .base import ModuleShape
from .files import WEIGHTS_NAME, shown
from .safetensors_header import SafetensorsHeader, TensorInfo

FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")
_SAVE_AGAIN = "Save the adapter again with `model.save_pretrained(folder)` of PEFT"
_MERGE = "Merge the adapter (`model.merge_and_unload()`) and serve the result as a base model"

# Other tensors that PEFT or a hand-written export may have put into the file: what they are, and the way out.
_OTHERS = (
    (r"\.lora_embedding_[AB]$", "a low-rank update of an embedding, which is not served", _MERGE),
    (
        r"\.base_layer\.weight$",
        "a copy of a base model's layer",
        "Save the adapter with `save_embedding_layers=False`",
    ),
    (r"\.trainable_tokens_delta$", "an update of single embedding rows, which is not served", _MERGE),
    (r"\.lora_[AB]\.bias$|\.bias$", "a bias, and adapters that change biases are not served", _MERGE),
    (r"\.lora_[AB]\.[^.]+\.weight$", "named with the adapter's own name, as in a raw state dict", _SAVE_AGAIN),
    (r"\.lora_", "no lora_A, lora_B or lora_magnitude_vector, and variants of LoRA are not served", _MERGE),
    (r"\.weight$", "a whole module (modules_to_save, or resized embeddings), which is not served", _MERGE),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraTensors:
    """The update of one linear module; `magnitude` with DoRA only."""

    a: TensorInfo  # [rank, in_features]
    b: TensorInfo  # [out_features, rank]
    magnitude: TensorInfo | None  # [out_features]

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> ModuleShape:
        return ModuleShape(in_features=self.a.shape[1], out_features=self.b.shape[0])


def group_tensors(header: SafetensorsHeader, *, use_dora: bool) -> dict[str, LoraTensors]:
    """The tensors of each module, by its name in the base model, sorted.

    Raises InvalidInput, naming the tensor, for whatever else is in the file, for a missing partner, for wrong dtypes
    and for shapes that do not fit each other.
    """
    parts: dict[str, dict[str, TensorInfo]] = {}
    for tensor in header.tensors.values():
        module, part = _split(tensor)
        parts.setdefault(module, {})[part] = tensor
    if not parts:
        raise _invalid(f"holds no tensors. {_SAVE_AGAIN}")
    return {module: _module(module, parts[module], use_dora) for module in sorted(parts)}


def _split(tensor: TensorInfo) -> tuple[str, str]:
    name = tensor.name
    if not name.startswith(_PREFIX):
        raise _invalid(
            f"holds tensor {shown(name)}, whose name does not begin with {_PREFIX!r} as PEFT's do. {_SAVE_AGAIN}"
        )
    match = _TENSOR.fullmatch(name.removeprefix(_PREFIX))
    if match is None:
        for pattern, what, way_out in _OTHERS:
            if re.search(pattern, name):
                raise _invalid(f"holds tensor {shown(name)}, which is {what}. {way_out}")
        raise _invalid(f"holds tensor {shown(name)}, which is not part of a LoRA adapter. {_SAVE_AGAIN}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise _invalid(
            f"holds tensor {shown(name)} as {tensor.dtype}; convert it to one of {', '.join(sorted(FLOAT_DTYPES))}"
        )
    return match["module"], match["part"]


def _module(module: str, parts: Mapping[str, TensorInfo], use_dora: bool) -> LoraTensors:
    a, b, magnitude = (parts.get(part) for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"))
    if a is None or b is None:
        missing, present = ("lora_A", "lora_B") if a is None else ("lora_B", "lora_A")
        if a is None and b is None:
            present = "lora_magnitude_vector"
        raise _invalid(f"has {present} but no {missing} for module {shown(module)}. {_SAVE_AGAIN}")
    for tensor in (a, b):
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            raise _invalid(
                f"has tensor {shown(tensor.name)} of shape {list(tensor.shape)}; an update of a linear module has two "
                "sizes above 0. If training was sharded (DeepSpeed ZeRO-3, FSDP), gather the weights before saving"
            )
    if a.shape[0] != b.shape[1]:
        raise _invalid(
            f"has lora_A of rank {a.shape[0]} but lora_B of rank {b.shape[1]} for module {shown(module)}. {_SAVE_AGAIN}"
        )
    _check_magnitude(module, magnitude, b, use_dora)
    return LoraTensors(a=a, b=b, magnitude=magnitude)


def _check_magnitude(module: str, magnitude: TensorInfo | None, b: TensorInfo, use_dora: bool) -> None:
    if use_dora and magnitude is None:
        raise _invalid(
            f"has no lora_magnitude_vector for module {shown(module)}, though use_dora is true. {_SAVE_AGAIN}"
        )
    if magnitude is None:
        return
    if not use_dora:
        raise _invalid(
            f"has a lora_magnitude_vector for module {shown(module)}, though use_dora is false. {_SAVE_AGAIN}"
        )
    if magnitude.shape != (b.shape[0],):
        raise _invalid(
            f"has tensor {shown(magnitude.name)} of shape {list(magnitude.shape)}, but the module has {b.shape[0]} "
            f"outputs. {_SAVE_AGAIN}"
        )


def _invalid(problem: str) -> InvalidInput:
    return InvalidInput(f"{WEIGHTS_NAME} {problem}.", param="file")
