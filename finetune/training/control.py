"""When a run saves, validates and stops: decided between two steps, by every process of the run alike."""

import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from transformers import EarlyStoppingCallback, TrainerCallback

from ..recipe.recipe import Recipe
from ..run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState

Reason = Literal["pause", "cancel", "interrupted"]
_REASONS: tuple[Reason, ...] = ("pause", "cancel", "interrupted")


class Wishes:
    """What people and the system ask of a running trainer: the control file, and SIGTERM or SIGINT."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._signalled = threading.Event()

    def listen(self) -> None:
        """Take signals from now on; a second one does what it does by default."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signal)

    def look(self) -> Reason | None:
        wish = self._run.wanted()
        if wish is not None:
            return wish
        return "interrupted" if self._signalled.is_set() else None

    def _signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled.set()
        signal.signal(number, signal.SIG_DFL)


class Schedule(TrainerCallback):  # type: ignore[misc]
    """Sets the loop's switches after each step. `stopped` says afterwards why a run ended before its time."""

    def __init__(
        self,
        recipe: Recipe,
        wishes: Wishes,
        *,
        total_steps: int,
        epoch_ends: Sequence[int],
        validates: bool,
        agree: Callable[[int], int],
    ) -> None:
        self.stopped: Reason | None = None
        self._wishes = wishes
        self._total_steps = total_steps
        self._agree = agree  # the largest of all processes' numbers: they must stop at the same step
        inner = {end for end in epoch_ends if end < total_steps}
        self._saves = _steps(recipe.save_strategy, recipe.save_steps, inner, total_steps)
        strategy = recipe.eval_strategy or ("steps" if recipe.eval_steps else "epoch")
        self._evaluations = _steps(strategy, recipe.eval_steps, inner, total_steps) | {total_steps}
        if not validates or strategy == "no":
            self._evaluations = set()

    def on_step_end(self, args: Any, state: "TrainerState", control: "TrainerControl", **_: Any) -> "TrainerControl":
        """transformers' hook: after the optimiser's step."""
        step = state.global_step
        control.should_evaluate = step in self._evaluations
        control.should_save = step in self._saves
        wish = self._wishes.look()
        agreed = self._agree(0 if wish is None else 1 + _REASONS.index(wish))
        if agreed and step < self._total_steps:
            self.stopped = _REASONS[agreed - 1]
            control.should_save = self.stopped != "cancel"
            control.should_evaluate = False
            control.should_training_stop = True
        return control


class EarlyStop(EarlyStoppingCallback):  # type: ignore[misc]
    """transformers' own, for a loop whose validations are the Schedule's and not the arguments'."""

    def on_train_begin(self, args: Any, state: "TrainerState", control: "TrainerControl", **_: Any) -> None:
        """Without its checks of the arguments."""


def _steps(strategy: str, every: int | None, epoch_ends: set[int], total_steps: int) -> set[int]:
    """Steps at which something happens; the last step is left out, because the result is made there."""
    if strategy == "epoch":
        return epoch_ends
    if strategy == "steps" and every is not None:
        return set(range(every, total_steps, every))
    return set()
