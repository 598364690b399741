"""Tree attention for Hugging Face models, through their attention interface: exact, at the cost of the tree.

Every token sees the path before its segment, and its segment up to itself. On a CPU the two parts are
computed apart (cpu.py); on a GPU the tree becomes a block mask of FlexAttention (flex.py).
"""

from rlpretrain.scoring.attention.interface import install, installed, placeholder, why_not

__all__ = ["install", "installed", "placeholder", "why_not"]
