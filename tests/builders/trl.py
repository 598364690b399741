"""Rewards, prompts and settings of the tests with TRL trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from rewards import information_gain
from rlpretrain.trl import ObjectiveReward
from rollout.types import FinishReason

trl = pytest.importorskip("trl")
AFTER = {"positions": "after", "marker": "shows"}


def settings(folder: Path, kind: Any = trl.GRPOConfig, **changes: Any) -> Any:
    return kind(
        **{
            "output_dir": str(folder / "out"),
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_steps": 2,
            "max_completion_length": 6,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "scale_rewards": "none",
            "loss_type": "grpo",
            "beta": 0.0,
            "lr_scheduler_type": "constant",
        }
        | changes
    )


class Kept(TrainerCallback):
    """Records the arguments, the results and the model's weights of each call of a reward function."""

    def __init__(self, reward: ObjectiveReward):
        self.reward, self.calls, call = reward, [], reward.score

        def spy(groups: Any) -> Any:
            out = call(groups)
            weights = {n: p.detach().clone() for n, p in reward.model.named_parameters()}
            self.calls.append((groups, out.for_trl(), weights))
            return out

        reward.score = spy


def by_hand(model: Any, groups: Any, cut: str = "mask", baseline: Any = None) -> list[float | None]:
    """Gains from transformers' own logits, one row at a time; against `model` itself by default."""

    def logp(head: tuple[int, ...], target: tuple[int, ...], model: Any = model) -> torch.Tensor:
        logits = model(input_ids=torch.tensor([[*head, *target]])).logits[0].float().log_softmax(-1)
        return torch.stack([logits[len(head) + k - 1, t] for k, t in enumerate(target)])

    out: list[float | None] = []
    with torch.no_grad():
        for g in groups:
            alone = logp(g.position.context_ids, g.position.target_ids, baseline or model)
            for t in g.thoughts:
                closed = t.finish_reason is FinishReason.CLOSE
                if not closed and cut == "mask":
                    out.append(None)
                    continue
                head = (*g.prompt.token_ids, *t.token_ids, *(() if closed else g.prompt.close_ids))
                after = logp(head, g.position.target_ids)
                out.append(float(information_gain(after[None, None], alone[None])))
    return out
