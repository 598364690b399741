"""TRL's asynchronous trainer with our rollouts, small and on a CPU, and checks of its runs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental import async_grpo

from rlpretrain.trl import InformationGainReward
from rlpretrain.trl.async_rollout import AsyncRollouts
from rollout.hf import HFEngine
from tests.builders.trl import AFTER, Kept


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    longest_q: int,
    longest_k: int,
    *,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
) -> Tensor:
    """FlashAttention's varlen attention: a causal mask aligned at the last key.

    Shapes: q [N, H, D], k and v [M, K, D].
    """
    assert causal and window_size == (-1, -1)
    out = []
    for a, b, c, d in zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True):
        mine, keys, values = q[a:b], *(x[c:d].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        seen = torch.ones(b - a, d - c, dtype=torch.bool).tril(int((d - c) - (b - a)))
        weights = (
            (torch.einsum("nhd,mhd->hnm", mine, keys) * softmax_scale)
            .masked_fill(~seen, -torch.inf)
            .softmax(-1)
        )
        out.append(torch.einsum("hnm,mhd->nhd", weights, values))
    return torch.cat(out)


def settings(folder: Path, **changes: Any) -> Any:
    """Settings with two groups of four thoughts a step."""
    return async_grpo.AsyncGRPOConfig(
        **{
            "output_dir": str(folder / "out"),
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_steps": 3,
            "max_completion_length": 6,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "token_budget": 0,
            "max_grad_norm": 0.0,
            "heartbeat_stale_after_s": 60.0,
        }
        | changes
    )


class Busy(HFEngine):
    """An engine that fails if weights arrive while it samples."""

    busy = 0

    async def sample(self, *given: Any) -> Any:
        self.busy += 1
        await asyncio.sleep(0.005)
        try:
            return await super().sample(*given)
        finally:
            self.busy -= 1

    def sync(self, *given: Any) -> None:
        assert not self.busy
        super().sync(*given)


def made(
    corpus: Path,
    args: Any,
    *,
    engine: Any = None,
    path: Path | None = None,
    peft_config: Any = None,
    callbacks: Any = (),
    **fields: Any,
) -> tuple[Any, AsyncRollouts, Kept, list[tuple[Any, int]]]:
    """(trainer, rollouts, recorded rewards, [(sample, the trainer's version when it was drawn)])."""
    path = path or corpus / "base"
    tokenizer = AutoTokenizer.from_pretrained(path)
    reward = InformationGainReward(tokenizer=tokenizer, **{"cut": "force_close", **AFTER} | fields)
    own = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    data = reward.dataset(str(corpus / "train.jsonl"))
    if engine is None:
        engine = Busy(own, tokenizer=tokenizer, shares_weights=False)
    rollouts = AsyncRollouts(reward, engine or None, data, args)
    trainer = async_grpo.AsyncGRPOTrainer(
        str(path),
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[reward.callback, *callbacks],
        peft_config=peft_config,
        rollout_worker=rollouts,
        weight_transfer=rollouts,
    )
    drawn, get = [], rollouts.rollout_buffer.get

    def spy(**given: Any) -> Any:
        drawn.append((get(**given), trainer.model_version))
        return drawn[-1][0]

    kept, update = Kept(reward), rollouts.update_model_version

    def note(version: int) -> None:
        update(version)
        kept.versions[version] = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}

    rollouts.rollout_buffer.get, rollouts.update_model_version, kept.versions = spy, note, {}
    return trainer, rollouts, kept, drawn


@torch.no_grad()
def sampled_from(kept: Any, live: Any) -> float:
    """Largest difference in nats of behaviour log-probs from transformers' under the weights they name."""
    worst = 0.0
    for (group,), *_ in kept.calls:
        live.load_state_dict(kept.versions[group.policy_version], strict=False)
        for t in group.thoughts:
            ids = torch.tensor([[*group.prompt.token_ids, *t.token_ids]])
            logps = (
                live(input_ids=ids)
                .logits[0, :-1]
                .log_softmax(-1)
                .gather(1, ids[0, 1:, None])[-len(t.token_ids) :, 0]
            )
            worst = max(worst, float((logps - torch.tensor(t.behaviour_logps)).abs().max()))
    return worst


def whole(corpus: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(corpus / "base", dtype=torch.float32)
