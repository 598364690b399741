"""Log-probabilities become an update: the loop, the parts of a run, checkpoints, backends."""
