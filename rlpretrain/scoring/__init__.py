"""Groups and documents are packed into micro-batches, and a model's log-probabilities are read off one
forward.
"""

from rlpretrain.scoring.checks import check_head, check_model, check_tree
from rlpretrain.scoring.scorer import NoGradScorer, Scorer, score

__all__ = ["NoGradScorer", "Scorer", "check_head", "check_model", "check_tree", "score"]
