"""Metrics, trackers, console output and warnings of a run."""
