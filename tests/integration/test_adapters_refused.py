"""Uploads that must not get in: each has its status, names its reason, and leaves nothing on disk or in memory."""

import io
import json
import pickle
import struct
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tuneloop.adapters.base import ModuleShape

from .peft_files import CONFIG, PREFIX, WEIGHTS, PeftFiles, random_adapter, tar_gz, zipped
from .serving import MODEL, Server, chat, error_of

Shapes = Mapping[str, ModuleShape]


@dataclass(frozen=True, kw_only=True)
class Bad:
    """`make` builds the archive from a good adapter; the answer has `status`, and `says` is in its message."""

    make: Callable[[PeftFiles], bytes]
    status: int = 400
    says: str


def with_files(**changes: bytes) -> Callable[[PeftFiles], bytes]:
    """The good adapter's archive with other contents under `config` or `weights`, or more files."""
    names = {"config": CONFIG, "weights": WEIGHTS}
    return lambda good: tar_gz({**good.files(), **{names[key]: value for key, value in changes.items()}})


def with_config(**changes: Any) -> Callable[[PeftFiles], bytes]:
    return lambda good: replace(good, config={**good.config, **changes}).tar_gz()


def with_member(name: str, kind: bytes, target: str = "") -> Callable[[PeftFiles], bytes]:
    """A tar with one more member that is no plain file."""
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return lambda good: tar_gz(good.files(), member)


def with_name(name: str) -> Callable[[PeftFiles], bytes]:
    return lambda good: tar_gz({**good.files(), name: b"x"})


def only(name: str) -> Callable[[PeftFiles], bytes]:
    return lambda good: tar_gz({name: good.files()[name]})


def change_tensors(change: Callable[[dict[str, Any]], None]) -> Callable[[PeftFiles], bytes]:
    def make(good: PeftFiles) -> bytes:
        tensors = {name: tensor.copy() for name, tensor in good.tensors.items()}
        change(tensors)
        return replace(good, tensors=tensors).tar_gz()

    return make


def first_key(tensors: Mapping[str, Any], part: str) -> str:
    return next(name for name in sorted(tensors) if f"lora_{part}" in name)


def put_nan(tensors: dict[str, Any]) -> None:
    tensors[first_key(tensors, "B")][3, 1] = np.nan


def put_infinity(tensors: dict[str, Any]) -> None:
    tensors[first_key(tensors, "A")] = np.full_like(tensors[first_key(tensors, "A")], np.inf)


def drop_b(tensors: dict[str, Any]) -> None:
    del tensors[first_key(tensors, "B")]


def rename_modules(tensors: dict[str, Any]) -> None:
    for name in list(tensors):
        tensors[name.replace("q_proj", "query").replace("v_proj", "value")] = tensors.pop(name)


def drop_prefix(tensors: dict[str, Any]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix(PREFIX)] = tensors.pop(name)


def narrow(tensors: dict[str, Any]) -> None:
    for name in list(tensors):
        if "lora_A" in name:
            tensors[name] = np.ascontiguousarray(tensors[name][:, :-64])


def put_integers(tensors: dict[str, Any]) -> None:
    name = first_key(tensors, "A")
    tensors[name] = np.ones(tensors[name].shape, np.int32)


def put_embedding(tensors: dict[str, Any]) -> None:
    tensors[f"{PREFIX}model.embed_tokens.lora_embedding_A"] = np.ones((8, 16), np.float32)


def bomb(good: PeftFiles) -> bytes:
    return zipped({CONFIG: good.files()[CONFIG], WEIGHTS: bytes(64 * 1024**2)})


def broken_header(good: PeftFiles) -> bytes:
    weights = good.files()[WEIGHTS]
    return tar_gz({CONFIG: good.files()[CONFIG], WEIGHTS: struct.pack("<Q", len(weights) * 2) + weights[8:]})


