"""Training methods: what each learns from, and its loss. A new one is a module here and a line in `_METHODS`."""

from .base import Method
from .supervised import Supervised

_METHODS: dict[str, Method] = {method.name: method for method in (Supervised(),)}


def method_for(stage: str) -> Method:
    """The method of a recipe's `stage`."""
    return _METHODS[stage]


def stages() -> tuple[str, ...]:
    """All stages that can be trained."""
    return tuple(_METHODS)
