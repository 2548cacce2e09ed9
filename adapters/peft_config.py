"""Reads PEFT's `adapter_config.json`: what decides the result of a LoRA adapter. It knows nothing of tensors."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..storage.errors import InvalidInput, TooLarge
from .base import AdapterLimits
from .files import CONFIG_NAME, shown
from .patterns import PatternTable
from .unsupported import invalid, refuse_unsupported, value_shown

MAX_CONFIG_BYTES = 4 * 1024**2  # PEFT's EVA writes a rank for every module
_MAX_ALPHA = 1e9
_SAVE_AGAIN = "save the adapter again with PEFT"


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """What serving needs of a PEFT configuration: the update of a module is `scaling_of(module) * B @ A`."""

    rank: int
    alpha: float
    rank_pattern: PatternTable[int]
    alpha_pattern: PatternTable[float]
    use_dora: bool
    use_rslora: bool
    base_model_name: str | None

    @property
    def largest_rank(self) -> int:
        return max([self.rank, *self.rank_pattern.patterns.values()])

    def rank_of(self, module: str) -> int:
        """The rank of a module, named as in the base model (`model.layers.0.self_attn.q_proj`)."""
        return self.rank_pattern.of(module) or self.rank

    def scaling_of(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA (https://arxiv.org/abs/2312.03732)."""
        alpha, rank = self.alpha_pattern.of(module), self.rank_of(module)
        return (self.alpha if alpha is None else alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def canonical(self) -> bytes:
        """JSON that is the same for the same computation. Patterns keep their order, which decides who wins."""
        content = {
            "alpha_pattern": list(self.alpha_pattern.patterns.items()),
            "lora_alpha": self.alpha,
            "peft_type": "LORA",
            "r": self.rank,
            "rank_pattern": list(self.rank_pattern.patterns.items()),
            "use_dora": self.use_dora,
            "use_rslora": self.use_rslora,
        }
        return json.dumps(content, separators=(",", ":")).encode()


def read_settings(folder: Path, limits: AdapterLimits) -> LoraSettings:
    """Read a PEFT folder's configuration.

    Raises InvalidInput with the key at fault and the way out, TooLarge for a rank over the limit.
    """
    with (folder / CONFIG_NAME).open("rb") as file:
        return parse_settings(file.read(MAX_CONFIG_BYTES + 1), limits)


def parse_settings(content: bytes, limits: AdapterLimits) -> LoraSettings:
    """Like `read_settings`, from the bytes of the file."""
    config = _parse_json(content)
    refuse_unsupported(config)
    return LoraSettings(
        rank=_rank("r", config.get("r"), limits),
        alpha=_alpha("lora_alpha", config.get("lora_alpha")),
        rank_pattern=PatternTable(
            "rank_pattern",
            {key: _rank(f"rank_pattern[{shown(key)}]", v, limits) for key, v in _patterns(config, "rank")},
        ),
        alpha_pattern=PatternTable(
            "alpha_pattern", {key: _alpha(f"alpha_pattern[{shown(key)}]", v) for key, v in _patterns(config, "alpha")}
        ),
        use_dora=_flag(config, "use_dora"),
        use_rslora=_flag(config, "use_rslora"),
        base_model_name=_base_model_name(config),
    )


def _parse_json(content: bytes) -> dict[str, Any]:
    if len(content) > MAX_CONFIG_BYTES:
        raise TooLarge(
            f"{CONFIG_NAME} is larger than the {MAX_CONFIG_BYTES} bytes that this server reads.", param="file"
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            duplicate = next(key for key in keys if keys.count(key) > 1)
            raise invalid(shown(duplicate), "is given twice", _SAVE_AGAIN)
        return result

    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        config = json.loads(content.decode(), object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        detail = f" ({error})" if isinstance(error, json.JSONDecodeError) else ""
        raise InvalidInput(f"{CONFIG_NAME} is not valid JSON in UTF-8{detail}; {_SAVE_AGAIN}.", param="file") from error
    if not isinstance(config, dict):
        raise InvalidInput(f"{CONFIG_NAME} is not a JSON object; {_SAVE_AGAIN}.", param="file")
    return config


def _patterns(config: Mapping[str, Any], kind: str) -> list[tuple[str, Any]]:
    value = config.get(f"{kind}_pattern")
    if value is None:
        return []
    if not isinstance(value, dict):
        raise invalid(f"{kind}_pattern", "is not a mapping of module names to numbers", _SAVE_AGAIN)
    return list(value.items())


def _rank(key: str, value: Any, limits: AdapterLimits) -> int:
    if type(value) is not int or value < 1:
        raise invalid(key, f"is {value_shown(value)}, not a whole number from 1", _SAVE_AGAIN)
    if value > limits.max_rank:
        raise TooLarge(
            f"{key} in {CONFIG_NAME} is {value_shown(value)}, over this server's limit of {limits.max_rank}; "
            "train with a lower rank, or reduce it with `peft.save_as_lora`.",
            param="file",
            code="rank_too_large",
        )
    return value


def _alpha(key: str, value: Any) -> float:
    if type(value) not in (int, float) or not -_MAX_ALPHA <= value <= _MAX_ALPHA:
        raise invalid(key, f"is {value_shown(value)}, not a number of at most {_MAX_ALPHA:.0e}", _SAVE_AGAIN)
    return float(value)


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise invalid(key, f"is {value_shown(value)}, neither true nor false", _SAVE_AGAIN)
    return value


def _base_model_name(config: Mapping[str, Any]) -> str | None:
    key = "base_model_name_or_path"
    name = config.get(key)
    if name is not None and not isinstance(name, str):
        raise invalid(key, f"is {value_shown(name)}, not a name", _SAVE_AGAIN)
    return name
