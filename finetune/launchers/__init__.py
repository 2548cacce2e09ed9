"""Where the processes of a run are started, one launcher a file."""

from .base import Handle, Launcher
from .local import LocalLauncher

__all__ = ["Handle", "Launcher", "LocalLauncher"]
