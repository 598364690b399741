"""RMT: RPT with a budget for the thought and a curriculum from easy to hard positions (arXiv 2509.24375).

The instruction names a budget of B tokens that shrinks during the run,
B = max(least, floor(B0 * decay ** (t / T))), and a part of the reward is for a length near the budget:

    reward = (1 - w) match + w max(0, 1 - |length - B| / B)

Positions are easy, medium or hard by the entropy of the next token. Until the share `curriculum_from` of the
run all are easy, from `curriculum_to` on all are hard; in between the mixture moves evenly from easy over
medium to hard. The next-token loss leaves out the tokens before which the model thought. The paper weights
this loss by .1: set `loss.ntp_coef`.

Our choices where the paper is silent: w, the instruction's wording, three bands with RPT's bounds, the length
of the thought without its prediction. Pitfall: at the start, with a base model that predicts nothing right,
only the length has a reward; keep w small.
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
    """RPT's instruction in our words, with {budget} in place of the number of tokens."""
    budget: Count = 800
    """B0, tokens of a thought at the start."""
    budget_decay: Annotated[float, Field(gt=0, le=1)] = 0.2
    """The budget at the end of the run as a share of B0."""
    min_budget: Count = 1
    """Smallest budget."""
    length_weight: Share = 0.1
    """w, the share of the length in the reward. Our choice."""
    min_entropy: Amount = 0.5
    """Smallest entropy (nats) of the next token at a position."""
    bands: tuple[float, float] = (1.0, 1.5)
    """Entropies (nats) from which positions are medium and hard."""
    curriculum_from: Share = 0.3
    """Share of the run up to which all positions are easy."""
    curriculum_to: Share = 0.7
    """Share of the run from which all positions are hard; 0, with `curriculum_from` 0: no curriculum."""


class RMT(rpt.RPT):
    """Reward right predictions after thoughts of a shrinking length, at positions that get harder."""

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
        """B for the current batch."""
        c = self.config
        return max(c.min_budget, math.floor(c.budget * c.budget_decay**self.progress))

    def admitted(self, entropies: Tensor, rng: Any) -> Tensor:
        """The entropies of one band, which depends on the progress of the run; NaN elsewhere."""
        c, allowed = self.config, super().admitted(entropies, rng)
        if not c.curriculum_to:
            return allowed
        width = max(c.curriculum_to - c.curriculum_from, 1e-9)
        difficulty = 2 * min(1.0, max(0.0, (self.progress - c.curriculum_from) / width))
        band = math.floor(difficulty) + int(rng.random() < difficulty % 1)  # 0 easy, 1 medium, 2 hard
        low, high = (c.min_entropy, *c.bands, math.inf)[band : band + 2]
        return allowed.masked_fill(~((allowed >= low) & (allowed < high)), torch.nan)

    def prompt(self, position: Position) -> Prompt:
        """The instruction with the current budget."""
        budget = self.budget
        if budget not in self.templates:
            text = self.config.template.replace("{budget}", str(budget))
            self.templates[budget] = ThoughtPrompt(self.tokenizer, self.template.delimiters, text)
        return self.templates[budget](position)

    async def add_rewards(self, engine: Engine, groups: list[Group]) -> list[Group]:
        """RPT's rewards mixed with those for the lengths of the thoughts."""
        budget, w = self.budget, self.config.length_weight
        out = []
        for group in await super().add_rewards(engine, groups):
            rewards = []
            for thought, hit in zip(group.thoughts, group.rewards or (), strict=True):
                nearness = max(0.0, 1 - abs(_length(thought) - budget) / budget)
                rewards.append((1 - w) * hit + w * nearness)
            out.append(replace(group, rewards=tuple(rewards), extra={"budget": budget}))
        return out

    def ntp_weights(self, micro: MicroBatch, scores: Scores) -> Tensor:
        """Weights [M]: 0 for tokens before which the model thought, in this micro-batch or another."""
        weights = super().ntp_weights(micro, scores)
        left_out: list[bool] = []
        for document, indices in zip(micro.documents, micro.asked, strict=True):
            left_out += [i in indices for i in range(1, len(document.token_ids))]
        return weights.masked_fill(torch.tensor(left_out, dtype=torch.bool, device=weights.device), 0.0)


def _length(thought: Thought) -> int:
    """Tokens of a thought without its prediction."""
    return thought.answer_span[0] if thought.answer_span else len(thought.token_ids)


OBJECTIVE = RMT
