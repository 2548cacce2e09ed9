"""The loss of supervised tokens: the LM head and cross entropy on the positions that count, a bounded number of rows
at a time. It knows no recipe and no optimiser.

The model's own forward pass runs up to its LM head, whose input is taken there; so any architecture and any wrapper
(PEFT's, torch's) computes its hidden states in its own way. What a model does to logits behind its head (soft caps,
scales) is repeated here if a probe shows that it is all there is; else the model's own logits are used.

Logits never exist for more rows than `LOGITS_BYTES` holds, and no row's are computed twice: the gradient of a row's
loss is known as soon as its logits are.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..methods.base import Batch, LossResult
from .attention import pieces, unwrap
from .linear import FastLinear
from .products import product

LOGITS_BYTES = 64 * 1024 * 1024
_PROBE = 6  # tokens

_proven: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def supervised_loss(model: nn.Module, batch: Batch) -> LossResult:
    """Sum of the cross entropies of `batch.labels` at `batch.targets`; `correct` counts the right ones."""
    if _head_is_all(model):
        rows, which = hidden_rows(model, batch)
        loss, correct = head_loss(unwrap(model), rows, batch.labels[which])
    else:
        logits, which = logit_rows(model, batch)
        labels = batch.labels[which]
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        correct = (logits.argmax(-1) == labels).sum()
    return LossResult(loss=loss, count=len(batch.labels), sums={"correct": float(correct)})


def hidden_rows(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The LM head's inputs [S, hidden] at the targets, and which target each row is."""
    rows, which = [], []
    head = unwrap(model).get_output_embeddings()
    for piece in pieces(model, batch):
        with _taken(head) as taken:
            model(**piece.inputs, use_cache=False)
        rows.append(taken[0].flatten(0, -2)[piece.rows])
        which.append(piece.which)
    return torch.cat(rows), torch.cat(which)


