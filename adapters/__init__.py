"""Adapters: what they are, where they come from, how they are checked and kept. It knows no engine and no HTTP."""

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