def overlapping(good: PeftFiles) -> bytes:
    spans = {"a": [0, 16], "b": [8, 24]}
    entries = {
        f"{PREFIX}model.layers.0.self_attn.q_proj.lora_{key.upper()}.weight": {
            "dtype": "F32",
            "shape": [1, 4],
            "data_offsets": span,
        }
        for key, span in spans.items()
    }
    header = json.dumps(entries).encode()
    return tar_gz({CONFIG: good.files()[CONFIG], WEIGHTS: struct.pack("<Q", len(header)) + header + bytes(24)})


def encrypted(good: PeftFiles) -> bytes:
    """A zip whose members say that they are encrypted; the flag is what readers go by."""
    content = bytearray(good.zip())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.find(signature)
        while at >= 0:
            content[at + offset] |= 1
            at = content.find(signature, at + 4)
    return bytes(content)


def twice(good: PeftFiles) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in [*good.files().items(), (CONFIG, b"{}")]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def pickled(good: PeftFiles) -> bytes:
    return tar_gz({CONFIG: good.files()[CONFIG], "adapter_model.bin": pickle.dumps({"weight": [1.0]})})


def disguised_pickle(good: PeftFiles) -> bytes:
    return tar_gz({CONFIG: good.files()[CONFIG], WEIGHTS: pickle.dumps({"weight": [1.0] * 100})})


def nested_archive(good: PeftFiles) -> bytes:
    return tar_gz({f"one/{name}": content for name, content in good.files().items()} | {"two/" + CONFIG: b"{}"})


BAD: dict[str, Bad] = {
    "no archive": Bad(make=lambda good: b"hello" * 1000, says="not an archive"),
    "truncated gzip": Bad(make=lambda good: good.tar_gz()[:-5000], says="archive"),
    "truncated zip": Bad(make=lambda good: good.zip()[:-30], says="archive"),
    "no configuration": Bad(make=only(WEIGHTS), says=CONFIG),
    "no weights": Bad(make=only(CONFIG), says=WEIGHTS),
    "symbolic link": Bad(make=with_member("link", tarfile.SYMTYPE, "/etc/passwd"), says="link"),
    "hard link": Bad(make=with_member("link", tarfile.LNKTYPE, CONFIG), says="link"),
    "device": Bad(make=with_member("null", tarfile.CHRTYPE), says="null"),
    "pipe": Bad(make=with_member("pipe", tarfile.FIFOTYPE), says="pipe"),
    "absolute path": Bad(make=with_name("/etc/cron.d/x"), says="absolute"),
    "climbing path": Bad(make=with_name("../../x"), says="climbs"),
    "the same name twice": Bad(make=twice, says="twice"),
    "two adapters": Bad(make=nested_archive, says="adapters"),
    "zip bomb": Bad(make=bomb, status=413, says="bomb"),
    "encrypted zip": Bad(make=encrypted, says="encrypt"),
    "pickle by name": Bad(make=pickled, says="adapter_model.bin"),
    "pickle by content": Bad(make=disguised_pickle, says="safetensors"),
    "configuration is no JSON": Bad(make=with_files(config=b"{"), says="JSON"),
    "not LoRA": Bad(make=with_config(peft_type="IA3"), says="peft_type"),
    "rank over the limit": Bad(
        make=lambda good: replace(good, config={**good.config, "r": 4096}).tar_gz(), status=413, says="rank"
    ),
    "rank that the tensors do not have": Bad(make=with_config(r=4), says="rank"),
    "rank of another type": Bad(make=with_config(r="8"), says="r "),
    "modules_to_save": Bad(make=with_config(modules_to_save=["lm_head"]), says="modules_to_save"),
    "bias": Bad(make=with_config(bias="all"), says="bias"),
    "PiSSA": Bad(make=with_config(init_lora_weights="pissa"), says="init_lora_weights"),
    "trained tokens": Bad(make=with_config(trainable_token_indices=[1]), says="trainable_token_indices"),
    "DoRA without magnitudes": Bad(make=with_config(use_dora=True), says="magnitude"),
    "NaN": Bad(make=change_tensors(put_nan), says="NaN"),
    "infinity": Bad(make=change_tensors(put_infinity), says="infinity"),
    "A without B": Bad(make=change_tensors(drop_b), says="lora_B"),
    "modules that the base does not have": Bad(make=change_tensors(rename_modules), says="no module"),
    "names without PEFT's prefix": Bad(make=change_tensors(drop_prefix), says="base_model.model."),
    "shapes of another base": Bad(make=change_tensors(narrow), says="shape"),
    "integers": Bad(make=change_tensors(put_integers), says="I32"),
    "an embedding": Bad(make=change_tensors(put_embedding), says="embedding"),
    "a header longer than the file": Bad(make=broken_header, says=WEIGHTS),
    "tensors that overlap": Bad(make=overlapping, says=WEIGHTS),
    "no tensors": Bad(
        make=lambda good: tar_gz({CONFIG: good.files()[CONFIG], WEIGHTS: struct.pack("<Q", 2) + b"{}"}),
        says="no tensors",
    ),
}


