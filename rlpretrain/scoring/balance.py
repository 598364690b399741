"""Move documents, with their groups, between ranks until all ranks have about the same cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from rlpretrain.ranks import Ranks
from rlpretrain.scoring.layout import Layout, Unit
from rlpretrain.scoring.packing import cost, families
from rlpretrain.types import Batch


def balance(batch: Batch, layout: Layout, ranks: Ranks) -> Batch:
    """This rank's batch after documents, with their groups, moved from loaded ranks to others.

    All ranks call it. Nothing moves while the largest load is within 5% of the mean. The loss does not
    change, because its denominators are counted over all ranks.
    """
    if ranks.size == 1:
        return batch
    units = families(batch)
    moves = plan_moves(ranks.gather([cost(unit, layout) for unit in units]))
    draws = Counter(document.id for document in batch.documents)
    repeats: list[list[Unit]] = []  # for each unit, a unit for each further draw of its document
    for unit in units:
        further = draws[unit.document.id] - 1 if unit.document is not None else 0
        repeats.append([Unit([], unit.document)] * further)
    if moves:
        leaving = {i: to for (rank, i), to in moves.items() if rank == ranks.rank}
        sent: list[tuple[int, Unit]] = []
        for i, to in leaving.items():
            sent += [(to, unit) for unit in (units[i], *repeats[i])]
        received = [unit for part in ranks.gather(sent) for to, unit in part if to == ranks.rank]
        staying = [i for i in range(len(units)) if i not in leaving]
        units = [units[i] for i in staying] + received
        repeats = [repeats[i] for i in staying]
    units = units + [unit for further_draws in repeats for unit in further_draws]
    groups = [group for unit in units for group in unit.groups]
    documents = [unit.document for unit in units if unit.document is not None]
    return replace(batch, groups=groups, documents=documents)


def plan_moves(costs: Sequence[Sequence[int]]) -> dict[tuple[int, int], int]:
    """(rank, unit) → the rank that the unit moves to, given the cost of each rank's units.

    A greedy plan, which moves few units.
    """
    owner = {(rank, i): rank for rank, own in enumerate(costs) for i in range(len(own))}
    loads = [sum(own) for own in costs]
    while max(loads) > 1.05 * sum(loads) / len(loads):
        most, least = loads.index(max(loads)), loads.index(min(loads))
        gap = loads[most] - loads[least]
        movable = [u for u, rank in owner.items() if rank == most and 0 < costs[u[0]][u[1]] < gap]
        if not movable:
            break
        unit = min(movable, key=lambda u: abs(2 * costs[u[0]][u[1]] - gap))
        owner[unit] = least
        loads[most] -= costs[unit[0]][unit[1]]
        loads[least] += costs[unit[0]][unit[1]]
    return {unit: rank for unit, rank in owner.items() if rank != unit[0]}
