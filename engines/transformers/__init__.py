"""The transformers engine: continuous batching with mixed adapters over Hugging Face's own modules. No torch is imported here."""

from .config import TransformersConfig
from .engine import TransformersEngine

__all__ = ["TransformersConfig", "TransformersEngine"]
