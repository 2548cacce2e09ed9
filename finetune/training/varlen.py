"""Causal attention of sequences that lie end to end, each to itself only: exact, and without a mask of all tokens
against all. It knows neither models nor batches, only borders.

On a CPU, torch's flash kernel runs once for each run of equally long neighbours and writes its results and gradients
straight into place; on CUDA in half precision one kernel takes all sequences; everything else is torch's
`scaled_dot_product_attention`, run by run.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True)
class Borders:
    """Where the sequences of a row begin: `starts` [n + 1], and as `runs` of neighbours of one length, each
    (first token, sequences, tokens of a sequence)."""

    starts: tuple[int, ...]
    runs: tuple[tuple[int, int, int], ...]
    cumulative: Tensor = field(repr=False)  # `starts` as int32 on the device, for its kernels

    @property
    def longest(self) -> int:
        return max((length for _, _, length in self.runs), default=0)


def borders(starts: Tensor) -> Borders:
    """The borders of `Batch.starts`; read once a batch, not once a layer."""
    places: list[int] = starts.tolist()
    runs: list[tuple[int, int, int]] = []
    for start, stop in pairwise(places):
        if runs and runs[-1][2] == stop - start:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, stop - start)
        elif stop > start:
            runs.append((start, 1, stop - start))
    return Borders(tuple(places), tuple(runs), starts.to(torch.int32))


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: Borders, scale: float, dropout: float, window: int | None
) -> Tensor:
    """query [1, heads, T, dim], key and value [1, kv_heads, T, dim] -> [1, T, heads, value_dim]."""
    if window is not None and window >= layout.longest:
        window = None
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and dropout == 0:
        return _attend_cuda(query, key, value, layout, scale, window)
    if query.device.type == "cpu" and window is None and dropout == 0 and query.shape[-1] == value.shape[-1]:
        out: Tensor = _Flash.apply(query, key, value, layout, scale)  # type: ignore[no-untyped-call]
        return out
    sizes = [count * length for _, count, length in layout.runs]
    split = zip(layout.runs, *(torch.split(x, sizes, 2) for x in (query, key, value)), strict=True)
    outs: list[Tensor] = []
    for (_, count, length), q, k, v in split:
        rows = (_rows(x, count, length) for x in (q, k, v))
        outs.append(attend_rows(*rows, scale=scale, dropout=dropout, window=window).flatten(0, 1))
    return torch.cat(outs)[None]


def attend_rows(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, dropout: float, window: int | None
) -> Tensor:
    """query [n, heads, L, dim], each row one sequence -> [n, L, heads, value_dim]."""
    gqa = query.shape[1] != key.shape[1]
    mask = None
    if window is not None and window < query.shape[2]:
        at = torch.arange(query.shape[2], device=query.device)
        mask = (at[None] <= at[:, None]) & (at[None] > at[:, None] - window)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scale, enable_gqa=gqa
    )
    return out.transpose(1, 2)


def _attend_cuda(
    query: Tensor, key: Tensor, value: Tensor, layout: Borders, scale: float, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    at, longest = layout.cumulative, layout.longest
    left = -1 if window is None else window - 1
    out = varlen_attn(
        q, k, v, at, at, longest, longest, scale=scale, window_size=(left, 0), enable_gqa=q.shape[1] != k.shape[1]
    )
    assert isinstance(out, Tensor)
    return out[None]


def _rows(x: Tensor, count: int, length: int) -> Tensor:
    """[1, heads, count * length, dim] -> [count, heads, length, dim], a view."""
    return x.view(x.shape[1], count, length, x.shape[3]).transpose(0, 1)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Borders, scale: float) -> Tensor:
        out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        sums = []
        for q, k, v, o in _each(layout, query, key, value, out.transpose(1, 2)):
            result, logsumexp = _flash(q, k, v, 0.0, True, scale=scale)
            o.copy_(result)
            sums.append(logsumexp)
        ctx.save_for_backward(query, key, value, out, *sums)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *sums = ctx.saved_tensors
        grads = [torch.empty_like(x.transpose(1, 2)).transpose(1, 2) for x in (query, key, value)]
        views = _each(ctx.layout, grad.transpose(1, 2), query, key, value, out.transpose(1, 2), *grads)
        for (g, q, k, v, o, *into), logsumexp in zip(views, sums, strict=True):
            for place, part in zip(
                into, _flash_backward(g, q, k, v, o, logsumexp, 0.0, True, scale=ctx.scale), strict=True
            ):
                place.copy_(part)
        return (*grads, None, None)


def _each(layout: Borders, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the runs of tensors [1, heads, T, dim]."""
    for start, count, length in layout.runs:
        yield tuple(_rows(x[:, :, start : start + count * length], count, length) for x in tensors)
