"""How often an engine that waits for others says so."""

EVERY = 10.0
"""Seconds between two lines that say what is waited for."""
