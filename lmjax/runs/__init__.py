"""A run on disk and in memory: config, state, run directory, checkpoints, metrics."""
