"""Tuneloop: serve open language models, tune them, and serve the result, behind OpenAI's own API."""

__version__ = "0.1.0"
