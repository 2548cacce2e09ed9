"""Adapters: what they are, where they come from, how they are checked and kept. It knows no engine and no HTTP.

Engine workers need no store; so `AdapterStore`, and the database with it, is imported when somebody asks for it.
"""

from typing import TYPE_CHECKING, Any

from .base import (
    DEFAULT_ALIAS,
    Adapter,
    AdapterFacts,
    AdapterLimits,
    AdapterVersion,
    Alias,
    ModuleShape,
    Origin,
)
from .events import AdapterEvent
from .refs import AdapterRef, parse_ref

if TYPE_CHECKING:
    from .store import AdapterStore

__all__ = [
    "DEFAULT_ALIAS",
    "Adapter",
    "AdapterEvent",
    "AdapterFacts",
    "AdapterLimits",
    "AdapterRef",
    "AdapterStore",
    "AdapterVersion",
    "Alias",
    "ModuleShape",
    "Origin",
    "parse_ref",
]


def __getattr__(name: str) -> Any:
    if name != "AdapterStore":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .store import AdapterStore

    return AdapterStore
