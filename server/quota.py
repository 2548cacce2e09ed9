"""Requests a minute of one API key, counted in this process. It knows no HTTP and keeps nothing on disk."""

import time
from collections.abc import Callable

from ..storage.errors import Overloaded


class RequestQuota:
    """A token bucket a key: it holds one minute's requests and refills evenly, so bursts up to the limit pass."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}  # key id -> (tokens left, when they were counted)

    def take(self, key_id: str, rpm_limit: int) -> None:
        """Count one request. Raises Overloaded with the seconds until the next one passes."""
        now = self._clock()
        tokens, counted = self._buckets.get(key_id, (float(rpm_limit), now))
        tokens = min(float(rpm_limit), tokens + (now - counted) * rpm_limit / 60)
        if tokens < 1:
            self._buckets[key_id] = (tokens, now)
            raise Overloaded(
                f"This API key may make {rpm_limit} requests a minute, and they are used up. Try again in a moment.",
                retry_after=(1 - tokens) * 60 / rpm_limit,
                code="rate_limit_exceeded",
            )
        self._buckets[key_id] = (tokens - 1, now)
