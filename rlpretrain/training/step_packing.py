"""Pack a step's batch into micro-batches: balance ranks, pack, compare with padded rows once."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rlpretrain.config import ConfigError
from rlpretrain.scoring.balance import balance
from rlpretrain.scoring.checks import check_tree
from rlpretrain.scoring.groups import micro_batches, no_think_contexts
from rlpretrain.scoring.layout import Layout
from rlpretrain.training.soft_targets import add_soft_targets
from rlpretrain.training.tag_gain import gains_of_empty_thoughts
from rlpretrain.types import Batch, MicroBatch, Totals

if TYPE_CHECKING:
    from rlpretrain.training.run import Run


def pack_step(run: Run, batch: Batch, totals: Totals) -> list[MicroBatch]:
    """The micro-batches of this rank: as many on every rank, of about the same cost. All ranks call it.

    Raises ConfigError where a group is split and the objective needs whole groups.
    """
    batch = balance(batch, run.layout, run.ranks)
    contexts = no_think_contexts(run.objective, batch.groups)
    layout = replace(run.layout, no_think_ids=contexts)
    version = run.engine.version
    on_policy = run.engine.info.shares_weights and all(g.policy_version == version for g in batch.groups)
    micros = micro_batches(batch, layout, run.ranks, totals)
    micros = [replace(micro, on_policy=on_policy) for micro in micros]
    run.has_split_groups = _any_split(run, micros)
    if run.has_split_groups and "group" in run.objective.needs:
        raise ConfigError(
            "a group is larger than token_budget, and this objective's loss needs all of its thoughts at "
            f"once: raise token_budget ({run.config.token_budget})"
        )
    run.metrics.add("batch/micro_batches", len(micros))
    if run.measures_frozen() and run.frozen is not None and layout.target:
        gains = gains_of_empty_thoughts(run.policy.score, run.frozen, batch, layout, run.ranks)
        run.metrics.add("ig/empty", gains)
    if layout.tree and "tree_difference" not in run.facts:
        _compare_with_padded(run, micros[0], layout, totals)
    return add_soft_targets(run, micros)


def _any_split(run: Run, micros: list[MicroBatch]) -> bool:
    """Whether some rank has a group that is split over micro-batches."""
    local_split = any(offset for micro in micros for offset in micro.offsets)
    return bool(run.ranks.max([float(local_split)])[0])


def _compare_with_padded(run: Run, micro: MicroBatch, layout: Layout, totals: Totals) -> None:
    """Check the tree layout against padded rows, once in a process.

    The tokens of the check do not count as spent, because a resumed run checks again.
    """
    spent = replace(run.policy.scorer.reads)
    difference = check_tree(run.policy, micro, layout, totals, run.ranks, run.half)
    run.policy.scorer.reads = spent
    run.facts["tree_difference"] = difference
    how = " on average" if run.half else ""
    run.console.say(f"packed trees and padded rows agree to {difference:.1e} nats{how}")
