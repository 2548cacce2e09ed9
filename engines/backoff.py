"""When to try again after failures: at once after the first, then after 1, 2, 4 ... 30 seconds."""

from collections.abc import Callable

_LONGEST_SECONDS = 30.0
_STEADY_SECONDS = 60.0  # whoever lived that long has not failed in a row


class Backoff:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures = 0
        self._started_at: float | None = None
        self._retry_at = 0.0

    def started(self) -> None:
        self._started_at = self._clock()

    def failed(self) -> None:
        now = self._clock()
        if self._started_at is not None and now - self._started_at >= _STEADY_SECONDS:
            self._failures = 0
        self._started_at = None
        self._failures += 1
        wait = 0.0 if self._failures == 1 else min(_LONGEST_SECONDS, 2.0 ** (self._failures - 2))
        self._retry_at = now + wait

    @property
    def over(self) -> bool:
        """Whether the time for the next try has come."""
        return self._clock() >= self._retry_at
