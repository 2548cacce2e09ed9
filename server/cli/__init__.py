"""The `tuneloop` command. Importing it is cheap: what a command works with is imported when that command runs."""

from .main import build_app, main

__all__ = ["build_app", "main"]
