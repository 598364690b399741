"""RMT: RPT with a budget for the thought and a curriculum from easy to hard places (arXiv 2509.24375).

The instruction names a budget of B tokens that shrinks as the run goes on, B = max(least, floor(B0 * decay **
(t / T))), and a thought earns a share for coming near it:

    reward = (1 - w) match + w max(0, 1 - |length - B| / B)

Places to think are easy, middling or hard by the entropy of the next token. Until `curriculum_from` of the
run all are easy, from `curriculum_to` on all are hard; in between the share moves evenly from easy over
middling to hard. The next-token loss leaves out the tokens that were thought about; the paper weighs it by
.1: set `loss.ntp_coef`.

Ours where the paper is silent: w, the instruction's words, three bands with RPT's bounds, the length of the
thought without its prediction. Pitfall: early on, with a base that hits nothing, the length is all there is
to earn; keep w small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from rlpretrain.config import Amount, ConfigError, Count
from rlpretrain.objectives import rpt
from rlpretrain.prompts import ThoughtPrompt
from rlpretrain.types import MicroBatch, Scores
from rollout.engine import Engine
from rollout.types import Group, Position, Prompt, Thought

Share = Annotated[float, Field(ge=0, le=1)]
TEMPLATE = rpt.TEMPLATE.replace("### Context", "Use about {budget} tokens for the thought.\n\n### Context")


@dataclass(kw_only=True)
class Config(rpt.Config):
    """RMT's own fields."""

    template: str = TEMPLATE
    """RPT's instruction in our words, with {budget} where its number is to stand."""
    budget: Count = 800
    """B0, tokens of a thought at the start."""
    budget_decay: Annotated[float, Field(gt=0, le=1)] = 0.2
    """What is left of it at the end, as a share."""
    min_budget: Count = 1
    """Smallest budget."""
    length_weight: Share = 0.1
    """w, share of the reward that is for the length. Our choice."""
    min_entropy: Amount = 0.5
    """Nats below which a place is not thought about at all."""
    bands: tuple[float, float] = (1.0, 1.5)
    """Nats where middling and hard places begin."""
    curriculum_from: Share = 0.3
    """Share of the run up to which all places are easy."""
    curriculum_to: Share = 0.7
    """Share from which all are hard; with `curriculum_from`, 0 takes places as they come."""


class RMT(rpt.RPT):
    """Reward right predictions after thoughts of a shrinking length, at places that get harder."""

    Config = Config

    def __init__(self, config: Any, tokenizer: Any):
        if not config.min_entropy <= config.bands[0] <= config.bands[1]:
            raise ConfigError(
                f"objective.bands {list(config.bands)} must rise from min_entropy ({config.min_entropy})"
            )
        if config.curriculum_from > config.curriculum_to:
            raise ConfigError("objective.curriculum_from comes after curriculum_to")
        super().__init__(config, tokenizer)
        self.templates: dict[int, ThoughtPrompt] = {}

    @property
    def budget(self) -> int:
        """B for the batch at hand."""
        c = self.config
        return max(c.min_budget, math.floor(c.budget * c.budget_decay**self.progress))

    def admitted(self, entropies: Tensor, rng: Any) -> Tensor:
        """The entropies of one band, which depends on how far the run is; NaN elsewhere."""
        c, found = self.config, super().admitted(entropies, rng)
        if not c.curriculum_to:
            return found
        width = max(c.curriculum_to - c.curriculum_from, 1e-9)
        place = 2 * min(
            1.0, max(0.0, (self.progress - c.curriculum_from) / width)
        )  # 0 easy, 1 middling, 2 hard
        band = math.floor(place) + int(rng.random() < place % 1)
        low, high = (c.min_entropy, *c.bands, math.inf)[band : band + 2]
        return found.masked_fill(~((found >= low) & (found < high)), torch.nan)

    def prompt(self, position: Position) -> Prompt:
        """The instruction with the present budget."""
        budget = self.budget
        if budget not in self.templates:
            text = self.config.template.replace("{budget}", str(budget))
            self.templates[budget] = ThoughtPrompt(self.tokenizer, self.template.delimiters, text)
        return self.templates[budget](position)

    async def add_rewards(self, engine: Engine, groups: list[Group]) -> list[Group]:
        """RPT's, with what the thoughts' lengths earn."""
        budget, w = self.budget, self.config.length_weight
        groups = await super().add_rewards(engine, groups)
        return [
            replace(
                g,
                rewards=tuple(
                    (1 - w) * hit + w * max(0.0, 1 - abs(_length(t) - budget) / budget)
                    for t, hit in zip(g.thoughts, g.rewards or (), strict=True)
                ),
                extra={"budget": budget},
            )
            for g in groups
        ]

    def ntp_weights(self, micro: MicroBatch, scores: Scores) -> Tensor:
        """Weights [M]: 0 where a token was thought about, whatever micro-batch the thoughts are in."""
        weights = super().ntp_weights(micro, scores)
        drawn = zip(micro.documents, micro.asked, strict=True)
        asked = [i in places for document, places in drawn for i in range(1, len(document.token_ids))]
        return weights.masked_fill(torch.tensor(asked, dtype=torch.bool, device=weights.device), 0.0)


def _length(thought: Thought) -> int:
    """Tokens of a thought without its prediction."""
    return thought.answer_span[0] if thought.answer_span else len(thought.token_ids)


OBJECTIVE = RMT
