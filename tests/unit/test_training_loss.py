"""The supervised loss equals cross entropy of the model's own logits, whatever its head, a few rows at a time."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig, PreTrainedConfig
from tuneloop.finetune.training import loss as loss_module
from tuneloop.finetune.training.attention import use_varlen
from tuneloop.finetune.training.loss import head_loss, hidden_rows, supervised_loss

from tests.support.tuning import SIZES, alone, assert_same, batch, gradients, tiny


@pytest.fixture(params=[64 * 1024 * 1024, 97 * 4 * 7], ids=["at once", "7 rows at a time"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "LOGITS_BYTES", request.param)


CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "cohere": CohereConfig(**SIZES, logit_scale=0.25),
    "granite": GraniteConfig(**SIZES, logits_scaling=4.0),
    "gemma2": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0),
}


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("name", CONFIGS)
def test_all_weights_trained(name: str) -> None:
    model = tiny(CONFIGS[name]).eval()
    data = batch()
    loss, expected = alone(model, data)
    use_varlen(model)
    result = supervised_loss(model, data)
    torch.autograd.backward(result.loss * 3)
    assert loss_module._proven[model] is True
    assert result.loss.item() == pytest.approx(loss, rel=1e-5)
    assert_same({n: g / 3 for n, g in gradients(model).items()}, expected)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("extra", [{}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}])
def test_a_frozen_saved_or_adapted_head(extra: dict[str, Any]) -> None:
    config = LoraConfig(**({"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | extra))
    model: Any = get_peft_model(tiny(LlamaConfig(**SIZES)), config)
    data = batch()
    loss, expected = alone(model, data)
    assert use_varlen(model)
    result = supervised_loss(model, data)
    torch.autograd.backward(result.loss)
    assert result.loss.item() == pytest.approx(loss, rel=1e-5)
    assert_same(gradients(model), expected)


def test_a_head_that_does_more_is_left_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(LlamaConfig(**SIZES)).eval()
    forward = model.forward

    def shifted(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits + torch.linspace(0, 1, output.logits.shape[-1])
        return output

    monkeypatch.setattr(model, "forward", shifted)
    data = batch()
    loss, expected = alone(model, data)
    result = supervised_loss(model, data)
    torch.autograd.backward(result.loss)
    assert loss_module._proven[model] is False
    assert result.loss.item() == pytest.approx(loss, rel=1e-5)
    assert_same(gradients(model), expected)


def test_right_predictions_are_counted() -> None:
    model = tiny(LlamaConfig(**SIZES)).eval()
    data = batch()
    with torch.no_grad():
        rows, which = hidden_rows(model, data)
        guesses = model.lm_head(rows).argmax(-1)
        loss, correct = head_loss(model, rows, torch.where(which % 3 == 0, guesses, (guesses + 1) % 97))
    assert int(correct) == int((which % 3 == 0).sum())
    assert not loss.requires_grad


def test_a_batch_with_nothing_to_learn_gives_no_gradient() -> None:
    model = tiny(LlamaConfig(**SIZES))
    data = batch((4, 4), prompt=4)
    result = supervised_loss(model, data)
    torch.autograd.backward(result.loss)
    assert (result.loss.item(), result.count) == (0.0, 0)
    assert all(not g.any() for g in gradients(model).values())


def test_probabilities_that_underflow_still_have_a_loss() -> None:
    model = tiny(LlamaConfig(**SIZES))
    rows = torch.randn(5, 32) * 4e4
    labels = torch.arange(5)
    loss, _ = head_loss(model, rows, labels)
    expected = torch.nn.functional.cross_entropy(model.lm_head(rows), labels, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
