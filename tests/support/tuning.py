"""Tiny random models and batches for the training step, and its loss and gradients by transformers' own means."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig
from tuneloop.finetune.methods.base import Batch

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LENGTHS = (5, 9, 9, 3, 12)


def tiny(config: PreTrainedConfig, **values: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, **values)


def batch(lengths: tuple[int, ...] = LENGTHS, prompt: int = 2) -> Batch:
    """Random tokens; the first `prompt` of each sequence are not learnt."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.randint(0, 97, (1, int(starts[-1])), generator=generator)
    targets = torch.cat([torch.arange(int(s) + prompt - 1, int(s) + n - 1) for s, n in zip(starts, lengths)])  # noqa: B905
    return Batch(
        ids=ids,
        positions=torch.cat([torch.arange(n) for n in lengths])[None],
        starts=starts,
        targets=targets,
        labels=ids[0, targets + 1],
    )


def gradients(model: Any) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def alone(model: Any, data: Batch) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by transformers' own means, one sequence at a time."""
    total = 0.0
    for start, stop in zip(data.starts[:-1].tolist(), data.starts[1:].tolist(), strict=True):
        mine = (data.targets >= start) & (data.targets < stop)
        logits = model(input_ids=data.ids[:, start:stop]).logits[0, data.targets[mine] - start]
        loss = torch.nn.functional.cross_entropy(logits, data.labels[mine], reduction="sum")
        torch.autograd.backward(loss)
        total += loss.item()
    return total, gradients(model)


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= bound * (gradient.norm() + 1e-6), name
