"""Attention over the KV pool for a flat batch: a batched product a lane of decoding rows, an SDPA a prompt chunk.

Registered with transformers' AttentionInterface, so every model whose layers call it runs unchanged; masks, windows,
soft caps and sinks come from the arguments that the model passes. `PoolCache` is the cache such a model writes to.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from .batch import Batch, DecodeGroup, PrefillSpan, current
from .kv import LayerKV

ATTENTION = "tuneloop_pool"


class PoolCache(Cache):  # type: ignore[misc]
    """Writes each token's key and value into its row's slot. Gives back what it got: attention reads the pool."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """key_states [1, kv_heads, T, head_dim]."""
        assert current.batch is not None
        write(current.batch, layer_idx, key_states[0].transpose(0, 1), value_states[0].transpose(0, 1))
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def write(batch: Batch, layer_idx: int, keys: Tensor, values: Tensor) -> None:
    """Store keys and values [T, kv_heads, head_dim] of the flat batch."""
    for span in batch.prefills:
        layer = span.slot.lane.layers[layer_idx]
        end = span.context + span.stop - span.start
        layer.keys[span.slot.index, :, span.context : end] = keys[span.start : span.stop].transpose(0, 1)
        layer.values[span.slot.index, :, span.context : end] = values[span.start : span.stop].transpose(0, 1)
    for group in batch.decodes:
        layer = group.lane.layers[layer_idx]
        layer.keys[group.slots, :, group.positions] = keys[group.start : group.stop]
        layer.values[group.slots, :, group.positions] = values[group.start : group.stop]


def attend(
    batch: Batch,
    layer_idx: int,
    query: Tensor,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """query [T, heads, head_dim] -> [T, heads, value_dim]; every token sees its own row up to itself."""
    pieces: list[Tensor] = []
    for span in batch.prefills:
        layer = span.slot.lane.layers[layer_idx]
        pieces.append(_attend_span(query[span.start : span.stop], layer, span, scaling, window, softcap, sinks))
    for group in batch.decodes:
        layer = group.lane.layers[layer_idx]
        pieces.append(_attend_group(query[group.start : group.stop], layer, group, scaling, window, softcap, sinks))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _attend_span(
    q: Tensor,
    layer: LayerKV,
    span: PrefillSpan,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    count = span.stop - span.start
    end = span.context + count
    k = layer.keys[span.slot.index : span.slot.index + 1, :, :end]
    v = layer.values[span.slot.index : span.slot.index + 1, :, :end]
    q = q.transpose(0, 1).unsqueeze(0)
    windowed = window is not None and window < end
    if span.context == 0 and not windowed and softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out[0].transpose(0, 1)
    at = torch.arange(span.context, end, device=q.device)[:, None]
    key = torch.arange(end, device=q.device)[None, :]
    visible = key <= at
    if windowed:
        visible &= key > at - window  # type: ignore[operator]
    if softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out[0].transpose(0, 1)
    heads, kv_heads = q.shape[1], k.shape[1]
    grouped = q[0].reshape(kv_heads, heads // kv_heads * count, q.shape[3])
    scores = torch.bmm(grouped, k[0].transpose(1, 2)).view(heads, count, end) * scaling
    hidden = torch.zeros(count, end, dtype=scores.dtype, device=q.device).masked_fill_(
        ~visible, torch.finfo(scores.dtype).min
    )
    probabilities = _softmax(scores, hidden, softcap, sinks[:, None, None] if sinks is not None else None)
    out = torch.bmm(probabilities.view(kv_heads, -1, end), v[0])
    return out.view(heads, count, -1).transpose(0, 1)


def _attend_group(
    q: Tensor,
    layer: LayerKV,
    group: DecodeGroup,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    if not group.whole:
        spread = q.new_zeros(group.top, *q.shape[1:])
        spread[group.slots] = q
        q = spread
    top, heads, dim = q.shape
    kv_heads = layer.keys.shape[1]
    k = layer.keys[:top].view(top * kv_heads, -1, dim)[:, : group.length]
    v = layer.values[:top].view(top * kv_heads, -1, layer.values.shape[3])[:, : group.length]
    q = q.reshape(top * kv_heads, heads // kv_heads, dim)
    mask = group.mask(window, kv_heads, q.dtype)
    if softcap is None and sinks is None:
        scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scaling)
        probabilities = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    else:
        scores = torch.bmm(q, k.transpose(1, 2)) * scaling
        each = sinks.view(kv_heads, -1, 1).repeat(top, 1, 1) if sinks is not None else None
        probabilities = _softmax(scores, mask, softcap, each)
    out = torch.bmm(probabilities, v).view(top, heads, -1)
    return out if group.whole else out[group.slots]


def _softmax(scores: Tensor, mask: Tensor, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Softmax of capped and masked scores; `sinks` are learned scores of an extra key without a value (gpt-oss)."""
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + mask
    if sinks is None:
        return torch.softmax(scores, -1, dtype=torch.float32).to(scores.dtype)
    extra = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, extra], -1), -1, dtype=torch.float32)[..., :-1].to(scores.dtype)


def pool_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, heads, T, head_dim] -> [1, T, heads, head_dim]."""
    assert current.batch is not None
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer_idx: int = module.layer_idx  # type: ignore[assignment]
    out = attend(current.batch, layer_idx, query[0].transpose(0, 1), scale, sliding_window, softcap, s_aux)
    return out.unsqueeze(0), None


AttentionInterface.register(ATTENTION, pool_attention)
