"""Counts what a run does: tokens, right predictions, time. Saving and validating is not training time."""

import time
from collections import deque
from collections.abc import Callable

from ..methods.base import LossResult

_RECENT_STEPS = 20


class Meter:
    """`tokens` counts those of the whole run, also of attempts before this one."""

    def __init__(self, tokens: int = 0) -> None:
        self.tokens = tokens
        self._since = time.perf_counter()
        self._tokens = 0
        self._correct = 0.0
        self._count = 0
        self._logged_step: int | None = None
        self._pace: deque[float] = deque(maxlen=_RECENT_STEPS)  # seconds a step

    def start(self, step: int) -> None:
        """Training begins, or goes on, behind `step`."""
        self._logged_step = step
        self._since = time.perf_counter()

    def add(self, found: LossResult, *, tokens: int) -> None:
        """One batch is done."""
        self._tokens += tokens
        self._correct += found.sums.get("correct", 0.0)
        self._count += found.count

    def pause(self, seconds: float) -> None:
        """So much of the time went into something else."""
        self._since += seconds

    def take(self, step: int, total_steps: int, *, total: Callable[[float], float]) -> dict[str, float]:
        """The measures since the last call; `total` sums a number over all processes."""
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        steps = max(step - (self._logged_step or 0), 1)
        self._pace.append(elapsed / steps)
        tokens, correct, count = total(self._tokens), total(self._correct), total(self._count)
        self.tokens += int(tokens)
        self._tokens, self._correct, self._count = 0, 0.0, 0
        self._logged_step = step
        self._since = time.perf_counter()
        return {
            "train_mean_token_accuracy": correct / max(count, 1),
            "tokens": self.tokens,
            "tokens_per_second": tokens / elapsed,
            "eta_seconds": (total_steps - step) * sum(self._pace) / len(self._pace),
        }
