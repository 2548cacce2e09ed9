"""Counts the leases of adapter versions and says when a version that no alias names any more may leave memory.

It knows digests only: neither engines nor the store.
"""

from collections import Counter
from collections.abc import Callable


class AdapterLeases:
    """The leases of one base model. `referenced` tells whether some alias still points at a digest."""

    def __init__(self, referenced: Callable[[str], bool]) -> None:
        self._referenced = referenced
        self._held: Counter[str] = Counter()
        self._released: set[str] = set()

    def begin(self, digest: str) -> None:
        self._held[digest] += 1

    def end(self, digest: str) -> bool:
        """End a lease. True: the version is to leave memory now."""
        self._held[digest] -= 1
        if self._held[digest] > 0:
            return False
        del self._held[digest]
        if digest not in self._released:
            return False
        self._released.discard(digest)
        return not self._referenced(digest)  # a rollback may have brought it back meanwhile

    def release(self, digest: str) -> bool:
        """The last alias has left this digest. True: nobody holds it, so it is to leave memory now."""
        if self._held[digest] > 0:
            self._released.add(digest)
            return False
        del self._held[digest]
        return not self._referenced(digest)

    def held(self, digest: str) -> int:
        """How many leases hold it now."""
        return self._held.get(digest, 0)
