"""Modules with fewer, larger products in place of Hugging Face's own, for layer types whose mathematics is known.

`FusedAttention` is LLaMA's attention (also Mistral's, Qwen2's and Qwen3's) with one product for q, k and v;
`FusedMLP` is the gated feed-forward with one product for gate and up; `FusedNorm` is RMSNorm. Everything else of the
model stays as it is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .attention import attend, write
from .batch import Batch, current
from .linear import AdaptedLinear

FUSED_ATTENTION = frozenset({"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"})
FUSED_NORM = frozenset({"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "MixtralRMSNorm"})


class FusedAttention(nn.Module):
    def __init__(self, source: Any, qkv: AdaptedLinear, out: AdaptedLinear) -> None:
        super().__init__()
        self.qkv, self.out = qkv, out
        self.q_norm: Callable[[Tensor], Tensor] | None = getattr(source, "q_norm", None)
        self.k_norm: Callable[[Tensor], Tensor] | None = getattr(source, "k_norm", None)
        self.layer_idx: int = source.layer_idx
        self.head_dim: int = source.head_dim
        self.scaling: float = source.scaling
        self.window: int | None = getattr(source, "sliding_window", getattr(source.config, "sliding_window", None))
        if type(source).__name__ == "LlamaAttention":
            self.window = None
        self.heads = qkv.parts[0].size // self.head_dim
        self.kv_heads = qkv.parts[1].size // self.head_dim

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any
    ) -> tuple[Tensor, None]:
        """hidden_states [1, T, hidden] -> ([1, T, hidden], None); keys and values go to the pool."""
        batch = current.batch
        assert batch is not None
        qkv = self.qkv(hidden_states[0]).view(-1, self.heads + 2 * self.kv_heads, self.head_dim)
        turned = self.heads + self.kv_heads
        qk = qkv[:, :turned]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat([self.q_norm(qk[:, : self.heads]), self.k_norm(qk[:, self.heads :])], 1)
        cos, sin = position_embeddings
        qk = _rotate(qk, cos[0].unsqueeze(1), _signed(batch, sin).unsqueeze(1))
        write(batch, self.layer_idx, qk[:, self.heads :], qkv[:, turned:])
        out = attend(batch, self.layer_idx, qk[:, : self.heads], self.scaling, self.window)
        return self.out(out.reshape(1, hidden_states.shape[1], -1)), None


def _rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotary embedding, halves convention: x [T, heads, dim], cos and sin [T, 1, dim].

    Swapping the halves by a roll, with the minus in the sine, takes half the time of negating and joining them.
    """
    return torch.addcmul(x * cos, torch.roll(x, x.shape[-1] // 2, -1), signed_sin)


def _signed(batch: Batch, sin: Tensor) -> Tensor:
    """sin [1, T, dim] -> [T, dim] with the first half negated; all layers of a step share it."""
    found = batch.memo.get(id(sin))
    if found is None:
        found = sin[0].clone()
        found[:, : found.shape[1] // 2].neg_()
        batch.memo[id(sin)] = found
    return found


class FusedNorm(nn.Module):
    """RMSNorm (arXiv:1910.07467) in float32: x / rms(x) * weight, by one norm and two products."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        size = weight.shape[0]
        self.scaled = weight * size**0.5
        self.shift = torch.tensor(size * eps, dtype=weight.dtype, device=weight.device)  # a float would be converted

    def forward(self, x: Tensor) -> Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().add_(self.shift).rsqrt_()
        normed: Tensor = (x * inverse).mul_(self.scaled)
        return normed


class FusedMLP(nn.Module):
    def __init__(self, gate_up: AdaptedLinear, down: AdaptedLinear, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_up, self.down, self.activation = gate_up, down, activation
        self.middle = gate_up.parts[0].size

    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up(x)
        gated: Tensor = self.down(self.activation(both[..., : self.middle]).mul_(both[..., self.middle :]))
        return gated
