"""Decides whether a PEFT folder is an adapter that can be served, before an engine sees it. It trusts nothing in it.

Blocking: callers run it in a thread. The weights are read once, in pieces, for the digest and the check for NaN alike.
"""

import hashlib
import os
import re
import stat
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

from ..storage.errors import InvalidInput
from .base import AdapterFacts, AdapterLimits, ModuleShape
from .files import ADAPTER_FILES, CHUNK, CONFIG_NAME, WEIGHTS_NAME, pickle_name, refuse_pickle, shown, too_many_bytes
from .lora_tensors import LoraTensors, group_tensors
from .peft_config import LoraSettings, read_settings
from .safetensors_header import SafetensorsHeader, TensorInfo, read_header

_EXPONENT_BITS = {
    "F64": ("<u8", 0x7FF0 << 48),
    "F32": ("<u4", 0x7F80 << 16),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
_NAMED = 3  # offenders that a message names


def inspect_folder(folder: Path, limits: AdapterLimits) -> AdapterFacts:
    """Check the two PEFT files of a folder as far as that goes without the base model, and say what the adapter is.

    Raises InvalidInput with what is wrong and the way out, TooLarge over a limit.
    """
    size_bytes = _file_sizes(folder, limits)
    settings = read_settings(folder, limits)
    with _open_weights(folder) as file:
        header = read_header(file, os.fstat(file.fileno()).st_size)
        modules = group_tensors(header, use_dora=settings.use_dora)
        _check_ranks(modules, settings)
        digest = hashlib.sha256()
        canonical = settings.canonical()
        digest.update(len(canonical).to_bytes(8, "little") + canonical + header.raw)
        for piece in _finite_pieces(file, header):
            digest.update(piece)
    return AdapterFacts(
        digest=f"sha256:{digest.hexdigest()}",
        peft_type="LORA",
        base_model_name=settings.base_model_name,
        rank=settings.largest_rank,
        alpha=settings.alpha,
        targets=tuple(modules),
        use_dora=settings.use_dora,
        use_rslora=settings.use_rslora,
        size_bytes=size_bytes,
    )


def check_against_base(folder: Path, facts: AdapterFacts, modules: Mapping[str, ModuleShape], base: str) -> None:
    """Check that every tensor belongs to a linear module of the base model `base` and fits its shape.

    `facts` are those that `inspect_folder` gave for the folder. Raises InvalidInput that names the first offenders.
    """
    with _open_weights(folder) as file:
        header = read_header(file, os.fstat(file.fileno()).st_size)
    tensors = group_tensors(header, use_dora=facts.use_dora)
    trained = f" It was trained on {shown(facts.base_model_name)}." if facts.base_model_name else ""
    unknown = [name for name in tensors if name not in modules]
    if unknown:
        raise InvalidInput(
            f"The adapter does not fit base model {shown(base)}, which has no module "
            f"{_few(map(shown, unknown))}.{trained} The base has {_summary(modules)}. "
            "Name the base model that the adapter was trained on.",
            param="base",
            code="wrong_base",
        )
    misfits = [
        f"{shown(name)}: adapter {_size(tensor.shape)}, base {_size(modules[name])}"
        for name, tensor in tensors.items()
        if tensor.shape != modules[name]
    ]
    if misfits:
        raise InvalidInput(
            f"The adapter does not fit base model {shown(base)}: modules differ in shape "
            f"({_few(misfits, '; ')}).{trained} Name the base model that the adapter was trained on.",
            param="base",
            code="wrong_base",
        )


def _file_sizes(folder: Path, limits: AdapterLimits) -> int:
    """The bytes of both files together, which must be plain files (no links, no devices)."""
    total = 0
    for name in ADAPTER_FILES:
        try:
            status = (folder / name).lstat()
        except FileNotFoundError:
            present = sorted(entry.name for entry in folder.iterdir())
            if name == WEIGHTS_NAME and (pickles := [entry for entry in present if pickle_name(entry)]):
                raise refuse_pickle(pickles[0]) from None
            found = f"only {_few(map(shown, present))}" if present else "nothing"
            raise InvalidInput(
                f"The adapter has no {name}: a PEFT adapter needs {CONFIG_NAME} and {WEIGHTS_NAME}, and {found} "
                "was found.",
                param="file",
                code="missing_file",
            ) from None
        if not stat.S_ISREG(status.st_mode):
            raise InvalidInput(f"{name} is not a plain file; send the file itself, not a link to it.", param="file")
        total += status.st_size
    if total > limits.max_bytes:
        raise too_many_bytes("The adapter", limits.max_bytes)
    return total


def _open_weights(folder: Path) -> BinaryIO:
    return os.fdopen(os.open(folder / WEIGHTS_NAME, os.O_RDONLY | os.O_NOFOLLOW), "rb")


def _check_ranks(modules: Mapping[str, LoraTensors], settings: LoraSettings) -> None:
    ranks = settings.rank_pattern.of_all(modules)
    settings.alpha_pattern.of_all(modules)  # so that the engine may rely on patterns that end
    for module, tensors in modules.items():
        expected = ranks.get(module, settings.rank)
        if tensors.rank != expected:
            raise InvalidInput(
                f"Module {shown(module)} has rank {tensors.rank} in {WEIGHTS_NAME}, but {CONFIG_NAME} gives it "
                f"{expected} by r and rank_pattern; the two files must come from the same save.",
                param="file",
                code="rank_mismatch",
            )


def _finite_pieces(file: BinaryIO, header: SafetensorsHeader) -> Iterator[bytes]:
    """The data in pieces, each checked: InvalidInput names the first tensor that holds NaN or infinity."""
    import numpy as np

    tensors = list(header.tensors.values())
    for dtype, group in groupby(tensors, key=lambda tensor: tensor.dtype):
        run = list(group)
        position, end = run[0].begin, run[-1].end
        integer, exponent = _EXPONENT_BITS[dtype]
        while position < end:
            piece = file.read(min(CHUNK, end - position))
            if len(piece) != min(CHUNK, end - position):
                raise InvalidInput(f"{WEIGHTS_NAME} changed while it was read; send it again.", param="file")
            bits = np.frombuffer(piece, dtype=integer) & exponent
            if int(bits.max()) == exponent:  # all exponent bits set: NaN or infinity in every IEEE format
                offset = position + int(bits.argmax()) * bits.itemsize
                raise _not_finite(tensors, offset)
            yield piece
            position += len(piece)


def _not_finite(tensors: Sequence[TensorInfo], offset: int) -> InvalidInput:
    tensor = tensors[bisect_right(tensors, offset, key=lambda tensor: tensor.begin) - 1]
    return InvalidInput(
        f"{WEIGHTS_NAME} holds NaN or infinity in tensor {shown(tensor.name)}, so every answer would be broken. The "
        "training has diverged: take an earlier checkpoint, or train with a lower learning rate.",
        param="file",
        code="not_finite",
    )


def _few(items: Iterable[str], separator: str = ", ") -> str:
    listed = list(items)
    more = f"{separator}and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    return separator.join(listed[:_NAMED]) + more


def _size(shape: ModuleShape) -> str:
    return f"{shape.in_features} to {shape.out_features}"


def _summary(modules: Mapping[str, ModuleShape]) -> str:
    """The base's module names with their layer numbers folded: `model.layers.{0-29}.mlp.up_proj`."""
    if not modules:
        return "no module that an adapter may target"
    folded: dict[str, list[int]] = {}
    for name in modules:
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        key = name if number is None else f"{name[: number.start()]}{{}}{name[number.end() :]}"
        folded.setdefault(key, []).extend([int(number[0])] if number else [])
    names = [key.replace("{}", f"{{{min(n)}-{max(n)}}}", 1) if n else key for key, n in folded.items()]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more kinds" if len(names) > 12 else "")
