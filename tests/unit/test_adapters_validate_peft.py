"""What PEFT itself saves is accepted, or refused for the stated reason; patterns mean what they mean to PEFT."""

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tuneloop.adapters.base import AdapterLimits, ModuleShape
from tuneloop.adapters.patterns import PatternTable
from tuneloop.adapters.peft_config import read_settings
from tuneloop.adapters.validate import check_against_base, inspect_folder
from tuneloop.storage.errors import InvalidInput, TooLarge

LIMITS = AdapterLimits()
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def quiet() -> Iterator[None]:
    """PEFT warns about what some of these adapters are meant to be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def tiny_llama() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def linear_modules(model: Any) -> dict[str, ModuleShape]:
    import torch

    return {
        name: ModuleShape(in_features=module.in_features, out_features=module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def save(folder: Path, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(
        tiny_llama(), LoraConfig(task_type="CAUSAL_LM", **{"target_modules": TARGETS} | options)
    )
    model.save_pretrained(str(folder))
    return model


@pytest.mark.usefixtures("quiet")
class TestSavedByPeft:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"use_rslora": True, "lora_alpha": 11},
            {"use_dora": True},
            {"target_modules": "all-linear"},
            {"rank_pattern": {"layers.0.self_attn.q_proj": 4, r"layers\.\d+\.mlp.*": 3, "v_proj": 5}},
            {"rank_pattern": {"^model.layers.1.self_attn.(q|v)_proj": 6}, "alpha_pattern": {"q_proj": 3}},
            {"use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 7.5}},
            {"layers_to_transform": [1]},
            {"exclude_modules": ["v_proj"]},
            {"init_lora_weights": "gaussian"},
            {"init_lora_weights": "orthogonal"},
            {"init_lora_weights": "mica"},
            {"init_lora_weights": False},
        ],
    )
    def test_accepted(self, tmp_path: Path, options: dict[str, Any]) -> None:
        model = save(tmp_path, r=8, **options)
        facts = inspect_folder(tmp_path, LIMITS)
        check_against_base(tmp_path, facts, linear_modules(tiny_llama()), "tiny")
        settings = read_settings(tmp_path, LIMITS)
        layers = {
            name.removeprefix("base_model.model."): module
            for name, module in model.named_modules()
            if hasattr(module, "lora_magnitude_vector")
        }
        assert facts.targets == tuple(sorted(layers))
        assert facts.use_dora == bool(options.get("use_dora"))
        for name, layer in layers.items():
            assert settings.rank_of(name) == layer.r["default"]
            assert math.isclose(settings.scaling_of(name), layer.scaling["default"])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
            ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
            ({"bias": "lora_only"}, "bias"),
            ({"lora_bias": True}, "lora_bias"),
            ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
            ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
            ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
            ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.base_layer.weight.*save_embedding_layers=False"),
            ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
        ],
    )
    def test_refused(self, tmp_path: Path, options: dict[str, Any], message: str) -> None:
        save(tmp_path, r=4, **options)
        with pytest.raises(InvalidInput, match=message):
            inspect_folder(tmp_path, LIMITS)

    @pytest.mark.parametrize("variant", ["velora", "monteclora", "kasa", "bdlora"])
    def test_variants_are_refused(self, tmp_path: Path, variant: str) -> None:
        from peft.tuners.lora import config

        options = {
            "velora": lambda: {"velora_config": config.VeloraConfig(num_groups=4)},
            "monteclora": lambda: {"monteclora_config": config.MontecloraConfig()},
            "kasa": lambda: {"kasa_config": config.KasaConfig()},
            "bdlora": lambda: {"use_bdlora": config.BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)},
        }[variant]()
        save(tmp_path, r=4, **options, target_modules=["q_proj"])
        with pytest.raises(InvalidInput, match=next(iter(options))):
            inspect_folder(tmp_path, LIMITS)

    def test_a_converted_pissa_adapter_is_plain_lora(self, tmp_path: Path) -> None:
        from peft import LoraConfig, get_peft_model

        model: Any = get_peft_model(
            tiny_llama(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights="pissa")
        )
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(str(tmp_path / "start"))
        model.peft_config["default"].init_lora_weights = "pissa"
        model.save_pretrained(
            str(tmp_path / "converted"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
        )
        assert inspect_folder(tmp_path / "converted", LIMITS).rank == 8

    def test_save_embedding_layers_is_the_way_out_for_lm_head(self, tmp_path: Path) -> None:
        save(tmp_path, r=4, target_modules=["lm_head"]).save_pretrained(str(tmp_path), save_embedding_layers=False)
        facts = inspect_folder(tmp_path, LIMITS)
        check_against_base(tmp_path, facts, linear_modules(tiny_llama()), "tiny")
        assert facts.targets == ("lm_head",)

    def test_another_kind_of_adapter(self, tmp_path: Path) -> None:
        from peft import IA3Config, get_peft_model

        get_peft_model(tiny_llama(), IA3Config(task_type="CAUSAL_LM")).save_pretrained(str(tmp_path))
        with pytest.raises(InvalidInput, match="'IA3'"):
            inspect_folder(tmp_path, LIMITS)

    def test_a_wider_base(self, tmp_path: Path) -> None:
        save(tmp_path, r=4)
        wide = {
            name: ModuleShape(in_features=2 * shape.in_features, out_features=shape.out_features)
            for name, shape in linear_modules(tiny_llama()).items()
        }
        with pytest.raises(InvalidInput, match="differ in shape"):
            check_against_base(tmp_path, inspect_folder(tmp_path, LIMITS), wide, "wide")


NAMES = [f"model.layers.{n}.{m}" for n in (0, 1, 11) for m in ("self_attn.q_proj", "mlp.up_proj")] + ["lm_head"]
parts = st.sampled_from(
    ["model", "layers", "q_proj", "up_proj", "lm_head", ".", r"\.", "0", "1", r"\d", r"\d+", ".*", "^", "$", "[01]"]
) | st.sampled_from(["1{2}", "(q|up)_proj", "(?:0|1)", ".*?", "mlp", "self_attn", "a?", "|"])


@given(st.lists(st.lists(parts, min_size=1, max_size=6).map("".join), min_size=1, max_size=3, unique=True))
def test_patterns_match_as_in_peft(patterns: list[str]) -> None:
    from peft.utils.other import get_pattern_key

    values = {pattern: index for index, pattern in enumerate(patterns, 1)}
    try:
        found = PatternTable("rank_pattern", values).of_all(NAMES)
    except InvalidInput:
        return
    assert found == {name: values[key] for name in NAMES if (key := get_pattern_key(list(values), name)) in values}


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a+)+b",
        r"(.*)*q",
        r"(a|a)*b",
        r"(?:x*){9}",
        r"a**",
        r".*.*.*.*.*q",
        "(a|b)" * 40,
        "a?" * 60 + "a" * 60,
        r"(?=.*)q",
        r"(.)\1",
        r"(?i)q",
        r"(",
        r"a)|(b",
        r"[a-",
        r"[\](](a|b)c|d" * 30,
        "a" * 600,
    ],
)
def test_patterns_that_could_run_long_are_refused(pattern: str) -> None:
    with pytest.raises(InvalidInput, match=r"The pattern .* of rank_pattern") as caught:
        PatternTable("rank_pattern", {pattern: 1}).of("model.layers.0.self_attn.q_proj")
    assert caught.value.code == "pattern_refused"


@pytest.mark.parametrize("pattern", [".*.*!", ".*.*.*!", "[a.]+[a.]+[a.]+!", "a?.?.?.?.*!"])
@pytest.mark.parametrize("length", [30, 120, 1000])
def test_what_is_evaluated_ends_soon(pattern: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of the worst kind: each match ends or is refused, and the clock stops the sum of many."""
    monkeypatch.setattr("tuneloop.adapters.patterns._MAX_SECONDS", 0.05)
    table = PatternTable("rank_pattern", {f"{pattern}{n}": 1 for n in range(300)})
    try:
        assert table.of("a." * (length // 2)) is None
    except InvalidInput as error:
        assert error.code == "pattern_refused"


def test_too_many_patterns() -> None:
    with pytest.raises(TooLarge, match="20001 patterns"):
        PatternTable("rank_pattern", {str(n): 1 for n in range(20_001)})
    with pytest.raises(TooLarge, match="500 regular expressions"):
        PatternTable("rank_pattern", {f".*{n}": 1 for n in range(501)})
