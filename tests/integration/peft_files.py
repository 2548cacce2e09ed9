"""Adapters as PEFT saves them, made for the tests: random ones, and ones that force every output token."""

import io
import json
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save
from tuneloop.adapters.base import ModuleShape

Array = npt.NDArray[Any]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Far over the spread of the model's own logits (60 or so), given that hidden states lie along the direction.
FORCE = 60.0


@dataclass(frozen=True, kw_only=True)
class PeftFiles:
    """The two files of an adapter; each method gives another of the forms in which they travel."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Array] = field(repr=False)

    def files(self) -> dict[str, bytes]:
        return {CONFIG: json.dumps(dict(self.config)).encode(), WEIGHTS: save(dict(self.tensors))}

    def folder(self, path: Path) -> Path:
        path.mkdir(parents=True)
        for name, content in self.files().items():
            (path / name).write_bytes(content)
        return path

    def tar_gz(self) -> bytes:
        return tar_gz(self.files())

    def zip(self) -> bytes:
        return zipped(self.files())


def tar_gz(files: Mapping[str, bytes], *members: tarfile.TarInfo) -> bytes:
    """A tar.gz of the files, and of further members without content (links, devices)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for member in members:
            archive.addfile(member)
    return buffer.getvalue()


def zipped(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def linear_shapes(checkpoint: Path) -> dict[str, ModuleShape]:
    """The linear modules of a checkpoint by name; a tied lm_head, which no file holds, has the embedding's shape."""
    shapes: dict[str, ModuleShape] = {}
    with safe_open(checkpoint / "model.safetensors", framework="numpy") as weights:
        for key in weights.keys():  # noqa: SIM118 - the handle is no mapping
            size = weights.get_slice(key).get_shape()
            if len(size) == 2:
                name = "lm_head" if key == "model.embed_tokens.weight" else key.removesuffix(".weight")
                shapes[name] = ModuleShape(in_features=size[1], out_features=size[0])
    return shapes


def peft_config(rank: int, targets: Sequence[str], **changes: Any) -> dict[str, Any]:
    """`adapter_config.json` with a scale of 1."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "smollm2-135m",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in targets}),
        "bias": "none",
        **changes,
    }


def random_adapter(
    shapes: Mapping[str, ModuleShape],
    seed: int = 0,
    *,
    rank: int = 8,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    size: float = 0.05,
    **config: Any,
) -> PeftFiles:
    """Random updates of all modules with one of the last names `targets`: the same seed gives the same files."""
    generator = np.random.default_rng(seed)
    tensors: dict[str, Array] = {}
    chosen = [name for name in sorted(shapes) if name.rsplit(".", 1)[-1] in targets]
    for name in chosen:
        shape = shapes[name]
        for part, dims in (("A", (rank, shape.in_features)), ("B", (shape.out_features, rank))):
            tensors[f"{PREFIX}{name}.lora_{part}.weight"] = size * generator.standard_normal(dims, dtype=np.float32)
    return PeftFiles(config=peft_config(rank, chosen, **config), tensors=tensors)


def forcing_adapter(direction: Array, vocab_size: int, token_id: int, *, rank: int = 1) -> PeftFiles:
    """An update of lm_head alone that makes `token_id` every output token.

    All of A's rows are `direction`, on which every final hidden state has a large positive component; B writes it to
    the logit of one token.
    """
    b = np.zeros((vocab_size, rank), np.float32)
    b[token_id] = FORCE / rank
    a = np.tile(direction.astype(np.float32), (rank, 1))
    tensors = {f"{PREFIX}lm_head.lora_A.weight": a, f"{PREFIX}lm_head.lora_B.weight": b}
    return PeftFiles(config=peft_config(rank, ["lm_head"]), tensors=tensors)
