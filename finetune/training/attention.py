"""Attention for training without padding: sequences lie end to end in one row, each sees only itself, and no mask of
all tokens against all is built. It knows no loss and no optimiser.

How a loop uses this module, `linear.py` and `loss.py`:

    packed = attention.use_varlen(model)      # once, after loading; False: this architecture runs row by row
    linear.install(model)                     # once, after PEFT; changes the speed and nothing else
    result = method.loss(model, batch, ...)   # loss.supervised_loss; splits the batch as the model needs it
    (result.loss / count).backward()

`use_varlen` is a proof, not a list: two sequences end to end must give the logits that each gives alone, else the
model keeps its own attention and `pieces` gives it sequences of one length at a time.

A batch's borders travel as a keyword argument through the model's forward pass to the attention of every layer, so
that gradient checkpointing repeats a layer with the borders it had.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ..methods.base import Batch
from .varlen import Borders, attend, attend_rows, borders

ATTENTION = "tuneloop_varlen"
_PROBE = (9, 5, 5, 12)  # tokens of the sequences that the proof lays end to end


@dataclass(frozen=True, slots=True)
class Piece:
    """One forward pass of a batch: `inputs` for the model, and which of the batch's targets it answers.

    `rows` are indices into the model's output laid flat, [rows * tokens]; `which` indices into `Batch.targets`.
    """

    inputs: dict[str, Any]
    rows: Tensor
    which: Tensor


def pieces(model: nn.Module, batch: Batch) -> Iterator[Piece]:
    """The batch as this model takes it: in one row where `use_varlen` said so, else run by run, without padding."""
    layout = borders(batch.starts)
    if uses_varlen(model):
        inputs = {"input_ids": batch.ids, "position_ids": batch.positions, "tuneloop_borders": layout}
        yield Piece(inputs, batch.targets, torch.arange(len(batch.targets), device=batch.targets.device))
        return
    for start, count, length in layout.runs:
        which = ((batch.targets >= start) & (batch.targets < start + count * length)).nonzero()[:, 0]
        ids = batch.ids[0, start : start + count * length].view(count, length)
        yield Piece({"input_ids": ids}, batch.targets[which] - start, which)


def unwrap(model: nn.Module) -> Any:
    """transformers' own model inside PEFT's and torch's wrappers."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    inner = getattr(model, "get_base_model", None)
    return model if inner is None else inner()


def uses_varlen(model: nn.Module) -> bool:
    return bool(unwrap(model).config._attn_implementation == ATTENTION)


def use_varlen(model: nn.Module) -> bool:
    """Let the model take batches in one row if it can be proven to; tells whether it does. Weights stay as they are."""
    inner = unwrap(model)
    if uses_varlen(model):
        return True
    text = inner.config.get_text_config()
    if not getattr(inner, "_supports_attention_backend", False) or not _known_masks(text):
        return False
    before, training = inner.config._attn_implementation, inner.training
    vocabulary = inner.get_input_embeddings().weight.shape[0]
    device = inner.get_input_embeddings().weight.device
    inner.eval()
    try:
        rows = [torch.arange(n, device=device)[None] * (7 + i) % vocabulary for i, n in enumerate(_PROBE)]
        alone = _logits([lambda row=row: inner(input_ids=row, use_cache=False) for row in rows])
        inner.set_attn_implementation(ATTENTION)
        proven = alone is not None and _agrees(inner, rows, torch.cat(alone))
    finally:
        inner.train(training)
    if not proven:
        inner.set_attn_implementation(before)
    return proven


@torch.no_grad()
def _logits(calls: list[Any]) -> list[Tensor] | None:
    """[tokens, vocabulary] in float32 of each call; None if the model refuses to be called so."""
    try:
        return [call().logits[0].float() for call in calls]
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, NotImplementedError):
        return None


def _agrees(inner: Any, rows: list[Tensor], alone: Tensor) -> bool:
    lengths = torch.tensor([0, *(row.shape[1] for row in rows)], device=alone.device)
    positions = torch.cat([torch.arange(row.shape[1], device=alone.device) for row in rows])[None]
    layout = borders(lengths.cumsum(0))
    ids = torch.cat(rows, 1)
    together = _logits([lambda: inner(input_ids=ids, position_ids=positions, tuneloop_borders=layout, use_cache=False)])
    if together is None or together[0].shape != alone.shape:
        return False
    bound = 1e-3 if next(inner.parameters()).dtype == torch.float32 else 5e-2
    return bool((together[0] - alone).abs().max() <= bound * alone.abs().max())


def _known_masks(text: Any) -> bool:
    """Whether all layers see everything before a token, or a window of it, at whatever length."""
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, dict)]
    if any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds):  # turns by the longest of the row
        return False
    return set(getattr(text, "layer_types", None) or []) <= {"full_attention", "sliding_attention"}


def _window(module: nn.Module, passed: int | None) -> int | None:
    """The sliding window of a layer: transformers hands it over, or puts it into the mask that is not built here."""
    if passed is not None:
        return passed
    config: Any = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        sliding = kinds[module.layer_idx] == "sliding_attention"
        return config.sliding_window if sliding else None
    return getattr(module, "sliding_window", None)


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    tuneloop_borders: Borders | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, heads, T, head_dim] -> [1, T, heads, head_dim].

    Without borders each row is one sequence, as transformers' own functions take it. Raises NotImplementedError for
    terms that change scores (soft caps, sinks): the proof then leaves the model its own attention.
    """
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise NotImplementedError("Scores with soft caps, sinks or biases are left to the model's own attention.")
    if attention_mask is not None or not getattr(module, "is_causal", True):
        raise NotImplementedError("Only causal attention without a mask of its own is computed here.")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = _window(module, sliding_window)
    if tuneloop_borders is None:
        return attend_rows(query, key, value, scale=scale, dropout=dropout, window=window), None
    return attend(query, key, value, tuneloop_borders, scale, dropout, window), None


AttentionInterface.register(ATTENTION, varlen_attention)
