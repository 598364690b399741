"""The gradients of TRL's trainers and of our own loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from rlpretrain.trl import COLUMNS
from tests.builders.runs import one_step

trl = pytest.importorskip("trl")


class Gradient(TrainerCallback):
    """The gradient that the first optimizer step applies."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not self.found:
            self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def native(
    values: dict[str, Any], **changes: Any
) -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(batch, gradient, weights after) of one step of our own loop."""
    kept: list[Any] = []

    def keep(run: Any) -> None:
        kept.append(run.next_batch())
        run.next_batch = lambda: kept[0]

    same = {"optim__warmup_steps": 0, "optim__betas": (0.9, 0.999), "loss__reader_coef": 0.0}
    run, gradient = one_step(values, keep, **(same | changes))
    return kept[0], gradient, {n: p.detach() for n, p in run.policy.model.named_parameters()}


def rows(batch: Any, tokenizer: Any) -> Dataset:
    """The positions of a batch as a prompt dataset."""
    whole = {d.id: d.token_ids for d in batch.documents}
    return Dataset.from_list(
        [
            dict(
                zip(
                    COLUMNS,
                    (
                        tokenizer.decode(g.prompt.token_ids),
                        g.position.document_id,
                        g.position.index,
                        list(g.position.context_ids),
                        list(g.position.target_ids),
                        [],
                    ),
                    strict=True,
                )
            )
            | {"document_token_ids": list(whole[g.position.document_id])}
            for g in batch.groups
        ]
    )


def stored(batch: Any) -> Any:
    """A rollout_func that returns the thoughts of a batch."""

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        made = [(g, t) for g in batch.groups for t in g.thoughts]
        assert len(prompts) == len(made)
        return {
            "prompt_ids": [list(g.prompt.token_ids) for g, _ in made],
            "logprobs": [list(t.behaviour_logps) for _, t in made],
            "completion_ids": [list(t.token_ids) for _, t in made],
        }

    return rollout


def close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], factor: float = 1.0) -> float:
    """Largest difference over each parameter's largest entry."""
    assert ours.keys() == theirs.keys()
    return max(
        float((ours[n] - factor * theirs[n]).abs().max() / ours[n].abs().max().clamp(min=1e-12)) for n in ours
    )


ONE = {
    "per_device_train_batch_size": 16,
    "max_steps": 1,
    "max_grad_norm": 0.0,
    "learning_rate": 1e-2,
    "adam_beta2": 0.999,
    "weight_decay": 0.0,
    "shuffle_dataset": False,
    "dataloader_num_workers": 0,
}
