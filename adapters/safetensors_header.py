"""Reads the header of a safetensors file strictly. It knows nothing of LoRA, and needs neither numpy nor torch.

Format: 8 bytes (little-endian length n), n bytes of JSON, then the data. The JSON maps each tensor's name to its dtype,
shape and `data_offsets` [begin, end) within the data; the tensors must cover the data without holes or overlaps
(https://huggingface.co/docs/safetensors).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..storage.errors import InvalidInput, TooLarge
from .files import Readable, pickle_content, refuse_pickle, shown

MAX_HEADER_BYTES = 16 * 1024**2  # about 100,000 tensors
MAX_DIMENSIONS = 8
_MAX_NAME = 1024

DTYPE_BITS: Mapping[str, int] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor: `begin` and `end` are bytes from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsHeader:
    """`raw` are the file's bytes before the data; `tensors` are in the order of their data."""

    raw: bytes
    tensors: Mapping[str, TensorInfo]
    data_bytes: int


def read_header(source: Readable, file_bytes: int, *, name: str = "adapter_model.safetensors") -> SafetensorsHeader:
    """Read from the start of a file of `file_bytes` bytes and leave it at the start of the data.

    Raises InvalidInput (TooLarge for an absurd header) with what is broken; `name` is the file's name in messages.
    """
    prefix = _read_exactly(source, min(9, file_bytes))
    if pickle_content(prefix):
        raise refuse_pickle(name)
    if len(prefix) < 9:
        raise _broken(name, f"it has {file_bytes} bytes, too few for a header")
    length = int.from_bytes(prefix[:8], "little")
    if length > file_bytes - 8:
        raise _broken(name, f"its header claims {length} bytes, but the file has only {file_bytes}: it was cut off")
    if length > MAX_HEADER_BYTES:
        raise TooLarge(
            f"{shown(name)} has a header of {length} bytes, more than the {MAX_HEADER_BYTES} that this server reads; "
            "an adapter needs far fewer.",
            param="file",
        )
    body = prefix[8:] + _read_exactly(source, length - 1) if length else b""
    if len(body) != length:
        raise _broken(name, "it ends inside its header: it was cut off")
    data_bytes = file_bytes - 8 - length
    tensors = _tensors(_parse_json(body, name), data_bytes, name)
    return SafetensorsHeader(raw=prefix[:8] + body, tensors=tensors, data_bytes=data_bytes)


def _read_exactly(source: Readable, size: int) -> bytes:
    parts = []
    while size > 0 and (part := source.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _parse_json(body: bytes, name: str) -> dict[str, Any]:
    if body[:1] != b"{":
        raise _broken(name, "its header is not a JSON object")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            duplicate = next(key for key in keys if keys.count(key) > 1)
            raise _broken(name, f"its header has {shown(duplicate)} twice")
        return result

    try:
        parsed = json.loads(body.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _broken(name, "its header is not valid JSON in UTF-8") from error
    if not isinstance(parsed, dict):
        raise _broken(name, "its header is not a JSON object")
    return parsed


def _tensors(header: dict[str, Any], data_bytes: int, file: str) -> dict[str, TensorInfo]:
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise _broken(file, "its __metadata__ is not a mapping of strings to strings")
    tensors = sorted((_tensor(key, value, file) for key, value in header.items()), key=lambda t: (t.begin, t.end))
    position = 0
    for tensor in tensors:
        if tensor.begin != position:
            what = "overlap" if tensor.begin < position else "leave a hole before"
            raise _broken(file, f"the data offsets {what} tensor {shown(tensor.name)}")
        position = tensor.end
    if position != data_bytes:
        raise _broken(file, f"its tensors need {position} bytes of data, but {data_bytes} follow the header")
    return {tensor.name: tensor for tensor in tensors}


def _tensor(name: str, entry: Any, file: str) -> TensorInfo:
    if not name or len(name) > _MAX_NAME or not name.isprintable():
        raise _broken(file, f"the tensor name {shown(name)} is empty, too long or not printable")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _broken(file, f"tensor {shown(name)} must have just dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _broken(file, f"tensor {shown(name)} has the unknown dtype {shown(str(dtype))}")
    if not _sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise _broken(file, f"the shape of tensor {shown(name)} is not a list of up to {MAX_DIMENSIONS} sizes")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _broken(file, f"the data_offsets of tensor {shown(name)} are not [begin, end]")
    if math.prod(shape) * DTYPE_BITS[dtype] != (offsets[1] - offsets[0]) * 8:
        raise _broken(file, f"the data_offsets of tensor {shown(name)} do not hold its shape {shape} of {dtype}")
    return TensorInfo(name=name, dtype=dtype, shape=tuple(shape), begin=offsets[0], end=offsets[1])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _broken(file: str, why: str) -> InvalidInput:
    return InvalidInput(
        f"{shown(file)} is not a valid safetensors file: {why}. Save the adapter again and send the whole file.",
        param="file",
        code="broken_safetensors",
    )
