"""/v1/fine_tuning: jobs, events, checkpoints, permissions."""
