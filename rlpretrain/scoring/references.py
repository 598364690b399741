"""Baselines: the no-think log-probs that a thought's log-probs are compared with.

They are 0, or come from the current model, the initial model, or a moving average. A baseline that is the
same for all thoughts of a position cancels in RLP's leave-one-out advantage, so all four train the same
weights under plain RLP. It matters where gains are clipped or compared across positions, and in the log.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rlpretrain.config import PretrainConfig
from rlpretrain.models.averages import move_towards
from rlpretrain.ranks import Ranks
from rlpretrain.scoring.logp_cache import LogpCache, digest, keys_of
from rlpretrain.scoring.scorer import NoGradScorer, score
from rlpretrain.types import Arm, MicroBatch, Scores


class Baseline:
    """Fills in `Scores.baseline_logps`.

    This class is the baseline "self": the policy's own no-think log-probs, from the same forward.
    """

    def __call__(self, scores: Scores, micro: MicroBatch) -> Scores:
        return scores

    def update(self, policy: Any) -> None:
        """Called once after every applied optimizer step."""

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""


class NoBaseline(Baseline):
    """Zero: the reward is the target's log-probability itself."""

    def __call__(self, scores: Scores, micro: MicroBatch) -> Scores:
        return replace(scores, baseline_logps=torch.zeros_like(scores.baseline_logps))


