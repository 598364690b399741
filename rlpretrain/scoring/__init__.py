"""Pack groups and documents into micro-batches, and compute a model's log-probs in one forward."""

from rlpretrain.scoring.checks import check_head, check_model, check_tree
from rlpretrain.scoring.scorer import NoGradScorer, Scorer, score

__all__ = ["NoGradScorer", "Scorer", "check_head", "check_model", "check_tree", "score"]
