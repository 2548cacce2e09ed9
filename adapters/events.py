"""What the adapter store tells its subscribers after a change is committed. It knows not who listens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .base import Adapter

Kind = Literal["published", "alias", "deleted", "pinned"]


@dataclass(frozen=True, kw_only=True)
class AdapterEvent:
    """One committed change of one adapter; the store's index shows it already.

    kind: `published` (a new version; the default alias may have moved with it), `alias` (one was set, rolled back or
    deleted), `deleted` (the adapter or one of its versions), `pinned` (pinned or unpinned).
    `released` holds the digests to which no alias points (any more) and that lost one, or a version, by this change:
    nobody gets them unless a request names a version's number, so engines may let them go.
    """

    kind: Kind
    adapter: str
    released: tuple[str, ...] = ()


Callback = Callable[[AdapterEvent], None]


def kind_of_change(old: Adapter | None, new: Adapter) -> Kind:
    """What happened to an adapter that another process changed; of several things, the one that matters most."""
    before = {version.version for version in old.versions} if old is not None else set()
    after = {version.version for version in new.versions}
    if after - before:
        return "published"
    if before - after:
        return "deleted"
    return "alias" if old is not None and old.aliases != new.aliases else "pinned"