def on_disk(home: Path) -> dict[str, int]:
    """Size of each file below a home but the database's own, and 0 for each folder."""
    paths = [path for part in ("adapters", "blobs") for path in (home / part).rglob("*")]
    return {str(path): path.stat().st_size if path.is_file() else 0 for path in paths}


@pytest.fixture(scope="module")
def good(server: Server, shapes: Shapes) -> PeftFiles:
    """An adapter that gets in; it has been in once, so that all folders that stay are there already."""
    good = random_adapter(shapes, 5, targets=("q_proj", "v_proj"))
    files = {"file": ("adapter", good.tar_gz())}
    assert server.http.post("/v1/adapters", data={"name": "good", "base": MODEL}, files=files).status_code == 200
    assert server.http.delete("/v1/adapters/good").status_code == 200
    return good


@pytest.mark.parametrize("kind", BAD)
def test_it_is_refused_and_leaves_nothing(server: Server, good: PeftFiles, kind: str) -> None:
    bad, before = BAD[kind], on_disk(server.home)
    files = {"file": ("adapter.tar.gz", bad.make(good))}
    answer = server.http.post("/v1/adapters", data={"name": "bad", "base": MODEL}, files=files)
    error = error_of(answer, bad.status)
    assert bad.says.lower() in error["message"].lower()
    assert error["param"] in ("file", "base")
    assert error["message"].endswith(".")
    assert on_disk(server.home) == before
    assert server.http.get("/v1/adapters/bad").status_code == 404


@pytest.mark.parametrize("kind", ["NaN", "climbing path", "shapes of another base"])
def test_a_refused_replacement_leaves_the_live_version(server: Server, good: PeftFiles, kind: str) -> None:
    files = {"file": ("adapter", good.tar_gz())}
    assert server.http.post("/v1/adapters", data={"name": "live", "base": MODEL}, files=files).status_code == 200
    try:
        card, before = server.http.get("/v1/adapters/live").json(), on_disk(server.home)
        refused = server.http.put("/v1/adapters/live", files={"file": ("adapter", BAD[kind].make(good))})
        error_of(refused, BAD[kind].status)
        assert server.http.get("/v1/adapters/live").json() == card
        assert on_disk(server.home) == before
        assert server.http.post("/v1/chat/completions", json=chat(model="live", max_tokens=1)).status_code == 200
    finally:
        server.http.delete("/v1/adapters/live")


@pytest.mark.parametrize(
    ("fields", "files", "param"),
    [
        ({"base": MODEL}, {"file": ("a", b"x")}, "name"),
        ({"name": "bad", "base": MODEL}, {"adapter": ("a", b"x")}, "adapter"),
        ({"name": "bad", "base": MODEL, "version": "1"}, {"file": ("a", b"x")}, "version"),
        ({"name": "bad", "base": MODEL}, {"file": (WEIGHTS, b"x")}, "file"),
    ],
)
def test_a_wrong_form_is_refused(
    server: Server, fields: dict[str, str], files: dict[str, tuple[str, bytes]], param: str
) -> None:
    assert error_of(server.http.post("/v1/adapters", data=fields, files=files), 400)["param"] == param
