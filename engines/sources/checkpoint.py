"""Says whether a folder is a checkpoint that can be served, from names and JSON alone: it reads no tensor.

Weights are safetensors only. Pickle weights (`pytorch_model.bin`) run code when they are read and are never accepted.
"""

import json
from pathlib import Path
from typing import Any

from ...storage.errors import InvalidInput

_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights: the index's shards, else all of them at the top of the folder.

    Raises InvalidInput if the index names a file that is not there.
    """
    index = folder / _INDEX
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(f"{index} is not a safetensors index: {error}.", param="source") from error
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise InvalidInput(
            f"{folder} is incomplete: its index names {', '.join(missing[:3])} among {len(missing)} missing file(s). "
            "Fetch the model again.",
            param="source",
        )
    return [folder / name for name in shards]


def check_checkpoint(folder: Path) -> None:
    """Raise InvalidInput, saying what is missing and what to do, unless the folder can be served."""
    names = {entry.name for entry in folder.iterdir()}
    if "config.json" not in names:
        raise InvalidInput(_without_config(folder, names), param="source")
    if not weight_files(folder):
        raise InvalidInput(f"{folder} has no safetensors weights. {missing_weights_advice(names)}", param="source")
    if not names.intersection(_TOKENIZERS):
        raise InvalidInput(
            f"{folder} has no tokenizer ({', '.join(_TOKENIZERS[:3])} ...). Save it beside the weights with "
            "tokenizer.save_pretrained(folder).",
            param="source",
        )


def is_complete(folder: Path) -> bool:
    """The same question as a predicate, for a folder that may not even exist."""
    try:
        check_checkpoint(folder)
    except (InvalidInput, OSError):
        return False
    return True


def describe_checkpoint(folder: Path) -> dict[str, Any]:
    """What a list of models shows without loading one: architecture, type, stored dtype, bytes of the weights."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {
        "architectures": config.get("architectures") or [],
        "model_type": config.get("model_type"),
        "dtype": config.get("dtype") or config.get("torch_dtype"),
        "weight_bytes": weight_bytes(folder),
    }


def weight_bytes(folder: Path) -> int:
    """Bytes of the weights on disk: the smallest memory that loading them can take on most devices."""
    return sum(file.stat().st_size for file in weight_files(folder))


def missing_weights_advice(names: set[str]) -> str:
    """What to do about a folder or repository with these files and no safetensors."""
    if any(name.endswith(_PICKLES) for name in names):
        return (
            "It has pickle weights, which can run code when they are read and are refused; convert them with "
            "model.save_pretrained(folder), which writes safetensors."
        )
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if ggufs:
        return f"It has GGUF files; name one of them instead: {', '.join(ggufs[:5])}."
    return "Save the model there with model.save_pretrained(folder)."


def _without_config(folder: Path, names: set[str]) -> str:
    if "adapter_config.json" in names:
        return (
            f"{folder} holds an adapter, not a base model. Serve its base model, and add the adapter with "
            "`tuneloop adapters add`."
        )
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if ggufs:
        return f"{folder} has no config.json. It has GGUF files; name one of them instead: {', '.join(ggufs[:5])}."
    return f"{folder} is not a model: it has no config.json. Point to the folder that save_pretrained() wrote."
