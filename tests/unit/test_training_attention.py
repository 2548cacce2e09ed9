"""Sequences end to end answer as each alone; what cannot be proven runs without padding all the same."""

import pytest
import torch
from transformers import (
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
)
from tuneloop.finetune.training.attention import pieces, use_varlen, uses_varlen
from tuneloop.finetune.training.loss import supervised_loss
from tuneloop.finetune.training.varlen import attend, attend_rows, borders

from tests.support.tuning import SIZES, alone, assert_same, batch, gradients, tiny


@pytest.mark.parametrize(
    ("config", "packed"),
    [
        (LlamaConfig(**SIZES), True),
        (MistralConfig(**SIZES, sliding_window=4), True),
        (GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64), True),
        (Gemma2Config(**SIZES, head_dim=8, sliding_window=4), False),  # caps its scores
        (BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4), False),  # ALiBi, attention of its own
    ],
    ids=["llama", "mistral", "gpt2", "gemma2", "bloom"],
)
def test_a_batch_is_its_sequences_alone(config: PreTrainedConfig, packed: bool) -> None:
    model = tiny(config)
    model.eval()
    data = batch()
    loss, expected = alone(model, data)
    assert use_varlen(model) is packed
    assert uses_varlen(model) is packed
    assert len(list(pieces(model, data))) == (1 if packed else 4)
    result = supervised_loss(model, data)
    torch.autograd.backward(result.loss)
    assert result.loss.item() == pytest.approx(loss, rel=1e-5)
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_repeats_layers_with_their_own_borders(reentrant: bool) -> None:
    model = tiny(LlamaConfig(**SIZES)).train()
    first, second = batch(), batch((4, 21), prompt=1)
    expected = [alone(model, data) for data in (first, second)]
    assert use_varlen(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    results = [supervised_loss(model, data) for data in (first, second)]  # both before any backward pass
    for result, (loss, gradient) in zip(results, expected, strict=True):
        torch.autograd.backward(result.loss)
        assert result.loss.item() == pytest.approx(loss, rel=1e-5)
        assert_same(gradients(model), gradient)


@pytest.mark.parametrize("window", [None, 4])
def test_no_token_sees_another_sequence(window: int | None) -> None:
    torch.manual_seed(0)
    layout = borders(batch().starts)
    length = layout.starts[-1]
    q, k, v = (torch.randn(1, heads, length, 8, requires_grad=True) for heads in (4, 2, 2))
    out = attend(q, k, v, layout, 0.3, 0.0, window)
    rows = [
        attend_rows(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], scale=0.3, dropout=0.0, window=window)
        for a, b in zip(layout.starts, layout.starts[1:])  # noqa: B905
    ]
    torch.testing.assert_close(out, torch.cat(rows, 1))
    weights = torch.randn_like(out)
    mine = torch.autograd.grad((out * weights).sum(), [q, k, v])
    theirs = torch.autograd.grad((torch.cat(rows, 1) * weights).sum(), [q, k, v])
    torch.testing.assert_close(mine, theirs)


def test_neighbours_of_one_length_are_one_call() -> None:
    assert borders(torch.tensor([0, 5, 14, 23, 23, 26])).runs == ((0, 1, 5), (5, 2, 9), (23, 1, 3))


def test_a_model_without_attention_interface_keeps_its_attention() -> None:
    model = tiny(LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}))
    before = model.config._attn_implementation
    assert use_varlen(model) is False  # its rotations depend on the longest sequence of a row
    assert model.config._attn_implementation == before
