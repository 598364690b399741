"""Controlled corpora: made from a seed, with traces that can be verified step by step."""
