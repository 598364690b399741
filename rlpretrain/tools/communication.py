"""The bytes that a rank of a planned run receives from other ranks in a step, from the settings and sizes.

Collectives are counted as rings: of n bytes on W ranks each receives n (W - 1) / W when they are gathered or
reduced to shards, and twice that when they are reduced on all ranks. Barriers, counts of losses and metrics
are a few bytes and left out. DeepSpeed's buckets are its own, so nothing is said about them.
"""

from __future__ import annotations

from typing import Any

import torch

from rlpretrain.config import PretrainConfig
from rlpretrain.objectives import Objective
from rlpretrain.tools.memory import Item, Sizes
from rlpretrain.tools.parameter_counts import count_tables
from rlpretrain.tools.sizes import count_step_tokens


def communication(
    config: PretrainConfig, objective: Objective, shape: Any, sizes: Sizes
) -> list[Item] | None:
    """What a rank receives in a step, each part with its formula; None where it is not known.

    T trained parameters, P all, E those outside layers, b bytes of one, W ranks, S of them share the weights,
    R replicas, M micro-batches.
    """
    if sizes.ranks == 1:
        return []
    trained = 4 * sizes.trained
    updates = config.loss.inner_epochs
    if sizes.backend == "torch":
        return [Item("sum of gradients", 2 * _ring(sizes.ranks) * trained * updates, "2 (W-1)/W 4 T")]
    if sizes.backend != "fsdp":
        return None
    replicas = config.policy.fsdp.replicas
    holders = sizes.ranks // replicas
    b = getattr(torch, config.model.dtype).itemsize
    whole, outside = b * sizes.parameters, b * count_tables(shape)
    micros = -(-count_step_tokens(config, objective, sizes.longest, sizes.ranks) // sizes.micro) * updates
    again = whole - outside if config.policy.fsdp.reshard else 0
    share, ring = "(S-1)/S", _ring(holders)
    gathered = f"M {share} b " + ("(2 P - E)" if again else "P")
    items = [
        Item("weights for forward and backward", micros * ring * (whole + again), gathered),
        Item("gradients to their shards", micros * ring * trained, f"M {share} 4 T"),
    ]
    if replicas > 1:
        between = 2 * _ring(replicas) * trained / holders
        items.append(Item("gradients between replicas", micros * between, "M 2 (R-1)/R 4 T / S"))
    for reader, reads in (("engine", objective.has_positions), ("baseline", config.baseline.name == "ema")):
        if reads:
            items.append(Item(f"weights for the {reader}", ring * whole, f"{share} b P"))
    return items


def _ring(ranks: int) -> float:
    """The share of a tensor that a rank receives in a ring of `ranks`."""
    return (ranks - 1) / ranks
