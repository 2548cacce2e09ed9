"""The safetensors header: what the official writer makes is read, everything else is refused by a TuneloopError."""

import io
import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load, save
from tuneloop.adapters.safetensors_header import MAX_HEADER_BYTES, SafetensorsHeader, read_header
from tuneloop.storage.errors import InvalidInput, TooLarge, TuneloopError


def parse(content: bytes) -> SafetensorsHeader:
    return read_header(io.BytesIO(content), len(content))


def packed(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int, end: int, dtype: str = "U8", shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def test_reads_what_the_official_writer_writes() -> None:
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "b": np.ones((2, 3), np.float32),
        "a": np.zeros((4,), np.float16),
        "empty": np.zeros((0, 5), np.float64),
    }
    content = save(tensors, metadata={"format": "pt"})
    header = parse(content)
    assert {name: (t.dtype, t.shape) for name, t in header.tensors.items()} == {
        "a": ("F16", (4,)),
        "b": ("F32", (2, 3)),
        "empty": ("F64", (0, 5)),
    }
    assert header.raw + content[len(header.raw) :] == content
    assert header.data_bytes == 24 + 8
    b = header.tensors["b"]
    assert content[len(header.raw) :][b.begin : b.end] == tensors["b"].tobytes()


def test_a_header_of_640_bytes_is_no_pickle() -> None:
    """Its length begins with 0x80 0x02, as a pickle does."""
    text = json.dumps({"x": entry(0, 1)}).encode().ljust(640)
    assert packed(text, b"\0")[:2] == b"\x80\x02"
    assert list(parse(packed(text, b"\0")).tensors) == ["x"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too few"),
        (b"\0" * 7, "too few"),
        (b"\0" * 16, "not a JSON object"),
        (struct.pack("<Q", 500) + b"{}", "cut off"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "cut off"),
        (packed(b"[1]"), "not a JSON object"),
        (packed(b'{"a":'), "not valid JSON"),
        (packed(b'{"a\xff": 1}'), "not valid JSON"),
        (packed(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "not valid JSON"),
        (packed(b'{"a": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}, "a": 1}', b"\0"), "'a' twice"),
        (packed(b'{"a": {"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"\0"), "'dtype' twice"),
        (packed({"__metadata__": {"a": 1}}), "__metadata__"),
        (packed({"__metadata__": ["a"]}), "__metadata__"),
        (packed({"a": 3}), "must have just"),
        (packed({"a": {**entry(0, 1), "extra": 1}}, b"\0"), "must have just"),
        (packed({"a": entry(0, 1, "Q4")}, b"\0"), "unknown dtype"),
        (packed({"a": {**entry(0, 1), "dtype": ["U8"]}}, b"\0"), "unknown dtype"),
        (packed({"a": entry(0, 1, shape=[-1])}, b"\0"), "shape"),
        (packed({"a": {**entry(0, 1), "shape": [True]}}, b"\0"), "shape"),
        (packed({"a": {**entry(0, 1), "shape": [1.0]}}, b"\0"), "shape"),
        (packed({"a": entry(0, 1, shape=[1] * 9)}, b"\0"), "shape"),
        (packed({"a": entry(1, 0, shape=[1])}, b"\0"), "data_offsets"),
        (packed({"a": {**entry(0, 1), "data_offsets": [0]}}, b"\0"), "data_offsets"),
        (packed({"a": entry(0, 2, shape=[3])}, b"\0\0"), "do not hold its shape"),
        (packed({"a": entry(0, 2, shape=[2**62, 2**62])}, b"\0\0"), "do not hold its shape"),
        (packed({"a": entry(0, 2), "b": entry(1, 3)}, b"\0\0\0"), "overlap"),
        (packed({"a": entry(0, 1), "b": entry(2, 3)}, b"\0\0\0"), "hole"),
        (packed({"a": entry(1, 2)}, b"\0\0"), "hole"),
        (packed({"a": entry(0, 2)}, b"\0"), "need 2 bytes"),
        (packed({"a": entry(0, 1)}, b"\0\0"), "need 1 bytes"),
        (packed({"": entry(0, 1)}, b"\0"), "tensor name"),
        (packed({"a\n": entry(0, 1)}, b"\0"), "tensor name"),
    ],
)
def test_broken_files_are_refused_with_the_reason(content: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        parse(content)
    assert caught.value.code == "broken_safetensors"
    assert len(caught.value.message) < 700


def test_a_huge_header_is_refused_before_it_is_read() -> None:
    class Endless(io.RawIOBase):
        def read(self, size: int = -1, /) -> bytes:
            assert 0 <= size <= 9
            return (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{")[:size]

    with pytest.raises(TooLarge, match="header"):
        read_header(Endless(), 2 * MAX_HEADER_BYTES)


@pytest.mark.parametrize(
    "head", [b"PK\x03\x04rest of a zip", b"\x80\x02}q\x00X\x05\x00\x00", b"\x80\x04\x95\x10\0\0\0\0\0\0"]
)
def test_pickles_under_a_false_name_are_refused_as_pickles(head: bytes) -> None:
    with pytest.raises(InvalidInput, match="pickle") as caught:
        parse(head)
    assert caught.value.code == "pickle_refused"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F16", "F4", "BF16", "X"]) | json_values,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | json_values,
    }
)


def agrees_with_the_official_reader(content: bytes) -> None:
    """Never anything but a TuneloopError; and what is accepted, the official reader accepts too."""
    try:
        header = parse(content)
    except TuneloopError:
        return
    try:
        official = set(load(content))
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, SafetensorError):
            raise
        return  # numpy lacks the dtype
    assert official == set(header.tensors)


@given(st.binary(max_size=300))
def test_random_bytes(content: bytes) -> None:
    agrees_with_the_official_reader(content)


@given(st.dictionaries(st.text(max_size=4), entries | json_values, max_size=4), st.integers(0, 40))
def test_random_headers(header: dict[str, Any], size: int) -> None:
    agrees_with_the_official_reader(packed(header, bytes(size)))


@given(st.data())
def test_mutated_files(data: st.DataObject) -> None:
    content = bytearray(save({"a": np.ones((2, 3), np.float32), "b": np.ones(3, np.float16)}))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    agrees_with_the_official_reader(bytes(content[: data.draw(st.integers(0, len(content)))]))
