"""Modules with fewer, larger products in place of Hugging Face's own, for layer types whose mathematics is known.

`FusedAttention` is LLaMA's attention (also Mistral's, Qwen2's and Qwen3's) with one product for q, k and v;
`FusedMLP` is the gated feed-forward with one product for gate and up. Everything else of the model stays as it is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .attention import attend, write
from .batch import current
from .linear import AdaptedLinear

FUSED_ATTENTION = frozenset({"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"})


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
        qk = _rotate(qk, cos[0].unsqueeze(1), sin[0].unsqueeze(1))
        write(batch, self.layer_idx, qk[:, self.heads :], qkv[:, turned:])
        out = attend(batch, self.layer_idx, qk[:, : self.heads], self.scaling, self.window)
        return self.out(out.reshape(1, hidden_states.shape[1], -1)), None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves convention: x [T, heads, dim], cos and sin [T, 1, rotary_dim]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class FusedMLP(nn.Module):
    def __init__(self, gate_up: AdaptedLinear, down: AdaptedLinear, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_up, self.down, self.activation = gate_up, down, activation
        self.middle = gate_up.parts[0].size

    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up(x)
        gated: Tensor = self.down(self.activation(both[..., : self.middle]).mul_(both[..., self.middle :]))
        return gated
