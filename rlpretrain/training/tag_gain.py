"""What the tags of a thought are worth by themselves: the gain of a thought without content, measured while a run goes on.

A gain that an empty thought has as well says nothing about thinking: the model has learnt what comes after the close tag.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rlpretrain.ranks import Ranks
from rlpretrain.scoring.packing import Layout, count, idle, pack
from rlpretrain.scoring.references import Frozen
from rlpretrain.types import Batch, MicroBatch, Scores
from rollout.types import FinishReason, Group, Thought


def empty_thought(group: Group) -> Group:
    """The group with a single thought that is its close tag alone."""
    close = group.prompt.close_ids
    thought = Thought(close, (0.0,) * len(close), FinishReason.CLOSE, group.policy_version, 0)
    return replace(group, thoughts=(thought,), rewards=None)


@torch.no_grad()
def gains_of_empty_thoughts(
    score: Callable[[MicroBatch], Scores], frozen: Frozen, batch: Batch, layout: Layout, ranks: Ranks
) -> Tensor:
    """log p(target | context, empty thought) − log p(target | context) [P] in nats, the second under the frozen model.

    P are the positions of this rank whose prompts have a close tag. All ranks call it together.
    """
    groups = tuple(empty_thought(group) for group in batch.groups if group.prompt.close_ids)
    if groups:
        batch = Batch(groups, batch.documents)
        micros = list(pack(batch, layout, count(batch, layout.cut)))
    else:
        micros = []
    most = int(ranks.max([float(len(micros))])[0])
    micros += [idle(layout.pad_id)] * (most - len(micros))
    gains = []
    for micro in micros:
        micro = micro.to(ranks.device)
        scores = score(micro)
        base = frozen.logps(micro)
        if micro.groups:
            gain = (scores.target_logps[:, 0] - base) * micro.target_mask
            gains.append(gain.sum(-1).double().cpu())
    return torch.cat(gains) if gains else torch.zeros(0, dtype=torch.float64)
