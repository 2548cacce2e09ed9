"""Trackers: copies of a run's curves for TensorBoard, Weights & Biases, MLflow and SwanLab.

The run's own event log has every metric, so a tracker is a convenience: `check_trackers` refuses one that is not
installed before anything trains, and whatever goes wrong later costs a warning, never the run.
"""

from .base import Options, Tracker
from .registry import TRACKERS, check_trackers, open_trackers

__all__ = ["TRACKERS", "Options", "Tracker", "check_trackers", "open_trackers"]
