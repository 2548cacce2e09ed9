"""The transformers engine: continuous batching with mixed adapters over transformers' modules. Imports no torch."""

from .config import TransformersConfig
from .engine import TransformersEngine

__all__ = ["TransformersConfig", "TransformersEngine"]
