"""Groups scored with the live model of a TRL trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from rlpretrain.compat import attention_of, keep_differentiable, set_root, sharded
from rlpretrain.config import ConfigError
from rlpretrain.evaluation.evaluate import contrast
from rlpretrain.models.kernels import attending_by, choose_kernel
from rlpretrain.objectives import Objective
from rlpretrain.ranks import Ranks
from rlpretrain.scoring import attention
from rlpretrain.scoring.checks import check_model, fits_trees
from rlpretrain.scoring.groups import micro_batches, no_think_contexts, score_batch
from rlpretrain.scoring.packing import Layout
from rlpretrain.scoring.references import Baseline
from rlpretrain.scoring.scorer import NoGradScorer, score_function
from rlpretrain.trl.callback import adapters_of, evaluating, plain, ranks_of
from rlpretrain.trl.gains import ThoughtScores, log_scores
from rlpretrain.trl.model_setup import check_adapters, make_baseline, settle_model
from rlpretrain.types import Batch
from rollout.types import Group

OWN_ADVANTAGES = (("score", "jepo"), ("clamp", True), ("unclosed", "double_mean"))
"""Fields of objectives, and the values with which `advantage` is more than a comparison of rewards."""


class LiveScorer:
    """Rewards groups by an objective, with the model that it watches, against the baseline of that name."""

    objective: Objective

    def __init__(self, name: str, layout: Layout, baseline: str, ema_decay: float):
        self.__name__ = name  # TRL's log has the reward by it
        self.layout, self.baseline, self.ema_decay = layout, baseline, ema_decay
        self.model: nn.Module | None = None
        # weights before a checkpoint is loaded; dropped in training
        self.initial: dict[str, torch.Tensor] = {}
        self.reference: Baseline | None = None  # made when a model is watched
        # The kernel to score with, where one rank scores in a trainer whose own kernel cannot be used.
        self.attention: str | None = None
        self.is_tried = False  # whether a batch was scored both in trees and in padded rows

    def watch(self, model: nn.Module) -> None:
        """Score with this model from now on. The callback calls it when training begins."""
        inner, peft_model, is_sharded = plain(model), adapters_of(model), sharded(model)
        if is_sharded and self.attention:
            raise ConfigError(
                "one rank scores for TRL's asynchronous trainer, and this model is sharded over several "
                "(FSDP, ZeRO-3): train it in one process or under DDP, or with GRPOTrainer"
            )
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise ConfigError(
                f"{self.__name__}: FSDP 1 gathers weights only inside its own forward: set fsdp_version 2"
            )
        if isinstance(model, FSDPModule):
            set_root(inner, model)
        self.model = model
        keep_differentiable(inner)
        for field, value in OWN_ADVANTAGES:
            if not self.attention and getattr(self.objective.config, field, None) == value:
                raise ConfigError(
                    f"objective.{field} {value} has advantages of its own, and this trainer of TRL's "
                    "computes them from rewards: take another value, or AsyncRollouts, or rlpretrain's "
                    "own trainer"
                )
        if peft_model is not None:
            check_adapters(inner, peft_model, self.baseline)
        settle_model(inner, self.attention, is_sharded=is_sharded, reward_name=self.__name__)
        with attending_by(inner, self.attention):
            if not is_sharded:
                choose_kernel(inner)
                check_model(inner)
            self.layout.tree, self.is_tried = attention.install(inner) is None, False
            self.attention = attention_of(inner) if self.attention else None
            if self.reference is None or peft_model is not None:
                self.reference = make_baseline(
                    self.baseline,
                    inner,
                    has_adapters=peft_model is not None,
                    is_sharded=is_sharded,
                    initial=self.initial,
                    ema_decay=self.ema_decay,
                )

    @torch.no_grad()
    def score(self, groups: Sequence[Group]) -> ThoughtScores:
        """Rewards and log-probs of all thoughts, scored by `scoring.groups` as in the library's own loop."""
        if self.model is None:
            raise RuntimeError(
                f"{self.__name__} has no model to score with: pass callbacks=[reward.callback] to the trainer"
            )
        inner = plain(self.model)
        device = next(inner.parameters()).device
        empty = self._empty_groups(groups)
        batch = Batch((*groups, *empty), ())
        layout = replace(self.layout, no_think_ids=no_think_contexts(self.objective, batch.groups))
        ranks = Ranks(device=device) if self.attention else ranks_of(device)
        score = score_function(NoGradScorer(inner))
        micros = micro_batches(batch, layout, ranks)
        with evaluating(self.model), attending_by(inner, self.attention):
            if layout.tree and not self.is_tried:
                half = next(inner.parameters()).dtype != torch.float32
                self.layout.tree = layout.tree = fits_trees(score, micros[0], layout, ranks, half)
                self.is_tried = True
                micros = micro_batches(batch, layout, ranks)
            by_id = score_batch(
                score, micros, device, reference=self.reference, objective=self.objective
            ).groups
        return ThoughtScores.of([by_id[g.id] for g in groups], [by_id[g.id] for g in empty])

    def log(self, groups: Sequence[Group], scores: ThoughtScores, log: Callable[[str, float], None]) -> None:
        """Log the metrics of scored groups."""
        log_scores(groups, scores, log, has_target=self.layout.target, frozen=self.baseline == "frozen")

    def _empty_groups(self, groups: Sequence[Group]) -> list[Group]:
        """An empty thought at each position, whose gain is logged against a frozen baseline."""
        if self.baseline != "frozen" or not self.layout.target:
            return []
        return [replace(g, id=f"{g.id}:empty", rewards=None) for g in contrast(groups, "empty")]