class Frozen(Baseline):
    """A model that never changes, usually the initial one.

    It is a copy, or the trained model with its adapters off (`adapters_off`). Up to `keep` log-probs of whole
    documents (`Layout.whole_arms`) are cached, so that a rank scores a document that repeats only once.
    """

    def __init__(
        self, model: nn.Module, *, adapters_off: bool = False, keep: int = 0, ranks: Ranks | None = None
    ):
        self.model, self.keep, self.ranks = model, keep, ranks or Ranks()
        if not adapters_off:
            model.requires_grad_(False).eval()
        self.scorer = NoGradScorer(model, adapters_off)
        self.cache = LogpCache(keep)

    def __call__(self, scores: Scores, micro: MicroBatch) -> Scores:
        return replace(scores, baseline_logps=self.logps(micro))

    @torch.no_grad()
    def logps(self, micro: MicroBatch) -> Tensor:
        """log p(target | context) [B, T] under this model, without a thought.

        Under ZeRO-3 all ranks call it together.
        """
        device = next(self.model.parameters()).device
        arm, seen = micro.arm, micro.arm.rows >= 0
        out = torch.zeros(seen.shape, device=device)
        if self.keep:
            values = self._cached_logps(arm, arm.rows[seen])
        else:
            labels = micro.target_labels[seen]
            values = self._score_rows(arm.input_ids, arm.attention_mask, arm.rows[seen], labels)
        return out.masked_scatter(seen.to(device), values.to(device))

    def _cached_logps(self, arm: Arm, rows: Tensor) -> Tensor:
        """The log-probs at `rows` of an arm of whole documents; scores only documents not in the cache."""
        sizes = arm.attention_mask.sum(1).tolist()
        documents = [arm.input_ids[r, :size].cpu() for r, size in enumerate(sizes)]
        keys = [digest(ids.numpy()) for ids in documents]
        new = {key: r for r, key in enumerate(keys) if key not in self.cache}
        new_rows = list(new.values())
        ids, mask = arm.input_ids[new_rows], arm.attention_mask[new_rows]
        inside = mask[:, 1:].bool()
        at = torch.arange(ids.numel(), device=ids.device).view(ids.shape)[:, :-1]
        scored = self._score_rows(ids, mask, at[inside], ids[:, 1:][inside]).cpu()
        logps_of = {key: self.cache[key] for key in keys if key not in new}
        logps_of |= zip(new, scored.split([sizes[r] - 1 for r in new_rows]), strict=True)
        for key, logps in logps_of.items():
            self.cache.add(key, logps)
        if not len(rows):
            return scored[:0]
        width = arm.input_ids.shape[1]
        return torch.stack([logps_of[keys[i // width]][i % width] for i in rows.tolist()])

    def _score_rows(self, ids: Tensor, mask: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
        """Log-probs [K] of `labels` at `rows`. Under ZeRO-3 all ranks call it together."""
        device = next(self.model.parameters()).device
        has_rows = len(rows) > 0
        ranks_with_rows = self.ranks.max([float(has_rows)])[0] if self.scorer.sharded else float(has_rows)
        if not ranks_with_rows:
            return torch.zeros(0, device=device)
        if not has_rows:  # other ranks score rows, and need this rank's part of the weights
            ids, rows, labels = torch.zeros(1, 2, dtype=torch.int64), rows.new_zeros(1), rows.new_zeros(1)
            mask = torch.ones_like(ids)
        logps, _ = self.scorer(ids.to(device), mask.to(device), None, rows.to(device), labels.to(device))
        return logps if has_rows else logps[:0]


class Ema(Frozen):
    """phi <- decay * phi + (1 - decay) * theta after each optimizer step (arXiv 2510.01265, algorithm 1).

    It is kept in float32, where increments of 1 - decay do not vanish, and whole on every rank at every ZeRO
    stage.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model.float())
        self.decay = decay

    def update(self, policy: Any) -> None:
        averages = dict(self.model.named_parameters(remove_duplicate=False))
        move_towards(averages, policy.weights(), 1 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self.model.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, p in self.model.named_parameters():
            p.copy_(state[name])


class Reference:
    """Log-probs of trunk and thoughts under a frozen model, for objectives with need "reference".

    It scores the same rows as the policy, with the same packing and precision, and thoughts at the same
    temperature, so equal models give equal numbers. With `keep` it caches up to so many log-probs of whole
    documents and thoughts. A micro-batch that is cached as a whole is not scored; any other is scored as a
    whole, in the policy's rows.

    `initial` scores the trunk with the initial model too, for objectives with need "initial". With
    `only_teaches` it adds no log-probs to the scores: it is there for `Teacher`.
    """

    def __init__(
        self,
        frozen: Frozen,
        temperature: float,
        *,
        keep: int = 0,
        autocast: bool = False,
        initial: Reference | None = None,
    ):
        self.initial, self.only_teaches = initial, False
        self.frozen, self.temperature, self.autocast = frozen, temperature, autocast
        self.cache = LogpCache(keep) if keep else None
        self.cached = self.asked = 0
        """Log-probs taken from the cache, and all, since the last `take_counts`."""

    def __call__(self, scores: Scores, micro: MicroBatch) -> Scores:
        """The scores with `trunk_reference` [M], `thought_reference` [B, G, L] and `trunk_initial` [M].

        At most one forward of each model.
        """
        if self.only_teaches:
            return scores
        trunk, thoughts = self.logps(micro)
        scores = replace(scores, trunk_reference=trunk, thought_reference=thoughts)
        if self.initial is None:
            return scores
        initial = trunk if self.initial is self else self.initial.logps(micro)[0]
        return replace(scores, trunk_initial=initial)

    @torch.no_grad()
    def logps(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probs of the trunk [M] and of the thoughts [B, G, L]."""
        device = next(self.frozen.model.parameters()).device
        micro = replace(micro.to(device), soft_ids=None, soft_probs=None)
        keys, inside = [], micro.thought_mask
        if self.cache is not None:
            keys = keys_of(micro)
            if (known := self.known(keys)) is not None:
                both = torch.cat([*known, torch.zeros(0)]).to(device)
                trunk, thoughts = both.split([len(micro.trunk_rows), len(both) - len(micro.trunk_rows)])
                blank = torch.zeros(inside.shape, dtype=both.dtype, device=device)
                return trunk, blank.masked_scatter(inside, thoughts)
        with self.precision(device):
            own = score(self.frozen.scorer, micro, self.temperature)
        if self.cache is not None:
            sizes = [len(document.token_ids) - 1 for document in micro.documents]
            sizes += inside.sum(-1)[inside.any(-1)].tolist()
            both = torch.cat([own.trunk_logps, own.thought_logps[inside]]).cpu()
            self.asked += len(both)
            for key, logps in zip(keys, both.split(sizes), strict=True):
                self.cache.add(key, logps)
        return own.trunk_logps, own.thought_logps

    def take_counts(self) -> tuple[int, int]:
        """(log-probs taken from the cache, all log-probs) since the last call."""
        counts, self.cached, self.asked = (self.cached, self.asked), 0, 0
        return counts

    def state_dict(self) -> dict[str, Any]:
        """The cache: its values come from the rows in which a text was scored first."""
        state = {} if self.cache is None else {"cache": self.cache.state_dict()}
        if self.initial is None or self.initial is self:
            return state
        return state | {"initial": self.initial.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if self.cache is not None and "cache" in state:
            self.cache.load_state_dict(state["cache"])
        if self.initial is not None and "initial" in state:
            self.initial.load_state_dict(state["initial"])

    def known(self, keys: list[str]) -> list[Tensor] | None:
        """The cached log-probs of all keys. Under ZeRO-3 all ranks score a micro-batch, or none does."""
        assert self.cache is not None
        missing = float(any(key not in self.cache for key in keys))
        if self.frozen.scorer.sharded:
            missing = self.frozen.ranks.max([missing])[0]
        if missing:
            return None
        known = self.cache.take(keys)
        assert known is not None, "none is missing"
        number = sum(map(len, known))
        self.cached, self.asked = self.cached + number, self.asked + number
        return known

    def precision(self, device: torch.device) -> AbstractContextManager[Any]:
        """The policy's autocast."""
        return torch.autocast(device.type, torch.bfloat16) if self.autocast else nullcontext()


def make_references(
    config: PretrainConfig, initial: nn.Module, wanted: bool, again: bool, ranks: Ranks
) -> tuple[Frozen | None, Baseline]:
    """(the frozen initial model or None, the baseline that `baseline.name` names).

    The frozen model is made if it is the baseline, or if it is `wanted` for other uses. Called before the
    model gets adapters: a model with adapters is its own frozen model, else a copy serves both purposes.
    `again`: documents will repeat, so their log-probs are worth caching.
    """
    settings, adapters_off, frozen = config.baseline, config.policy.lora is not None, None
    is_baseline = settings.name == "frozen"
    if wanted or is_baseline:
        # the raw arm is the document itself, the same at every position
        is_raw = config.objective.get("no_think", "raw") == "raw"
        keep = settings.cache_tokens if again and is_raw and is_baseline else 0
        model = initial if adapters_off else copy.deepcopy(initial)
        frozen = Frozen(model, adapters_off=adapters_off, keep=keep, ranks=ranks)
    if frozen is not None and is_baseline:
        return frozen, frozen
    if settings.name == "ema":
        return frozen, Ema(copy.deepcopy(initial), settings.decay)
    return frozen, NoBaseline() if settings.name == "none" else Baseline()


def make_reference(
    config: PretrainConfig,
    needs: frozenset[str],
    initial: Frozen | None,
    second: nn.Module | None,
    policy: Any,
    again: bool,
) -> Reference | None:
    """The reference or teacher that these needs ask for: the model of `reference.path`, or the initial one.

    `again`: the same texts will be scored more than once, so their log-probs are worth caching.
    """
    if not {"reference", "teacher"} & needs:
        return None
    keep = config.reference.cache_tokens if again and second is not None else 0
    temperature, autocast = config.sampling.temperature, getattr(policy, "autocast", False)
    of_initial, only_teaches = None, "reference" not in needs
    if initial is not None and (second is None or "initial" in needs):
        of_initial = Reference(initial, temperature, keep=keep, autocast=autocast)
    if second is not None:
        reference = Reference(Frozen(second), temperature, keep=keep, autocast=autocast, initial=of_initial)
        reference.only_teaches = only_teaches
        return reference
    assert of_initial is not None, "it is made for objectives that need a reference"
    of_initial.initial = of_initial if "initial" in needs else None
    of_initial.only_teaches = only_teaches
    return of_initial
