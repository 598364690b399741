"""Kept for scripts that import it: the module is `rlpretrain.config.io`."""

from rlpretrain.config.io import apply_overrides, build, describe, load, parse, read_mapping, to_dict

__all__ = ["apply_overrides", "build", "describe", "load", "parse", "read_mapping", "to_dict"]
