"""A strong control: next-token prediction on documents mixed with given reasoning traces.

Plain supervised training on such a mixture beat next-token and next-segment reasoning after RLVR at a
fraction of the compute (arXiv 2608.23256), so a gain of thinking before predicting has to exceed it. `data`
holds the documents, `ntp_data` the traces. Prompts with answers (`ntp_data.answer_column`) are trained on
their answers only, while the mean is still over all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from rlpretrain.objectives.ntp import NTP
from rlpretrain.types import MicroBatch, Scores


@dataclass(kw_only=True)
class Config:
    """The share of traces."""

    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of a step's documents that are traces (from `ntp_data`)."""


class SFTMixed(NTP):
    """Continue pretraining on documents and traces."""

    Config = Config
    needs = frozenset({"ntp_data"})

    def mix(self, documents: int) -> int:
        """How many of a step's documents come from `ntp_data`."""
        return min(documents - 1, max(1, round(self.config.share * documents)))

    def ntp_weights(self, micro: MicroBatch, scores: Scores) -> Tensor:
        """Weights [M]: 0 for the tokens of prompts, which are not to be learnt."""
        if not micro.documents:
            return super().ntp_weights(micro, scores)
        weights = [torch.arange(1, len(d.token_ids)) >= (d.answer_at or 0) for d in micro.documents]
        return torch.cat(weights).to(scores.trunk_logps)


OBJECTIVE = SFTMixed
