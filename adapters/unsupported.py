"""What PEFT can train and this server cannot serve, key by key of `adapter_config.json`: the reason and the way out.

It knows the configuration of PEFT 0.21 and earlier. Keys that it doesn't know are accepted when they are off (null,
false, empty: PEFT's own convention for a new option) and refused by name when they are on.
"""

from collections.abc import Mapping
from typing import Any

from ..storage.errors import InvalidInput
from .files import CONFIG_NAME, shown

_MERGE = "merge it (`model.merge_and_unload()`) and serve the result as a base model"
_CONVERT = "turn it into plain LoRA with `peft.save_as_lora`"
_RETRAIN = "train it without this option"

_REFUSED: Mapping[str, tuple[str, str]] = {
    "modules_to_save": ("it replaces whole modules of the base model", _MERGE),
    "trainable_token_indices": ("it changes rows of the embedding table", _MERGE),
    "lora_bias": ("its lora_B layers have a bias", _MERGE),
    "layer_replication": ("it repeats layers, so it needs a base model of another shape", _MERGE),
    "target_parameters": ("it updates bare parameters, such as fused experts, not linear modules", _MERGE),
    "alora_invocation_tokens": ("it is active only after its invocation tokens (aLoRA)", _RETRAIN),
    "megatron_config": ("it was made for Megatron's parallel layers", "export it for plain linear layers"),
    "use_qalora": ("QALoRA pools the inputs of a GPTQ model in groups", _RETRAIN),
    "use_bdlora": ("its matrices are stored as diagonal blocks (BD-LoRA)", _CONVERT),
    "kasa_config": ("KaSA truncates the base model's weights", _MERGE),
    "velora_config": ("VeLoRA stores buffers of its training beside the matrices", _CONVERT),
    "monteclora_config": ("MonteCLoRA stores its sampler beside the matrices", _CONVERT),
    "arrow_config": ("Arrow routes between several adapters", "serve the adapters that it routes to one by one"),
    "enable_lora": ("it was saved for merged linear layers by an early PEFT", "save it again with a current PEFT"),
}

# Starting points of training that leave the base model alone, and those that replace its weights.
_PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
_CONVERTIBLE_INITS = ("pissa", "olora", "corda", "lora_ga")

_READ = frozenset(
    {
        "alpha_pattern",
        "base_model_name_or_path",
        "bias",
        "init_lora_weights",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "task_type",
        "use_dora",
        "use_rslora",
    }
)
# How the adapter was trained, which modules were meant, how it is to be loaded. The tensors' own names say which
# modules it has; `fan_in_fan_out` says how the base stores its weights, which matters to merging only.
_DESCRIPTIVE = frozenset(
    {
        "auto_mapping",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "merge_weights",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
    }
)


def refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Raise InvalidInput, naming the key, if the adapter is anything but low-rank updates of linear modules."""
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        raise invalid("peft_type", f"is {value_shown(peft_type)}; LORA (rsLoRA and DoRA among it) is served", _MERGE)
    for key, (reason, way_out) in _REFUSED.items():
        value = config.get(key)
        if value or value == {}:  # an empty sub-configuration turns its option on, with the defaults
            raise invalid(key, f"is set, and such an adapter is not served: {reason}", way_out)
    for key in sorted(config.keys() - _REFUSED.keys() - _READ - _DESCRIPTIVE):
        if config[key]:
            raise invalid(shown(key), "is an option that this server does not know, and it is on", _MERGE)
    bias = config.get("bias", "none")
    if bias != "none":
        raise invalid("bias", f"is {value_shown(bias)}: the adapter changes biases of the base model", _MERGE)
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise invalid(
            "task_type",
            f"is {value_shown(task)}, but the base models here are causal language models",
            "if it was trained on one, set it to CAUSAL_LM",
        )
    _refuse_init(config.get("init_lora_weights", True))


def _refuse_init(init: Any) -> None:
    key = "init_lora_weights"
    if isinstance(init, bool) or (isinstance(init, str) and init in _PLAIN_INITS):
        return
    if isinstance(init, str) and init.lower().startswith(_CONVERTIBLE_INITS):
        raise invalid(
            key,
            f"is {value_shown(init)}, which replaces the weights of the base model, so the adapter is wrong on the "
            "original one",
            "convert it to plain LoRA (`model.save_pretrained(..., path_initial_model_for_weight_conversion=...)`)",
        )
    if init == "loftq":
        raise invalid(key, "is 'loftq': the adapter belongs to a base model that LoftQ quantised", _MERGE)
    raise invalid(key, f"is {value_shown(init)}, a starting point that this server does not know", _MERGE)


def invalid(key: str, problem: str, way_out: str) -> InvalidInput:
    """The error for one key of the configuration."""
    return InvalidInput(f"{key} in {CONFIG_NAME} {problem}. The way out: {way_out}.", param="file")


def value_shown(value: Any) -> str:
    """A JSON value as a message may hold it."""
    return "missing" if value is None else shown(value) if isinstance(value, str) else shown(str(value))[1:-1]
