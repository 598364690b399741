"""Training: the loop, the parts of a run, losses, checkpoints and backends."""
