"""What a training method is: a data form, a loss and a kind of result. The loop, the checkpoints, the devices and the
event log are the trainer's and the same for all methods.

A method never sees a padded batch: sequences lie one behind another in one row (`Batch`), each attending to itself
only, so that no product is spent on padding.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..data.base import Row, TokenSequence

if TYPE_CHECKING:
    import torch

    from ..recipe.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences laid end to end. All tensors are on the training device.

    `ids`, `positions` are [1, T]; `starts` [n + 1] are the borders of the n sequences, ending with T;
    `targets` [S] are the positions t whose *next* token the loss is about, `labels` [S] those next tokens.
    """

    ids: "torch.Tensor"
    positions: "torch.Tensor"
    starts: "torch.Tensor"
    targets: "torch.Tensor"
    labels: "torch.Tensor"


@dataclass(frozen=True, slots=True)
class LossResult:
    """`loss` is the *sum* over what is counted; the trainer divides by the `count` of the whole step.

    `sums` are further measures, each a sum over the same count (`correct`: tokens predicted rightly).
    """

    loss: "torch.Tensor"
    count: int
    sums: Mapping[str, float]


class Method(ABC):
    """One training method. Instances are stateless; the recipe has all the knobs."""

    name: ClassVar[str]  # the recipe's `stage`

    @abstractmethod
    def check_row(self, row: Row) -> None:
        """Raises DataError naming the row's place if this method cannot learn from it."""

    @abstractmethod
    def sequences(self, rows: Sequence[Row], render: Any, recipe: "Recipe") -> list[list[TokenSequence]]:
        """Each row's token sequences, by `render` (data/render.py's Renderer), which is fast for many rows at once.

        Raises DataError for a row that the chat template refuses.
        """

    @abstractmethod
    def loss(self, model: "torch.nn.Module", batch: Batch, recipe: "Recipe") -> LossResult:
        """Forward pass and loss of one batch."""
