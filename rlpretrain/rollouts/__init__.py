"""Positions become groups: the thoughts that an engine samples before them, or those of a stored run."""
