"""Supervised tuning: learn to produce the answers of conversations, or plain text (`stage: sft`)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..data.base import Row, TokenSequence
from .base import Batch, LossResult, Method

if TYPE_CHECKING:
    import torch

    from ..recipe.recipe import Recipe


class Supervised(Method):
    name = "sft"

    def check_row(self, row: Row) -> None:
        """Whatever the readers let pass is fit: they know conversations and plain text only."""

    def sequences(self, rows: Sequence[Row], render: Any, recipe: "Recipe") -> list[list[TokenSequence]]:
        found: list[list[TokenSequence]] = render.rows(rows)
        return found

    def loss(self, model: "torch.nn.Module", batch: Batch, recipe: "Recipe") -> LossResult:
        """Cross entropy of each supervised token, summed."""
        from ..training.loss import supervised_loss

        return supervised_loss(model, batch)
