"""Deal what the ranks of a checkpoint held to another number of ranks.

A document has a number in the order of draws over all ranks, and rank r of W draws the numbers r, r + W, ...
Ranks may stand at different places of that order. The new ranks begin at the first number that no rank has
drawn, and leave out the numbers after it that some rank has. So no document is lost or drawn twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlpretrain.config import ConfigError

State = dict[str, Any]


def redeal(states: Sequence[State], rank: int, size: int) -> State:
    """The state of `rank` among `size` ranks, from those of all ranks of a checkpoint (`run_state.save`).

    The cache of a reference model is not kept. Raises ConfigError where documents cannot be dealt again, and
    for an objective with state of its own.
    """
    if any(state.get("objective") for state in states):
        raise ConfigError(
            "this objective keeps state on each rank, which cannot be dealt to another number of ranks: "
            "resume on as many as before"
        )
    own = states[rank] if rank < len(states) else states[0]
    return {
        "source": deal_source([state["source"] for state in states], rank, size),
        "baseline": states[0]["baseline"],  # the same on every rank
        "rng": own["rng"],
        "reference": {},
        "objective": {},
    }


def deal_source(states: Sequence[State], rank: int, size: int) -> State:
    """The state of a `BatchSource`: its cursor, and its part of the positions that wait."""
    if "stream" not in states[0]:
        raise ConfigError("a replay is read by as many ranks as wrote it: resume on that many")
    first, is_first = states[0], rank == 0
    dealt = first | _deal_draws(states, "", rank, size)
    dealt["spare"] = _deal_positions([row for state in states for row in state["spare"]], rank, size)
    dealt["waiting"] = []  # their positions wait too
    for counter in ("dropped", "without", "ntp_dropped"):
        if counter in first:
            dealt[counter] = sum(state[counter] for state in states) if is_first else 0
    dealt["by_stream"] = {}
    if first["ntp_stream"] is not None:
        dealt |= _deal_draws(states, "ntp_", rank, size)
    return dealt


def _deal_draws(states: Sequence[State], prefix: str, rank: int, size: int) -> State:
    """The cursor of `rank` in the documents of `data`, or with the prefix ntp_ in those of `ntp_data`."""
    before = len(states)
    stands = [r + state[f"{prefix}drawn"] * before for r, state in enumerate(states)]
    ahead = {number for state in states for number in state.get(f"{prefix}done", ())}
    first = min(stands)
    while first in ahead or first < stands[first % before]:
        first += 1
    for r, stand in enumerate(stands):
        ahead.update(range(r, stand, before)[max(0, -(-(first - r) // before)) :])
    return {
        f"{prefix}stream": _move_cursor(states[0][f"{prefix}stream"], first, rank, size),
        f"{prefix}drawn": len(range(rank, first, size)),
        f"{prefix}done": sorted(number for number in ahead if number > first and number % size == rank),
    }


def _move_cursor(cursor: Mapping[str, Any], first: int, rank: int, size: int) -> State:
    """The cursor of a `DocumentStream` whose documents before number `first` are drawn."""
    where = cursor.get("cursor")
    if not isinstance(where, Mapping) or set(where) != {"taken"}:
        raise ConfigError(
            "the documents of a stream, of several sources or of a source of your own cannot be dealt to "
            "another number of ranks: resume on as many as before"
        )
    identity = cursor["identity"] | {"rank": rank, "world_size": size}
    return {"identity": identity, "cursor": {"taken": len(range(rank, first, size))}}


def _deal_positions(rows: Sequence[Any], rank: int, size: int) -> list[Any]:
    """This rank's part of the positions that wait, in the order of draws; those of a draw stay together."""
    numbers = sorted({row["draw"] for row in rows})
    mine = set(numbers[rank::size])
    return sorted((row for row in rows if row["draw"] in mine), key=lambda row: row["draw"])
