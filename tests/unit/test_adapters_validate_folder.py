"""Validation of PEFT folders: what is accepted, what each refusal says, what the digest covers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tuneloop.adapters.base import AdapterFacts, AdapterLimits, ModuleShape
from tuneloop.adapters.peft_config import parse_settings
from tuneloop.adapters.validate import check_against_base, inspect_folder
from tuneloop.storage.errors import InvalidInput, TooLarge, TuneloopError

LIMITS = AdapterLimits(max_rank=16, max_bytes=1024**2)
IN, OUT = 6, 4
MODULES = tuple(f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj"))
BASE = {module: ModuleShape(in_features=IN, out_features=OUT) for module in MODULES}
PREFIX = "base_model.model."

Tensors = dict[str, NDArray[Any]]


def tensors_of(
    modules: tuple[str, ...] = MODULES, *, rank: int = 2, dtype: Any = np.float32, dora: bool = False
) -> Tensors:
    tensors: Tensors = {}
    for module in modules:
        tensors[f"{PREFIX}{module}.lora_A.weight"] = np.full((rank, IN), 0.5, dtype)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = np.full((OUT, rank), -2, dtype)
        if dora:
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = np.ones(OUT, dtype)
    return tensors


def write(folder: Path, tensors: Tensors | None = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/base", **config}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    save_file(tensors_of() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


def inspect(folder: Path) -> AdapterFacts:
    facts = inspect_folder(folder, LIMITS)
    check_against_base(folder, facts, BASE, "base")
    return facts


def refused(folder: Path, message: str, code: str | None = None, param: str = "file") -> str:
    with pytest.raises(InvalidInput, match=message) as caught:
        inspect(folder)
    assert caught.value.param == param
    assert code is None or caught.value.code == code
    assert caught.value.message.endswith(".")
    return caught.value.message


def test_the_facts_of_a_plain_adapter(tmp_path: Path) -> None:
    folder = write(tmp_path, use_rslora=True)
    facts = inspect(folder)
    assert facts.digest.startswith("sha256:")
    assert len(facts.digest) == 71
    assert (facts.peft_type, facts.base_model_name, facts.rank, facts.alpha) == ("LORA", "org/base", 2, 4.0)
    assert facts.targets == tuple(sorted(MODULES))
    assert (facts.use_dora, facts.use_rslora) == (False, True)
    assert facts.size_bytes == sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_float_dtypes_and_dora(tmp_path: Path, dtype: Any) -> None:
    assert inspect(write(tmp_path, tensors_of(dtype=dtype, dora=True), use_dora=True)).use_dora


class TestDigest:
    def test_covers_what_is_computed_and_nothing_else(self, tmp_path: Path) -> None:
        plain = inspect(write(tmp_path / "a")).digest
        assert inspect(write(tmp_path / "b", lora_alpha=4.0, base_model_name_or_path="x", revision="y")).digest == plain
        others = [
            write(tmp_path / "c", lora_alpha=5),
            write(tmp_path / "d", use_rslora=True),
            write(tmp_path / "e", alpha_pattern={"q_proj": 8, "layers.0.self_attn.q_proj": 9}),
            write(tmp_path / "f", alpha_pattern={"layers.0.self_attn.q_proj": 9, "q_proj": 8}),
            write(tmp_path / "g", {name: tensor + 1 for name, tensor in tensors_of().items()}),
        ]
        assert len({plain, *(inspect(folder).digest for folder in others)}) == len(others) + 1


class TestRanks:
    def test_rank_patterns_follow_peft(self, tmp_path: Path) -> None:
        """The first pattern that matches the end of the name, at a dot, wins."""
        q0, v0, q1, v1 = MODULES
        tensors = tensors_of((v0, v1)) | tensors_of((q0,), rank=8) | tensors_of((q1,), rank=3)
        facts = inspect(write(tmp_path, tensors, rank_pattern={"layers.0.self_attn.q_proj": 8, "q_proj": 3, "proj": 9}))
        assert facts.rank == 9

    def test_ranks_that_differ_from_the_configuration(self, tmp_path: Path) -> None:
        refused(write(tmp_path, tensors_of(rank=3)), "has rank 3 .* gives it 2", "rank_mismatch")

    @pytest.mark.parametrize("config", [{"r": 17}, {"rank_pattern": {"q_proj": 17}}])
    def test_oversized_ranks(self, tmp_path: Path, config: dict[str, Any]) -> None:
        with pytest.raises(TooLarge, match="limit of 16") as caught:
            inspect(write(tmp_path, **config))
        assert caught.value.code == "rank_too_large"


class TestConfiguration:
    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"peft_type": "IA3"}, "peft_type .* 'IA3'"),
            ({"peft_type": None}, "peft_type .* missing"),
            ({"r": 0}, "r in .* is 0"),
            ({"r": None}, "r in .* missing"),
            ({"r": "8"}, "r in .* '8'"),
            ({"r": True}, "r in .* True"),
            ({"lora_alpha": None}, "lora_alpha .* missing"),
            ({"lora_alpha": "big"}, "lora_alpha .* 'big'"),
            ({"lora_alpha": 1e300}, "lora_alpha"),
            ({"rank_pattern": [1]}, "rank_pattern .* mapping"),
            ({"rank_pattern": {"q_proj": 1.5}}, r"rank_pattern\['q_proj'\]"),
            ({"alpha_pattern": {"q_proj": None}}, r"alpha_pattern\['q_proj'\]"),
            ({"use_dora": "yes"}, "use_dora"),
            ({"use_rslora": 1}, "use_rslora"),
            ({"base_model_name_or_path": 5}, "base_model_name_or_path"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save .* merge"),
            ({"trainable_token_indices": [1]}, "trainable_token_indices .* merge"),
            ({"lora_bias": True}, "lora_bias"),
            ({"bias": "all"}, "bias .* 'all'"),
            ({"layer_replication": [[0, 2]]}, "layer_replication"),
            ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
            ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
            ({"megatron_config": {"a": 1}}, "Megatron"),
            ({"use_qalora": True}, "QALoRA"),
            ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
            ({"kasa_config": {}}, "KaSA"),
            ({"velora_config": {"num_groups": 4}}, "VeLoRA"),
            ({"monteclora_config": {}}, "MonteCLoRA"),
            ({"arrow_config": {"top_k": 2}}, "Arrow"),
            ({"enable_lora": [True, False]}, "enable_lora"),
            ({"use_next_years_lora": True}, "use_next_years_lora.* does not know"),
            ({"task_type": "SEQ_CLS"}, "task_type .* 'SEQ_CLS'"),
            ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
            ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
            ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
            ({"init_lora_weights": "lora_ga"}, "path_initial_model_for_weight_conversion"),
            ({"init_lora_weights": "loftq"}, "LoftQ"),
            ({"init_lora_weights": ["?"]}, "init_lora_weights"),
        ],
    )
    def test_refusals_name_the_key(self, tmp_path: Path, config: dict[str, Any], message: str) -> None:
        refused(write(tmp_path, **config), message)

    @pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
    def test_inits_that_leave_the_base_alone(self, tmp_path: Path, init: Any) -> None:
        inspect(write(tmp_path, init_lora_weights=init))

    def test_options_that_are_off(self, tmp_path: Path) -> None:
        inspect(write(tmp_path, modules_to_save=None, use_bdlora=None, use_next_years_lora=False, next_config={}))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"\x80\x04\x95", "not valid JSON"),
            (b"{", "not valid JSON"),
            (b"[]", "not a JSON object"),
            (b'{"r": NaN}', "not valid JSON"),
            (b"[" * 100_000, "not valid JSON"),
            (b'{"r": ' + b"9" * 5000 + b"}", "not valid JSON"),
            (b'{"r": 8, "r": 9}', "'r' .* twice"),
        ],
    )
    def test_files_that_are_no_configuration(self, tmp_path: Path, content: bytes, message: str) -> None:
        (write(tmp_path) / "adapter_config.json").write_bytes(content)
        refused(tmp_path, message)

    def test_a_huge_file(self, tmp_path: Path) -> None:
        (write(tmp_path) / "adapter_config.json").write_bytes(b" " * (4 * 1024**2 + 1))
        with pytest.raises(TooLarge, match="adapter_config"):
            inspect_folder(tmp_path, AdapterLimits())


class TestFiles:
    @pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
    def test_missing(self, tmp_path: Path, name: str) -> None:
        (write(tmp_path) / name).unlink()
        refused(tmp_path, f"no {name}", "missing_file")

    def test_a_pickle_instead_of_safetensors(self, tmp_path: Path) -> None:
        (write(tmp_path) / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
        refused(tmp_path, "'adapter_model.bin' is a pickle.* safe_serialization", "pickle_refused")

    def test_a_link(self, tmp_path: Path) -> None:
        folder = write(tmp_path / "adapter")
        (folder / "adapter_model.safetensors").rename(tmp_path / "elsewhere")
        (folder / "adapter_model.safetensors").symlink_to(tmp_path / "elsewhere")
        refused(folder, "not a plain file")

    def test_too_large(self, tmp_path: Path) -> None:
        with pytest.raises(TooLarge, match="100 bytes"):
            inspect_folder(write(tmp_path), AdapterLimits(max_bytes=100))

    def test_cut_off(self, tmp_path: Path) -> None:
        weights = write(tmp_path) / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        refused(tmp_path, "need .* bytes", "broken_safetensors")


class TestTensors:
    @pytest.mark.parametrize(
        ("name", "shape", "message"),
        [
            ("model.embed_tokens.lora_embedding_A", (2, 9), "update of an embedding"),
            ("lm_head.base_layer.weight", (9, 6), "save_embedding_layers=False"),
            ("lm_head.weight", (9, 6), "whole module"),
            ("model.embed_tokens.token_adapter.trainable_tokens_delta", (1, 6), "embedding rows"),
            ("model.layers.0.self_attn.q_proj.lora_B.bias", (4,), "a bias"),
            ("model.layers.0.self_attn.q_proj.lora_A.default.weight", (2, 6), "adapter's own name"),
            ("model.layers.0.self_attn.q_proj.lora_diag", (2,), "variants of LoRA"),
            ("something", (2,), "not part of a LoRA adapter"),
        ],
    )
    def test_other_tensors_are_named(self, tmp_path: Path, name: str, shape: tuple[int, ...], message: str) -> None:
        tensors = tensors_of() | {PREFIX + name: np.ones(shape, np.float32)}
        assert name in refused(write(tmp_path, tensors), message)

    def test_foreign_names(self, tmp_path: Path) -> None:
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors_of().items()}
        refused(write(tmp_path, tensors), "does not begin with 'base_model.model.'")

    def test_no_tensors(self, tmp_path: Path) -> None:
        refused(write(tmp_path, {}), "no tensors")

    @pytest.mark.parametrize(("part", "other"), [("lora_A", "lora_B"), ("lora_B", "lora_A")])
    def test_missing_partner(self, tmp_path: Path, part: str, other: str) -> None:
        tensors = tensors_of()
        del tensors[f"{PREFIX}{MODULES[1]}.{part}.weight"]
        refused(write(tmp_path, tensors), f"has {other} but no {part} for module '{MODULES[1]}'")

    def test_integers(self, tmp_path: Path) -> None:
        refused(write(tmp_path, tensors_of(dtype=np.int8)), "as I8; convert")

    @pytest.mark.parametrize("shape", [(0, IN), (2,), (2, IN, 1)])
    def test_shapes_of_no_linear_module(self, tmp_path: Path, shape: tuple[int, ...]) -> None:
        tensors = tensors_of() | {f"{PREFIX}{MODULES[0]}.lora_A.weight": np.ones(shape, np.float32)}
        refused(write(tmp_path, tensors), "two sizes above 0.* ZeRO-3")

    def test_ranks_of_a_pair(self, tmp_path: Path) -> None:
        tensors = tensors_of() | {f"{PREFIX}{MODULES[0]}.lora_B.weight": np.ones((OUT, 3), np.float32)}
        refused(write(tmp_path, tensors), "rank 2 but lora_B of rank 3")

    def test_magnitudes(self, tmp_path: Path) -> None:
        refused(write(tmp_path, use_dora=True), "no lora_magnitude_vector")
        refused(write(tmp_path, tensors_of(dora=True)), "use_dora is false")
        wrong = tensors_of(dora=True) | {f"{PREFIX}{MODULES[0]}.lora_magnitude_vector": np.ones(OUT + 1, np.float32)}
        refused(write(tmp_path, wrong, use_dora=True), r"shape \[5\], but the module has 4 outputs")

    @pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_values_that_are_not_finite(self, tmp_path: Path, dtype: Any, value: float) -> None:
        tensors = tensors_of(dtype=dtype)
        name = f"{PREFIX}{MODULES[2]}.lora_B.weight"
        tensors[name][-1, -1] = value
        assert name in refused(write(tmp_path, tensors), "NaN or infinity", "not_finite")

    @pytest.mark.parametrize(("bits", "fine"), [(0x7F80, False), (0xFFC1, False), (0x7F7F, True), (0x0001, True)])
    def test_bfloat16(self, tmp_path: Path, bits: int, fine: bool) -> None:
        """numpy has no bfloat16: the header of a float16 file is rewritten."""
        tensors = {
            name: np.full(tensor.shape, bits, np.uint16).view(np.float16) for name, tensor in tensors_of().items()
        }
        weights = write(tmp_path, tensors) / "adapter_model.safetensors"
        content = weights.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = content[8 : 8 + length].replace(b'"F16"', b'"BF16"')
        weights.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
        if fine:
            inspect(tmp_path)
        else:
            refused(tmp_path, "NaN or infinity")

    def test_the_last_value_of_a_large_file(self, tmp_path: Path) -> None:
        """The data is read in pieces; dtypes are mixed, so a piece may begin anywhere."""
        rows = 200_000
        tensors: Tensors = {
            f"{PREFIX}big.lora_A.weight": np.ones((1, rows), np.float32),
            f"{PREFIX}big.lora_B.weight": np.ones((rows, 1), np.float16),
            f"{PREFIX}big.lora_magnitude_vector": np.ones(rows, np.float64),
        }
        limits = AdapterLimits()
        assert inspect_folder(write(tmp_path, tensors, r=1, use_dora=True), limits).targets == ("big",)
        for name, tensor in tensors.items():
            tensor.flat[-1] = np.nan
            with pytest.raises(InvalidInput, match=name):
                inspect_folder(write(tmp_path, tensors, r=1, use_dora=True), limits)
            tensor.flat[-1] = 1


class TestBase:
    def test_names_that_match_no_module(self, tmp_path: Path) -> None:
        tensors = tensors_of() | tensors_of(tuple(f"model.layers.{n}.mlp.up_proj" for n in range(5)))
        message = refused(write(tmp_path, tensors), "no module", "wrong_base", "base")
        assert "'model.layers.0.mlp.up_proj', 'model.layers.1.mlp.up_proj'" in message
        assert "and 2 more" in message
        assert "model.layers.{0-1}.self_attn.q_proj" in message
        assert "'org/base'" in message

    def test_shapes_of_another_model(self, tmp_path: Path) -> None:
        tensors = tensors_of()
        tensors[f"{PREFIX}{MODULES[0]}.lora_A.weight"] = np.ones((2, 7), np.float32)
        message = refused(write(tmp_path, tensors), "differ in shape", "wrong_base", "base")
        assert f"'{MODULES[0]}': adapter 7 to 4, base 6 to 4" in message

    def test_a_base_without_modules(self, tmp_path: Path) -> None:
        folder = write(tmp_path)
        with pytest.raises(InvalidInput, match="no module that an adapter may target"):
            check_against_base(folder, inspect_folder(folder, LIMITS), {}, "base")


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(max_size=8), scalars, max_size=3)
keys = st.sampled_from(
    [
        "peft_type",
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_dora",
        "bias",
        "task_type",
        "init_lora_weights",
    ]
)


@given(st.dictionaries(keys | st.text(max_size=8), values, max_size=6))
def test_random_configurations(config: dict[str, Any]) -> None:
    for start in ({}, {"peft_type": "LORA", "r": 2, "lora_alpha": 4}):
        try:
            settings = parse_settings(json.dumps(start | config).encode(), LIMITS)
        except TuneloopError as error:
            assert len(error.message) < 1000
        else:
            assert 1 <= settings.largest_rank <= LIMITS.max_rank


@given(st.binary(max_size=100))
def test_random_bytes_as_configuration(content: bytes) -> None:
    with pytest.raises(TuneloopError):
        parse_settings(content, LIMITS)
