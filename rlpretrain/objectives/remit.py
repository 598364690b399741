"""ReMiT: next-token prediction weighted by what an RL-tuned model prefers (arXiv 2602.03075).

A reference model (`reference.path`) that was tuned by RL from the same base says which tokens of a document
serve reasoning. With its log-ratio Δ_t = log p_ref(x_t) − log p(x_t) and the document's mean Δ̄,

    w_t = clip(2 σ(s · (Δ_t − Δ̄)), 1 − ε, 1 + ε)        L = Σ_t w_t · −log p_θ(x_t),

where p is the learner itself (`against: live`) or the initial model (`against: base`). The weights carry no
gradient. To first order this is next-token prediction plus a policy gradient on the document's own tokens,
with advantage (s / 2)(Δ_t − Δ̄).

We read the abstract and summaries of the paper, not its whole text. Our choices: s, ε, the form of the clip,
and `against` (summaries name both). A long text that is split into several documents has a mean in each.

Equal models, s = 0 or ε = 0 give weights of exactly 1: `ntp`. Two controls: `weights: top_k` trains on the
tokens with the largest Δ alone, as Rho-1 does (arXiv 2404.07965), but selects within a document instead of a
batch; `shuffled` gives each document its own weights in a random order. A weighting that helps must beat it.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from rlpretrain.objectives.ntp import NTP
from rlpretrain.types import Document, MicroBatch, Scores


@dataclass(kw_only=True)
class Config:
    """The weights of the next-token loss. All defaults are our choice."""

    against: Literal["live", "base"] = "live"
    """What the reference is compared with. live: the learner at this step, so that weights approach 1 where
    it has caught up. base: the initial model, so that a token's weight stays; one more forward.
    """
    weights: Literal["sigmoid", "top_k"] = "sigmoid"
    """sigmoid: ReMiT. top_k: only the tokens with the largest differences, with equal weights (Rho-1)."""
    scale: Annotated[float, Field(ge=0)] = 1.0
    """s, the steepness of the sigmoid, per nat."""
    clip: Annotated[float, Field(ge=0, le=1)] = 0.5
    """ε: weights stay within 1 − ε and 1 + ε."""
    top_fraction: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Share of a document's tokens that `top_k` trains on; tokens as large as the last of them count too."""
    normalise: Literal["none", "document"] = "none"
    """document: divide by the mean weight of the document, so that no document has a larger step."""
    shuffled: bool = False
    """Control: the weights of a document in a random order, another one at each step."""


class ReMiT(NTP):
    """Continue pretraining, with weights from a reference model."""

    Config = Config
    needs = frozenset({"reference", "second_model"})

    def __init__(self, config: Any, tokenizer: Any):
        super().__init__(config, tokenizer)
        if config.against == "base":
            self.needs = self.needs | {"initial"}

    def ntp_weights(self, micro: MicroBatch, scores: Scores) -> Tensor:
        """Weights [M], the same however documents are packed; no gradient."""
        other = scores.trunk_initial if self.config.against == "base" else scores.trunk_logps.detach()
        assert scores.trunk_reference is not None and other is not None, "the run provides what is needed"
        if not micro.documents:
            return super().ntp_weights(micro, scores)
        difference = scores.trunk_reference.double() - other.double()
        sizes = [len(document.token_ids) - 1 for document in micro.documents]
        parts = zip(micro.documents, difference.split(sizes), strict=True)
        return torch.cat([self._weigh(document, part) for document, part in parts]).to(scores.trunk_logps)

    def _weigh(self, document: Document, difference: Tensor) -> Tensor:
        """Weights [n] of a document's predicted tokens, from log p_ref − log p [n] in float64."""
        make = self._select if self.config.weights == "top_k" else self._soften
        weights = make(difference)
        if self.config.normalise == "document":
            weights = weights / weights.mean()
        return weights[self._order(document).to(weights.device)] if self.config.shuffled else weights

    def _soften(self, difference: Tensor) -> Tensor:
        centred = difference - difference.mean()
        weights = 2 * torch.sigmoid(self.config.scale * centred)
        return weights.clamp(1 - self.config.clip, 1 + self.config.clip)

    def _select(self, difference: Tensor) -> Tensor:
        """Rho-1's hard selection, with a mean weight of 1; ties at the threshold are all selected."""
        k = max(1, round(self.config.top_fraction * len(difference)))
        selected = difference >= difference.topk(k).values[-1]
        return selected * (len(difference) / selected.sum())

    def _order(self, document: Document) -> Tensor:
        """A random order of the document's predicted tokens: the same on any rank and after a resume."""
        ids = np.asarray(document.token_ids, np.int64).tobytes()
        seed = blake2b(ids + np.float64(self.progress).tobytes(), digest_size=8).digest()
        generator = np.random.default_rng(int.from_bytes(seed, "little"))
        return torch.from_numpy(generator.permutation(len(document.token_ids) - 1))


OBJECTIVE = ReMiT
