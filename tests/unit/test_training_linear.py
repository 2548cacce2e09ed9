"""Faster linear layers give the loss and gradients of PEFT's, and leave names and files as they were."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, LlamaConfig
from tuneloop.finetune.training import products
from tuneloop.finetune.training.attention import use_varlen
from tuneloop.finetune.training.linear import FastLinear, FastLoraLinear, install
from tuneloop.finetune.training.loss import supervised_loss
from tuneloop.finetune.training.products import is_fast, linear, product

from tests.support.tuning import SIZES, alone, assert_same, batch, gradients, tiny

fast = pytest.mark.skipif(not is_fast(torch.zeros(1)), reason="no oneDNN on this machine")


def adapted(seed: int = 0, *, model: Any = None, **values: Any) -> Any:
    config = LoraConfig(**({"r": 4, "lora_alpha": 12, "target_modules": "all-linear"} | values))
    tuned = get_peft_model(tiny(LlamaConfig(**SIZES, attention_bias=True)) if model is None else model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name and "magnitude" not in name:  # B begins as zero, and would hide A's gradient
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return tuned


def results(model: Any, seed: int = 3) -> tuple[float, Any]:
    torch.manual_seed(seed)
    found = supervised_loss(model, batch())
    torch.autograd.backward(found.loss)
    return found.loss.item(), gradients(model)


@fast
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 3}},
        {"use_dora": True},
        {"lora_dropout": 0.5},
        {"lora_bias": True, "target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["down_proj", "lm_head"]},
        {"bias": "all"},
    ],
    ids=str,
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_peft(values: dict[str, Any], checkpointing: bool) -> None:
    plain = adapted(**values).train()
    quick = copy.deepcopy(plain)
    assert use_varlen(plain)
    assert use_varlen(quick)
    install(quick)
    if checkpointing:
        quick.gradient_checkpointing_enable({"use_reentrant": False})
    (loss, expected), (got_loss, got) = results(plain), results(quick)
    assert got_loss == pytest.approx(loss, rel=1e-5)
    assert_same(got, expected)


@fast
def test_full_tuning() -> None:
    plain = tiny(LlamaConfig(**SIZES, mlp_bias=True))
    loss, expected = alone(plain, batch())
    assert use_varlen(plain)
    install(plain)
    assert type(plain.lm_head) is FastLinear
    got_loss, got = results(plain)
    assert got_loss == pytest.approx(loss, rel=1e-5)
    assert_same(got, expected)


@fast
def test_names_and_files_stay_as_they_are(tmp_path: Path) -> None:
    plain = adapted()
    quick = copy.deepcopy(plain)
    install(quick)
    assert type(quick.get_base_model().model.layers[0].mlp.up_proj) is FastLoraLinear
    assert list(quick.state_dict()) == list(plain.state_dict())
    for model, name in ((plain, "plain"), (quick, "quick")):
        model.save_pretrained(tmp_path / name)
    weights, configs = (
        [(tmp_path / name / file).read_bytes() for name in ("plain", "quick")]
        for file in ("adapter_model.safetensors", "adapter_config.json")
    )
    assert weights[0] == weights[1]
    first, second = (json.loads(c) | {"target_modules": None} for c in configs)  # a set, saved in any order
    assert first == second
    ids = batch().ids
    again = PeftModel.from_pretrained(tiny(LlamaConfig(**SIZES, attention_bias=True)), tmp_path / "quick")
    expected = plain.eval()(ids).logits
    torch.testing.assert_close(again(ids).logits, expected)
    torch.testing.assert_close(quick.eval()(ids).logits, expected, atol=1e-5, rtol=1e-4)
    with quick.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(quick(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(quick.merge_and_unload()(ids).logits, expected, atol=1e-5, rtol=1e-4)


def test_what_is_not_linear_by_torch_is_left_alone() -> None:
    model = tiny(GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=4, n_positions=64))  # Conv1D
    tuned = adapted(model=model, target_modules=["c_attn"], fan_in_fan_out=True)
    kinds = {type(m) for m in tuned.modules()}
    install(tuned)
    assert FastLoraLinear not in {type(m) for m in tuned.modules()}
    assert kinds - {torch.nn.Linear} <= {type(m) for m in tuned.modules()}


def test_other_types_and_machines_get_torchs_own_product(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    assert not is_fast(x.double(), weight.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_fast(x, weight)
    assert product(x[:0], weight).shape == (0, 5)
    monkeypatch.setattr(products, "_onednn", lambda: None)
    assert not is_fast(x, weight)
    assert torch.equal(product(x, weight), x @ weight.t())


def test_derivatives_of_a_product() -> None:
    shapes = ((2, 3, 4), (5, 4), (5,))
    x, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    assert torch.autograd.gradcheck(linear, (x, weight, bias))
