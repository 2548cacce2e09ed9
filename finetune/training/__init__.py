"""The trainer process: model, batches, loop, checkpoints, trackers."""
