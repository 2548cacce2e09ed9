"""Random LoRA adapters in PEFT's format for the embedded model, small enough to make a thousand of."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

PREFIX = "base_model.model.model.layers"


def write_adapter(folder: Path, config: dict[str, int], *, seed: int, rank: int = 8, everything: bool = True) -> Path:
    """`config` is the model's config.json. `everything`: all linear layers in float32, else q and v in float16."""
    hidden, middle = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    shapes = {
        "self_attn.q_proj": (heads * dim, hidden),
        "self_attn.v_proj": (kv_heads * dim, hidden),
    }
    if everything:
        shapes |= {
            "self_attn.k_proj": (kv_heads * dim, hidden),
            "self_attn.o_proj": (hidden, heads * dim),
            "mlp.gate_proj": (middle, hidden),
            "mlp.up_proj": (middle, hidden),
            "mlp.down_proj": (hidden, middle),
        }
    random = np.random.default_rng(seed)
    dtype = np.float32 if everything else np.float16
    tensors: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.floating]]] = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (out, inner) in shapes.items():
            key = f"{PREFIX}.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = (random.standard_normal((rank, inner)) * 0.02).astype(dtype)
            tensors[f"{key}.lora_B.weight"] = (random.standard_normal((out, rank)) * 0.02).astype(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "smollm2-135m",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rsplit(".", 1)[1] for name in shapes}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
