"""The gain of an empty thought, measured during a run.

A gain that an empty thought also has does not come from thinking: the model has learnt which tokens follow
the close tag.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlpretrain.evaluation.evaluate import contrast
from rlpretrain.ranks import Ranks
from rlpretrain.scoring.groups import ScoreFunction, micro_batches, score_batch
from rlpretrain.scoring.packing import Layout
from rlpretrain.scoring.references import Frozen
from rlpretrain.types import Batch


def gains_of_empty_thoughts(
    score: ScoreFunction, frozen: Frozen, batch: Batch, layout: Layout, ranks: Ranks
) -> Tensor:
    """log p(target | context, empty thought) − log p(target | context) [P] in nats.

    The second term is the frozen model's. P are this rank's positions with something between thought and
    target, a close tag at least. All
    ranks call it together.
    """
    groups = contrast([g for g in batch.groups if g.prompt.close_ids or g.prompt.join_ids], "empty")
    documents = batch.documents if groups else ()
    micros = micro_batches(Batch(groups, documents), layout, ranks)
    scored = score_batch(score, micros, ranks.device, reference=frozen).groups
    gains = [scores.joint_target - scores.joint_baseline for scores in scored.values()]
    return torch.cat(gains) if gains else torch.zeros(0, dtype=torch.float64)