def logit_rows(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The model's own logits [S, vocabulary] at the targets, and which target each row is."""
    rows, which = [], []
    for piece in pieces(model, batch):
        rows.append(model(**piece.inputs, use_cache=False).logits.flatten(0, -2)[piece.rows])
        which.append(piece.which)
    return torch.cat(rows), torch.cat(which)


def head_loss(inner: Any, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross entropies of the LM head on hidden states `rows` [S, hidden], and how many are right."""
    head = inner.get_output_embeddings()
    scale, cap = _behind_head(inner)
    own = (
        (scale, cap) != (1.0, None)
        or type(head) not in (nn.Linear, FastLinear)
        or torch.is_autocast_enabled(rows.device.type)
    )
    if own:
        parameters = [p for p in head.parameters() if p.requires_grad]
        step: _Step = lambda x, y, train: _step_by_autograd(head, scale, cap, parameters, x, y, train)  # noqa: E731
    else:
        parameters = [p for p in (head.weight, head.bias) if p is not None and p.requires_grad]
        step = lambda x, y, train: _step(head, x, y, train)  # noqa: E731
    size = max(1, LOGITS_BYTES // (4 * inner.config.get_text_config().vocab_size))
    loss, correct = _ChunkedLoss.apply(rows, labels, size, step, torch.is_grad_enabled(), *parameters)  # type: ignore[no-untyped-call]
    return loss, correct


_Step = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor, Sequence[Tensor]]]  # loss, correct, gradients


def _step(head: nn.Linear, rows: Tensor, labels: Tensor, train: bool) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """A plain head: softmax minus the label is the gradient of the logits."""
    logits = product(rows, head.weight, head.bias)
    top, guess = logits.max(-1)
    probabilities = torch.softmax(logits, -1, dtype=torch.float32)
    # log sum exp by the largest logit, whose probability is never tiny
    sums = top.float() - probabilities.gather(1, guess[:, None])[:, 0].log()
    loss = (sums - logits.gather(1, labels[:, None])[:, 0].float()).sum()
    correct = (guess == labels).sum()
    if not train:
        return loss, correct, ()
    del logits
    probabilities[torch.arange(len(labels), device=labels.device), labels] -= 1
    delta = probabilities.to(rows.dtype)
    grads = [product(delta, head.weight.t())]
    if head.weight.requires_grad:
        grads.append(product(delta.t(), rows.t()))
    if head.bias is not None and head.bias.requires_grad:
        grads.append(delta.sum(0))
    return loss, correct, grads


def _step_by_autograd(
    head: nn.Module, scale: float, cap: float | None, parameters: list[nn.Parameter], rows: Tensor, labels: Tensor,
    train: bool,
) -> tuple[Tensor, Tensor, Sequence[Tensor]]:  # fmt: skip
    """Any head, as a LoRA layer or one whose logits are capped."""
    with torch.set_grad_enabled(train):
        rows = rows.detach().requires_grad_(train)
        logits = _finish(head(rows), scale, cap).float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
    correct = (logits.argmax(-1) == labels).sum()
    return loss.detach(), correct, torch.autograd.grad(loss, [rows, *parameters]) if train else ()


class _ChunkedLoss(torch.autograd.Function):
    """Runs `step` on `size` rows at a time and keeps the gradients until backward asks for them."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, labels: Tensor, size: int, step: _Step, train: bool, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        loss = torch.zeros((), dtype=torch.float32, device=rows.device)
        correct = torch.zeros((), dtype=torch.int64, device=rows.device)
        grads = [torch.zeros_like(x) for x in (rows, *parameters)] if train else []
        for start in range(0, len(rows), size):
            part, right, found = step(rows[start : start + size], labels[start : start + size], train)
            loss += part
            correct += right
            if train:
                grads[0][start : start + size] = found[0]
                for total, more in zip(grads[1:], found[1:], strict=True):
                    total += more
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        rows, *parameters = (g * grad.to(g.dtype) for g in ctx.saved_tensors)
        return (rows, None, None, None, None, *parameters)


def _finish(logits: Tensor, scale: float, cap: float | None) -> Tensor:
    logits = logits * scale if scale != 1.0 else logits
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _behind_head(inner: Any) -> tuple[float, float | None]:
    """Scale and soft cap of logits, as Cohere (logit_scale), Granite (logits_scaling) and Gemma write them."""
    text = inner.config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0) / float(getattr(text, "logits_scaling", None) or 1.0)
    return scale, getattr(text, "final_logit_softcapping", None)


@contextmanager
def _taken(head: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, `head` only notes what it is given."""
    taken: list[Tensor] = []

    def take(rows: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        taken.append(rows)
        return rows.new_zeros(*rows.shape[:-1], 1)

    before = head.__dict__.get("forward")
    head.forward = take
    try:
        yield taken
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


def _head_is_all(model: nn.Module) -> bool:
    """Whether head, scale and cap give the model's own logits; tried once a model."""
    inner = unwrap(model)
    found = _proven.get(inner)
    if found is None:
        found = _proven[inner] = _prove(inner)
    return found


@torch.no_grad()
def _prove(inner: Any) -> bool:
    head = inner.get_output_embeddings()
    if head is None:
        return False
    training = inner.training
    inner.eval()
    try:
        vocabulary = inner.get_input_embeddings().weight.shape[0]
        ids = torch.arange(_PROBE, device=inner.get_input_embeddings().weight.device)[None] * 7 % vocabulary
        expected = inner(input_ids=ids, use_cache=False).logits
        with _taken(head) as taken:
            inner(input_ids=ids, use_cache=False)
        if len(taken) != 1:
            return False
        got = _finish(head(taken[0]), *_behind_head(inner))
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    finally:
        inner.train(training)
    if got.shape != expected.shape:
        return False
    bound = 1e-4 if expected.dtype == torch.float32 else 2e-2
    return bool((got - expected).abs().max() <= bound * expected.abs().max())
