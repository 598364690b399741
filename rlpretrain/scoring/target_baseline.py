"""Log-probs of the targets after the thoughts under the baseline's model: rewards that another model scores.

`baseline.name` names the model: the policy itself, the initial model, or a moving average. An objective may
show it another prompt than the policy's (`Objective.baseline_prompt`). Legend: see rlpretrain/types.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch

from rlpretrain.objectives.base import Objective
from rlpretrain.scoring.layout import Layout, Unit, lay_out
from rlpretrain.scoring.references import Baseline, Frozen
from rlpretrain.scoring.scorer import score
from rlpretrain.scoring.trunks import Trunks
from rlpretrain.types import Batch, MicroBatch, Scores, Totals
from rollout.types import Group


class TargetBaseline:
    """Fills in `Scores.target_baseline`, for objectives with need "target_baseline".

    Under the policy's own prompts the model reads the policy's rows, so equal models give equal numbers.
    Other prompts are laid out as rows of their own, without the documents. One forward for each micro-batch;
    none if the baseline is the policy.
    """

    def __init__(self, baseline: Baseline, objective: Objective, layout: Layout, *, autocast: bool = False):
        self.baseline, self.objective, self.autocast = baseline, objective, autocast
        self.layout = replace(layout, no_think_ids={}, whole_arms=False)

    @torch.no_grad()
    def __call__(self, scores: Scores, micro: MicroBatch) -> Scores:
        """The scores with log p(target | prompt, thought) [B, G, T] of the baseline's model."""
        if not isinstance(self.baseline, Frozen):
            return replace(scores, target_baseline=scores.target_logps.detach())
        device = next(self.baseline.model.parameters()).device
        precision = torch.autocast(device.type, torch.bfloat16) if self.autocast else nullcontext()
        with precision:
            own = score(self.baseline.scorer, self._as_read(micro).to(device))
        return replace(scores, target_baseline=own.target_logps.to(scores.target_logps.device))

    def _as_read(self, micro: MicroBatch) -> MicroBatch:
        """The micro-batch with the prompts that the baseline's model sees; itself if they do not differ."""
        groups = [self._shown(group) for group in micro.groups]
        if all(shown is group for shown, group in zip(groups, micro.groups, strict=True)):
            return micro
        units = [Unit([group], None) for group in groups]
        return lay_out(units, self.layout, Totals(1, 1, 1), Trunks.of(Batch(groups, ())))

    def _shown(self, group: Group) -> Group:
        """The group as the baseline's model sees it: its prompt, and nothing else of the document."""
        prompt = self.objective.baseline_prompt(group)
        if prompt == group.prompt:
            return group
        position = replace(group.position, context_ids=prompt.token_ids)
        return replace(group, prompt=prompt, position=position)
