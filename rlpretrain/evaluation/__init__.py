"""Numbers on held-out text, with their intervals."""
