"""The policy in DeepSpeed's engine."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlpretrain import compat
from rlpretrain.config import ConfigError, OptimConfig, PolicyConfig
from rlpretrain.models.adapters import Piece, adapter_pieces, pieces
from rlpretrain.ranks import Ranks, ensure_group
from rlpretrain.scoring.scorer import Scorer, score
from rlpretrain.training.backends.base import StepInfo, copy_trained, trained_parameters
from rlpretrain.training.backends.masters import GradientSum, collect_gradient
from rlpretrain.training.optim import groups_for, make_optimizer
from rlpretrain.training.schedules import make_schedule
from rlpretrain.types import MicroBatch, Scores


class DeepSpeedPolicy:
    """DeepSpeed ZeRO 0 to 3, 1..n processes, fp32 or bf16, with the user's DeepSpeed JSON if there is one.

    In bf16 DeepSpeed keeps float32 weights and optimizer state. The gradients of micro-batches add up in
    float32: in DeepSpeed at stages 2 and 3, and here (`sums`) at stages 0 and 1, where it would use bf16.
    DeepSpeed averages over ranks, so the loss is multiplied by their number; accumulation is ours
    (`managed_gradient_accumulation: false`), since the number of micro-batches varies.
    """

    loads_on_any_ranks = False

    def __init__(
        self,
        model: nn.Module,
        config: PolicyConfig,
        optim: OptimConfig,
        total_steps: int,
        ranks: Ranks,
        temperature: float = 1.0,
        inner_epochs: int = 1,
    ):
        ensure_group(ranks)
        deepspeed = compat.import_deepspeed(ranks.device.type == "cpu")
        self.model, self.ranks, self.temperature, self.optim = model, ranks, temperature, optim
        settings = ds_settings(config, optim, next(model.parameters()).dtype)
        self.stage = settings["zero_optimization"]["stage"]
        self.rounded = getattr(model, "is_quantized", False)
        if self.stage == 3 and self.rounded:
            raise ConfigError(
                "model.quantization: ZeRO 3 cannot shard rounded weights; use policy.zero_stage 2 or less"
            )
        self.shares_weights, self.stage_gathers = self.stage < 3, self.stage == 3
        self.scorer = scorer = Scorer(model.to(ranks.device))
        self.limit, self.norm, self.clips = settings["gradient_clipping"] or math.inf, 0.0, False
        optimizer = make_optimizer(groups_for(model, optim), optim)
        if self.stage == 0 and next(model.parameters()).dtype == torch.float32:
            # DeepSpeed clips too, but does not keep the norm
            settings["gradient_clipping"], self.clips = 0.0, True
            optimizer.register_step_pre_hook(self._clip)
        self.engine, *_ = deepspeed.initialize(
            model=scorer, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self.sums: list[tuple[nn.Parameter, GradientSum]] = []
        own_sums = settings.get("data_types", {}).get("grad_accum_dtype") is None
        if self.stage < 2 and settings["bf16"]["enabled"] and own_sums:
            self.sums = [(p, GradientSum()) for p in model.parameters() if p.requires_grad]
            for p, gradient_sum in self.sums:
                collect_gradient(p, gradient_sum)
        self.factor, self.steps = make_schedule(optim, total_steps, inner_epochs), 0
        self.gathered = deepspeed.zero.GatheredParameters
        if self.stage == 3:
            for p in model.get_output_embeddings().parameters():  # type: ignore[operator]
                # used by Scorer.forward outside its own layer: gather it around that forward
                deepspeed.zero.register_external_parameter(scorer, p)

    def score(self, micro: MicroBatch, *, entropies: bool = False) -> Scores:
        """As TorchPolicy.score."""
        return score(self.engine, micro.to(self.ranks.device), self.temperature, entropies=entropies)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`; every rank must call it equally often (`packing.idle` fills up)."""
        self.engine.backward(loss * self.ranks.size)

    def step(self) -> StepInfo:
        """Reduce, clip, update, clear; a step with non-finite gradients is skipped.

        Under ZeRO 3 they are found after the update; `applied` is False then too.
        """
        lr = self.optim.lr * self.factor(self.steps)
        assert self.engine.optimizer is not None, "the engine is constructed with one"
        for group in self.engine.optimizer.param_groups:  # pyright: ignore[reportAttributeAccessIssue]
            group["lr"] = lr
        for p, gradient_sum in self.sums:
            p.grad = None if gradient_sum.grad is None else gradient_sum.grad.to(p.dtype)
            gradient_sum.grad = None
        if self.stage == 0:
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            fine = all(bool(torch.isfinite(g).all()) for g in grads)
            if self.ranks.max([float(not fine)])[0]:
                self.discard()
                return StepInfo(math.nan, lr, False)
        self.engine.step()
        norm = self.norm if self.clips else float(self.engine.get_global_grad_norm() or 0.0)
        applied = self.engine.was_step_applied() and math.isfinite(norm)
        self.steps += applied
        return StepInfo(norm, lr, applied)

    def _clip(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Clip after DeepSpeed's reduction and before the update."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.norm = float(nn.utils.clip_grad_norm_(parameters, self.limit))

    def discard(self) -> None:
        """Drop the gradient of this step."""
        assert self.engine.optimizer is not None, "the engine is constructed with one"
        for _, gradient_sum in self.sums:
            gradient_sum.grad = None
        self.engine.zero_grad()
        self.engine.optimizer.zero_grad()  # pyright: ignore[reportAttributeAccessIssue]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """As TorchPolicy.weights; under ZeRO 3 gathered a few layers at a time, by all ranks together."""
        return self._gathered(list(pieces(self.model)))

    def adapter(self) -> Iterator[tuple[str, Tensor]]:
        """As TorchPolicy.adapter."""
        return self._gathered(list(adapter_pieces(self.model)))

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """As TorchPolicy.parts; under ZeRO 3 this rank's shards, flat and padded at the end."""
        for name, p in trained_parameters(self.model).items():
            yield name, compat.shard_of(p) if self.stage == 3 else p.detach()

    def _gathered(self, all_pieces: list[Piece]) -> Iterator[tuple[str, Tensor]]:
        size = 16 if self.stage == 3 else len(all_pieces)
        for i in range(0, len(all_pieces), size):
            part = all_pieces[i : i + size]
            unique = list({id(p): p for piece in part for p in piece.needs}.values())
            with self.gathered(unique, enabled=self.stage == 3):
                for piece in part:
                    yield piece.name, piece.make()

    def save(self, path: Path) -> None:
        """As TorchPolicy.save; every rank writes its shard."""
        self.engine.save_checkpoint(
            str(path),
            tag="deepspeed",
            client_state={"steps": self.steps},
            exclude_frozen_parameters=self.rounded,
        )

    def load(self, path: Path) -> None:
        """Restore what `save` wrote, with the same stage and number of ranks."""
        read = copy_trained if self.rounded else None
        folder, client = self.engine.load_checkpoint(str(path), tag="deepspeed", custom_load_fn=read)
        if folder is None or client is None:
            raise ConfigError(f"{path} holds no DeepSpeed state: it was written by another backend")
        self.steps = client["steps"]


def ds_settings(config: PolicyConfig, optim: OptimConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: the user's JSON with the settings that this library must set."""
    settings: dict[str, Any] = {}
    if config.deepspeed_config:
        try:
            settings = json.loads(Path(config.deepspeed_config).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ConfigError(f"policy.deepspeed_config {config.deepspeed_config}: {error}") from None
    zero = settings.setdefault("zero_optimization", {})
    zero.setdefault("stage", config.zero_stage)
    if settings.get("fp16", {}).get("enabled") is True:
        raise ConfigError(
            "policy.deepspeed_config enables fp16, whose loss scaling is not supported: use bf16 or fp32"
        )
    clip = settings.get("gradient_clipping", optim.clip_grad_norm)
    owned = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": optim.clip_grad_norm if clip == "auto" else clip,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    for key in ("train_batch_size", "optimizer", "scheduler", "fp16"):
        settings.pop(key, None)
    zero.setdefault("overlap_comm", False)
    if dtype == torch.bfloat16 and zero["stage"] >= 2:
        # DeepSpeed would add up the gradients of micro-batches in bfloat16
        types = settings.setdefault("data_types", {})
        if types.get("grad_accum_dtype") in (None, "auto"):
            types["grad_accum_dtype"] = "fp32"
    return _without_auto(settings | owned)


def _without_auto(node: dict[str, Any]) -> dict[str, Any]:
    """Drop "auto" values, which only the HF Trainer fills in; DeepSpeed's own defaults apply instead."""
    return {k: _without_auto(v) if isinstance(v, dict) else v for k, v in node.items() if v != "auto"}
