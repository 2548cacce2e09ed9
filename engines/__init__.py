"""Engines that run base models, the registry that keeps them in memory, and the chat text around them."""

from .base import Chunk, Engine, EngineInfo, EngineStats, FinishReason, GenerateRequest, SamplingParams, TokenLogprob

__all__ = [
    "Chunk",
    "Engine",
    "EngineInfo",
    "EngineStats",
    "FinishReason",
    "GenerateRequest",
    "SamplingParams",
    "TokenLogprob",
]
