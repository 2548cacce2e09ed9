"""What the adapter store tells its subscribers after a change is committed. It knows not who listens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class AdapterEvent:
    """One committed change of one adapter; the store's index shows it already.

    kind: `published` (a new version; the default alias may have moved with it), `alias` (one was set, rolled back or
    deleted), `deleted` (the adapter or one of its versions), `pinned` (pinned or unpinned).
    `released` holds the digests that lost their last alias by this change: nobody gets them any more unless a request
    names that version's number, so memory may let them go.
    """

    kind: Literal["published", "alias", "deleted", "pinned"]
    adapter: str
    released: tuple[str, ...] = ()


Callback = Callable[[AdapterEvent], None]
