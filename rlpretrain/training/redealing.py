"""Deal what the ranks of a checkpoint held to another number of ranks.

A document has a number in the order of draws over all ranks, and rank r of W draws the numbers r, r + W, ...
Ranks may stand at different places of that order. The new ranks begin at the first number that no rank has
drawn, and leave out the numbers after it that some rank has. So no document is lost or drawn twice. In a
mixture of sources the order of draws tells the rank of each (`Mixture`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlpretrain.config import ConfigError
from rlpretrain.data.mixture import Mixture

State = dict[str, Any]


def redeal(states: Sequence[State], rank: int, size: int, source: Any) -> State:
    """The state of `rank` among `size` ranks, from those of all ranks of a checkpoint (`run_state.save`).

    `source` is the run's source of batches. The cache of a reference model is not kept. Raises ConfigError
    where documents cannot be dealt again, and for an objective with state of its own.
    """
    if any(state.get("objective") for state in states):
        raise ConfigError(
            "this objective keeps state on each rank, which cannot be dealt to another number of ranks: "
            "resume on as many as before"
        )
    own = states[rank] if rank < len(states) else states[0]
    streams = (getattr(source, "stream", None), getattr(source, "ntp_stream", None))
    return {
        "source": deal_source([state["source"] for state in states], rank, size, *streams),
        "baseline": states[0]["baseline"],  # the same on every rank
        "rng": own["rng"],
        "reference": {},
        "objective": {},
    }


def deal_source(
    states: Sequence[State], rank: int, size: int, stream: Any = None, ntp_stream: Any = None
) -> State:
    """The state of a `BatchSource`: its cursor, and its part of the positions that wait.

    The streams are those of the new run; they are read where they are mixtures.
    """
    if "stream" not in states[0]:
        raise ConfigError("a replay is read by as many ranks as wrote it: resume on that many")
    first, is_first = states[0], rank == 0
    dealt = first | _deal_draws(states, "", rank, size, stream)
    dealt["spare"] = _deal_positions([row for state in states for row in state["spare"]], rank, size)
    waiting = [state.get("waiting", []) for state in states]
    dealt["waiting"] = _deal_waiting(waiting, rank, size) if isinstance(stream, Mixture) else []
    for counter in ("dropped", "without", "ntp_dropped"):
        if counter in first:
            dealt[counter] = sum(state[counter] for state in states) if is_first else 0
    dealt["by_stream"] = _summed([state.get("by_stream", {}) for state in states]) if is_first else {}
    if first["ntp_stream"] is not None:
        dealt |= _deal_draws(states, "ntp_", rank, size, ntp_stream)
    return dealt


def _deal_draws(states: Sequence[State], prefix: str, rank: int, size: int, stream: Any) -> State:
    """The cursor of `rank` in the documents of `data`, or with the prefix ntp_ in those of `ntp_data`."""
    if isinstance(stream, Mixture):
        return _deal_mixture(states, prefix, rank, size, stream)
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


def _deal_mixture(states: Sequence[State], prefix: str, rank: int, size: int, mixture: Mixture) -> State:
    """As `_deal_draws`: all ranks begin where the one furthest behind stood, and leave out what is drawn.

    Which rank has which draws follows from the order of the sources alone, which is drawn on from there.
    """
    cursors = [state[f"{prefix}stream"] for state in states]
    stands = [cursor["order"]["position"] for cursor in cursors]
    drawn = {number for state in states for number in state.get(f"{prefix}done", ())}
    start = cursors[stands.index(min(stands))]
    end = max([*stands, *(number + 1 for number in drawn)])
    mixture.load_state_dict(start)
    done: list[int] = []
    while mixture.position < end:
        turn, numbers = mixture.next_turn()
        is_drawn = numbers[0] < stands[turn % len(states)]
        if turn % size == rank:
            done += [number for number in numbers if is_drawn or number in drawn]
    mixture.load_state_dict(start)
    total = sum(state[f"{prefix}drawn"] for state in states)
    return {
        f"{prefix}stream": start | {"reached": end},
        f"{prefix}drawn": total if rank == 0 else 0,
        f"{prefix}done": done,
    }


def _deal_waiting(batches: Sequence[Sequence[State]], rank: int, size: int) -> list[State]:
    """What the batches of a mixture that were not taken have beside their positions, which wait too."""
    dealt = []
    for parts in zip(*batches, strict=True):
        documents = [document for part in parts for document in part["read_documents"]]
        dealt.append(parts[0] | {"read_documents": documents[rank::size]})
    return dealt


def _summed(counts: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, list[int]]:
    """The documents and tokens of each source, over all ranks."""
    total: dict[str, list[int]] = {}
    for name, (documents, tokens) in (item for part in counts for item in part.items()):
        before = total.get(name, [0, 0])
        total[name] = [before[0] + documents, before[1] + tokens]
    return total


def _move_cursor(cursor: Mapping[str, Any], first: int, rank: int, size: int) -> State:
    """The cursor of a `DocumentStream` whose documents before number `first` are drawn."""
    where = cursor.get("cursor")
    if not isinstance(where, Mapping) or set(where) != {"taken"}:
        raise ConfigError(
            "the documents of a stream or of a source of your own cannot be dealt to another number of "
            "ranks: resume on as many as before (what is one of data.sources can be dealt)"
        )
    identity = cursor["identity"] | {"rank": rank, "world_size": size}
    return {"identity": identity, "cursor": {"taken": len(range(rank, first, size))}}


def _deal_positions(rows: Sequence[Any], rank: int, size: int) -> list[Any]:
    """This rank's part of the positions that wait, in the order of draws; those of a draw stay together."""
    numbers = sorted({row["draw"] for row in rows})
    mine = set(numbers[rank::size])
    return sorted((row for row in rows if row["draw"] in mine), key=lambda row: row["draw"])
