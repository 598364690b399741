"""What the tags of a thought are worth by themselves: the gain of a thought without content, measured while a
run goes on.

A gain that an empty thought has as well says nothing about thinking: the model has learnt what comes after
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
    """log p(target | context, empty thought) − log p(target | context) [P] in nats, the second under the
    frozen model.

    P are the positions of this rank whose prompts have a close tag. All ranks call it together.
    """
    groups = contrast([group for group in batch.groups if group.prompt.close_ids], "empty")
    documents = batch.documents if groups else ()
    micros = micro_batches(Batch(groups, documents), layout, ranks)
    found = score_batch(score, micros, ranks.device, reference=frozen).groups
    gains = [scores.joint_target - scores.joint_baseline for scores in found.values()]
    return torch.cat(gains) if gains else torch.zeros(0, dtype=torch.float64)
