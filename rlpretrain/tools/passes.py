"""How often a planned run reads the documents of each named source."""

from __future__ import annotations

from rlpretrain.config import PretrainConfig
from rlpretrain.data.document_source import count_documents
from rlpretrain.data.mixture import Mixture
from rlpretrain.objectives import Objective

PLACES = 1000
"""Places of the run at which weights are looked up."""


def count_passes(mixture: Mixture, config: PretrainConfig, objective: Objective) -> dict[str, str]:
    """Of each source the documents that the run draws, in words, with the passes where its length is known.

    Weights are those of the configuration: `data.mixing` changes them, and `exhausted` ends a source early.
    """
    steps = config.max_steps
    if steps is None:
        return {}
    thinks = objective.has_positions
    per_document = objective.config.positions_per_document if thinks else 1
    per_step = config.positions_per_step / per_document
    drawn = dict.fromkeys(mixture.sources, 0.0)
    places = min(steps, PLACES)
    for place in range(places):
        shares = mixture.document_shares(place / places)
        counted = [name for name in shares if not (thinks and config.data.sources[name].use == "read")]
        draws = per_step * steps / places / sum(shares[name] for name in counted)
        for name, share in shares.items():
            drawn[name] += share * draws
    return {name: _describe(number, count_documents(mixture.sources[name])) for name, number in drawn.items()}


def _describe(drawn: float, length: int | None) -> str:
    """Documents drawn, and passes."""
    documents = f"about {drawn:,.0f} documents"
    return documents if length is None else f"{documents} of {length:,}: {drawn / length:.3g} passes"
