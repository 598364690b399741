"""What log p(target | context) is measured against: nothing, the current model, the initial model, or its moving average.

A baseline that is the same for all thoughts of a position cancels in RLP's leave-one-out advantage, so all four train the
same weights under plain RLP. It matters where gains are clipped or compared across positions, and in what is logged.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rlpretrain.config import BaselineConfig
from rlpretrain.scoring import Scorer
from rlpretrain.types import MicroBatch, Scores


class Baseline:
    """Fills in `Scores.baseline_logps`. This one is "self": the policy's own no-think log-probs, from the same forward."""

    def __call__(self, scores: Scores, micro: MicroBatch) -> Scores:
        return scores

    def update(self, policy: Any) -> None:
        """Called once after every applied optimizer step."""

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""


class NoBaseline(Baseline):
    """Zero: the reward is the target's log-probability itself."""

    def __call__(self, scores: Scores, micro: MicroBatch) -> Scores:
        return replace(scores, baseline_logps=torch.zeros_like(scores.baseline_logps))


class Frozen(Baseline):
    """A model that never changes, usually the initial one."""

    def __init__(self, model: nn.Module):
        self.model = model.requires_grad_(False).eval()
        self.scorer = Scorer(self.model)

    def __call__(self, scores: Scores, micro: MicroBatch) -> Scores:
        return replace(scores, baseline_logps=self.logps(micro))

    @torch.no_grad()
    def logps(self, micro: MicroBatch) -> Tensor:
        """log p(target | context) [B, T] under this model, without a thought."""
        device = next(self.model.parameters()).device
        ids, mask, rows = (t.to(device) for t in (micro.arm.input_ids, micro.arm.attention_mask, micro.arm.rows))
        seen = rows >= 0
        out = torch.zeros(seen.shape, device=device)
        if not seen.any():
            return out
        logps, _ = self.scorer(ids, mask, None, rows[seen], micro.target_labels.to(device)[seen])
        return out.masked_scatter(seen, logps)


class Ema(Frozen):
    """phi <- decay * phi + (1 - decay) * theta after each optimizer step (arXiv 2510.01265, algorithm 1).

    Kept in float32, where increments of 1 - decay do not vanish, and whole on every rank, whatever the ZeRO stage.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model.float())
        self.decay = decay

    @torch.no_grad()
    def update(self, policy: Any) -> None:
        shadow = dict(self.model.named_parameters(remove_duplicate=False))
        done: set[int] = set()
        for name, weight in policy.weights():
            mine = shadow[name]
            if id(mine) not in done:
                done.add(id(mine))
                mine.lerp_(weight.to(mine.device, torch.float32), 1 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self.model.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, p in self.model.named_parameters():
            p.copy_(state[name])


def make_baseline(config: BaselineConfig, initial: nn.Module) -> Baseline:
    """The baseline that `baseline.name` names; `initial` is copied where a copy is needed."""
    if config.name == "none":
        return NoBaseline()
    if config.name == "frozen":
        return Frozen(copy.deepcopy(initial))
    if config.name == "ema":
        return Ema(copy.deepcopy(initial), config.decay)
    return Baseline()
