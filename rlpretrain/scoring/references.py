"""What log p(target | context) is measured against: nothing, the current model, the initial model, or its
moving average.

A baseline that is the same for all thoughts of a position cancels in RLP's leave-one-out advantage, so all
four train the same weights under plain RLP. It matters where gains are clipped or compared across positions,
and in what is logged.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from rlpretrain.config import PretrainConfig
from rlpretrain.ranks import Ranks
from rlpretrain.scoring.scorer import NoGradScorer, score
from rlpretrain.types import MicroBatch, Scores


class Baseline:
    """Fills in `Scores.baseline_logps`. This one is "self": the policy's own no-think log-probs, from the
    same forward.
    """

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
    """A model that never changes, usually the initial one: a copy, or a trained model with its adapters off
    (`adapters_off`).

    Of documents that come again, in whole rows (`Layout.whole_arms`), up to `keep` log-probs stay: a rank
    reads each once.
    """

    def __init__(
        self, model: nn.Module, *, adapters_off: bool = False, keep: int = 0, ranks: Ranks | None = None
    ):
        self.model, self.keep, self.ranks = model, keep, ranks or Ranks()
        if not adapters_off:
            model.requires_grad_(False).eval()
        self.scorer = NoGradScorer(model, adapters_off)
        self.known: OrderedDict[bytes, Tensor] = OrderedDict()
        self.kept = 0

    def __call__(self, scores: Scores, micro: MicroBatch) -> Scores:
        return replace(scores, baseline_logps=self.logps(micro))

    @torch.no_grad()
    def logps(self, micro: MicroBatch) -> Tensor:
        """log p(target | context) [B, T] under this model, without a thought. Under ZeRO-3 all ranks call
        it together.
        """
        device = next(self.model.parameters()).device
        arm, seen = micro.arm, micro.arm.rows >= 0
        out = torch.zeros(seen.shape, device=device)
        if not self.keep:
            found = self._read(arm.input_ids, arm.attention_mask, arm.rows[seen], micro.target_labels[seen])
            return out.masked_scatter(seen.to(device), found)
        sizes = arm.attention_mask.sum(1).tolist()
        rows = [arm.input_ids[r, :n].cpu() for r, n in enumerate(sizes)]
        names = [blake2b(row.numpy().tobytes(), digest_size=16).digest() for row in rows]
        new = {name: r for r, name in enumerate(names) if name not in self.known}
        ids, mask = (t[list(new.values())] for t in (arm.input_ids, arm.attention_mask))
        inside = mask[:, 1:].bool()
        at = torch.arange(ids.numel(), device=ids.device).view(ids.shape)[:, :-1]
        found = self._read(ids, mask, at[inside], ids[:, 1:][inside]).cpu()
        here = {name: self.known[name] for name in names if name not in new}
        here |= zip(new, found.split([sizes[r] - 1 for r in new.values()]), strict=True)
        for name, logps in here.items():
            self._remember(name, logps)
        width = arm.input_ids.shape[1]
        values = (
            torch.stack([here[names[i // width]][i % width] for i in arm.rows[seen].tolist()])
            if seen.any()
            else found[:0]
        )
        return out.masked_scatter(seen.to(device), values.to(device))

    def _read(self, ids: Tensor, mask: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
        device = next(self.model.parameters()).device
        wanted = float(len(rows) > 0)
        if not (self.ranks.max([wanted])[0] if self.scorer.sharded else wanted):
            return torch.zeros(0, device=device)
        if not wanted:  # others have something to read, and need this rank's part of the weights
            ids, rows, labels = torch.zeros(1, 2, dtype=torch.int64), rows.new_zeros(1), rows.new_zeros(1)
            mask = torch.ones_like(ids)
        logps, _ = self.scorer(
            *(t.to(device) for t in (ids, mask)), None, *(t.to(device) for t in (rows, labels))
        )
        return logps if wanted else logps[:0]

    def _remember(self, name: bytes, logps: Tensor) -> None:
        """Keep what was used last."""
        if name in self.known:
            self.known.move_to_end(name)
            return
        self.known[name], self.kept = logps.clone(), self.kept + len(logps)
        while self.kept > self.keep:
            self.kept -= len(self.known.popitem(last=False)[1])


class Ema(Frozen):
    """phi <- decay * phi + (1 - decay) * theta after each optimizer step (arXiv 2510.01265, algorithm 1).

    Kept in float32, where increments of 1 - decay do not vanish, and whole on every rank, whatever the ZeRO
    stage.
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


class Reference:
    """Log-probs of trunk and thoughts under a frozen model: what objectives with need "reference" see.

    It scores the same rows as the policy, thoughts at the same temperature, so equal models give equal
    numbers.
    """

    def __init__(self, frozen: Frozen, temperature: float):
        self.frozen, self.temperature = frozen, temperature

    @torch.no_grad()
    def __call__(self, scores: Scores, micro: MicroBatch) -> Scores:
        """The scores with `trunk_reference` [M] and `thought_reference` [B, G, L]; one more forward."""
        device = next(self.frozen.model.parameters()).device
        own = score(self.frozen.scorer, micro.to(device), self.temperature)
        return replace(scores, trunk_reference=own.trunk_logps, thought_reference=own.thought_logps)


def make_references(
    config: PretrainConfig, initial: nn.Module, wanted: bool, again: bool, ranks: Ranks
) -> tuple[Frozen | None, Baseline]:
    """(the frozen initial model if it is `wanted` for what is logged, the baseline that `baseline.name`
    names).

    Called before the model gets adapters: with them it is its own frozen model, else that is one copy for
    both purposes. `again`: documents will come more than once, so their log-probs are worth keeping.
    """
    b, adapters_off, frozen = config.baseline, config.policy.lora is not None, None
    if wanted or b.name == "frozen":
        raw = (
            config.objective.get("no_think", "raw") == "raw"
        )  # then an arm is the document itself, wherever the position is
        keep = b.cache_tokens if again and raw and b.name == "frozen" else 0
        frozen = Frozen(
            initial if adapters_off else copy.deepcopy(initial),
            adapters_off=adapters_off,
            keep=keep,
            ranks=ranks,
        )
    if frozen and b.name == "frozen":
        return frozen, frozen
    named = {"none": NoBaseline, "self": Baseline, "ema": lambda: Ema(copy.deepcopy(initial), b.decay)}
    return frozen, named[b.name]()
