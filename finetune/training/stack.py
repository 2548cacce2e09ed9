"""Two LoRA adapters as one: what a run has learned on top of an older adapter, joined so that one can be served.

W + s1 B1 A1 + s2 B2 A2 is one update of rank r1 + r2 with A = [A1; A2] and B = [s1 B1, s2 B2]: exact, no approximation.
"""

import json
from pathlib import Path
from typing import Any

from ...adapters.base import AdapterLimits
from ...adapters.files import CONFIG_NAME, WEIGHTS_NAME
from ...adapters.peft_config import read_settings
from ...storage.errors import InvalidInput

_PREFIX = "base_model.model."
_LIMITS = AdapterLimits(max_rank=1 << 20)


def check_stackable(adapter: Path, *, use_dora: bool) -> None:
    """Raises InvalidInput if an adapter of this kind cannot be joined with another one."""
    if use_dora or read_settings(adapter, _LIMITS).use_dora:
        raise InvalidInput(
            "create_new_adapter joins two adapters, and DoRA's magnitudes cannot be joined. Go on training the old "
            "adapter (create_new_adapter: false), or train without use_dora.",
            param="create_new_adapter",
        )


def stack(old: Path, new: Path) -> None:
    """Replace the adapter in folder `new` by the sum of both."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors: dict[str, dict[str, Any]] = {}
    for folder in (old, new):
        settings = read_settings(folder, _LIMITS)
        for module, (a, b) in _pairs(load_file(folder / WEIGHTS_NAME)).items():
            scaled = b.float() * settings.scaling_of(module)
            held = tensors.setdefault(module, {"A": [], "B": []})
            held["A"].append(a.float())
            held["B"].append(scaled)
    joined = {name: (torch.cat(held["A"], 0), torch.cat(held["B"], 1)) for name, held in tensors.items()}
    ranks = {name: int(a.shape[0]) for name, (a, _) in joined.items()}
    largest = max(ranks.values())
    different = {name: rank for name, rank in ranks.items() if rank != largest}
    config = json.loads((new / CONFIG_NAME).read_text("utf-8"))
    config |= {
        "r": largest,
        "lora_alpha": largest,
        "use_rslora": False,
        "rank_pattern": different,
        "alpha_pattern": different,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in joined}),
    }
    weights: dict[str, Any] = {}
    for name, (a, b) in joined.items():
        weights[f"{_PREFIX}{name}.lora_A.weight"] = a.contiguous()
        weights[f"{_PREFIX}{name}.lora_B.weight"] = b.contiguous()
    save_file(weights, new / WEIGHTS_NAME, metadata={"format": "pt"})
    (new / CONFIG_NAME).write_text(json.dumps(config, indent=2), "utf-8")


def _pairs(tensors: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    modules = {name.removeprefix(_PREFIX).partition(".lora_")[0] for name in tensors}
    return {
        module: (tensors[f"{_PREFIX}{module}.lora_A.weight"], tensors[f"{_PREFIX}{module}.lora_B.weight"])
        for module in modules
    }
