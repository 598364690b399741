"""A TRL training in several ranks: every rank's rewards are the scorer's however the model is sharded."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch  # noqa: E402
from accelerate.state import AcceleratorState, PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402
from datasets import Dataset  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.integrations.deepspeed import unset_hf_deepspeed_config  # noqa: E402
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402

from rlpretrain.compat import import_deepspeed  # noqa: E402
from rlpretrain.models.gathering import whole_weights  # noqa: E402
from rlpretrain.trl import InformationGainReward, RLPConfig, RLPTrainer  # noqa: E402
from rlpretrain.trl.callback import plain  # noqa: E402
from rlpretrain.trl.rollout import Rollouts  # noqa: E402
from rollout.hf import HFEngine  # noqa: E402
from tests.builders.trl import AFTER, Kept, by_hand, settings  # noqa: E402

WRAPPERS = {"ddp": "DistributedDataParallel", "fsdp": "FSDPQwen3ForCausalLM", "rollouts": "FSDPPeftModel"}


def main(corpus: Path, out: Path, kind: str) -> None:
    """`kind`: ddp, zero2, zero3, fsdp, or rollouts: FSDP with adapters and an engine of ours."""
    torch.set_num_threads(1)
    on_cpu = os.environ.get("ACCELERATE_USE_CPU") == "true"
    stage = int(kind[-1]) if kind.startswith("zero") else 0
    deepspeed = import_deepspeed(on_cpu=True) if stage else None
    if kind in ("fsdp", "rollouts") and on_cpu:
        shard_on_cpu()
    zero = {
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 4 * int(os.environ["WORLD_SIZE"]),
    }
    changes = {"per_device_train_batch_size": 4, "use_cpu": on_cpu, "deepspeed": zero if stage else None}
    own = {"positions": "after", "marker": "shows", "target_length": 2, "cut": "force_close"}
    args = settings(out, **changes) if kind == "rollouts" else settings(out, RLPConfig, **changes, **own)
    assert args.device.type == ("cpu" if on_cpu or stage else "cuda")  # asking joins the other ranks
    if deepspeed is not None:
        deepspeed.init_distributed("gloo")  # on a CPU accelerate leaves that out
    model: Any = AutoModelForCausalLM.from_pretrained(corpus / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(corpus / "base")
    data = Dataset.from_json(str(corpus / "train.jsonl"))
    if kind == "rollouts":
        trainer, reward = with_rollouts(model, tokenizer, data, args)
    else:
        trainer = RLPTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)
        reward = trainer.reward
    seen = Whole(reward)
    trainer.train()
    unwrapped = kind == "ddp" and os.environ["WORLD_SIZE"] == "1"  # accelerate leaves one rank as it is
    assert unwrapped or type(trainer.model_wrapped).__name__ == WRAPPERS.get(kind, "DeepSpeedEngine")
    if stage:
        assert trainer.model_wrapped.zero_optimization_stage() == stage
    weights = dict(whole_weights(plain(reward.model), reward.model))
    unset_hf_deepspeed_config()  # another model, whole
    other = AutoModelForCausalLM.from_pretrained(corpus / "base", dtype=torch.float32)
    frozen = copy.deepcopy(other) if kind == "rollouts" else None
    worst = apart = 0.0
    for groups, rewards, then in seen.calls:
        other.load_state_dict(then)
        found = zip(rewards, by_hand(other, groups, "force_close", frozen), strict=True)
        worst = max(worst, *(abs(a - b) for a, b in found))
        if kind == "rollouts":
            apart = max(apart, *sampled_apart(other, groups))
    logs = [row for row in trainer.state.log_history if "ig/mean" in row]
    record = {
        "worst": worst,
        "apart": apart,
        "calls": len(seen.calls),
        "logs": logs,
        "rewards": [rewards for _, rewards, _ in seen.calls],
    }
    rank = os.environ.get("RANK", "0")
    (out / f"rank-{rank}.json").write_text(json.dumps(record))
    save_file({name: p.cpu().clone() for name, p in weights.items()}, out / f"rank-{rank}.safetensors")


def with_rollouts(model: Any, tokenizer: Any, data: Any, args: Any) -> tuple[Any, Any]:
    """(trainer, reward): adapters over a frozen base, thoughts from an engine with its own weights."""
    import peft

    engine = HFEngine(copy.deepcopy(model).to(args.device), tokenizer=tokenizer, shares_weights=False)
    reward = InformationGainReward(model, tokenizer, cut="force_close", baseline="frozen", **AFTER)
    prompts = reward.dataset(data)
    lora = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    trainer = GRPOTrainer(
        model,
        reward_funcs=[reward],
        callbacks=[reward.callback],
        train_dataset=prompts,
        rollout_func=Rollouts(reward, engine, prompts),
        args=args,
        processing_class=tokenizer,
        peft_config=lora,
    )
    return trainer, reward


@torch.no_grad()
def sampled_apart(model: Any, groups: Any) -> Iterator[float]:
    """How far the engine's log-probs of each thought are from the model's."""
    for group in groups:
        for thought in group.thoughts:
            ids = torch.tensor([[*group.prompt.token_ids, *thought.token_ids]])
            logps = model(input_ids=ids).logits[0, -len(thought.token_ids) - 1 : -1].log_softmax(-1)
            own = logps.gather(1, torch.tensor(thought.token_ids)[:, None])[:, 0]
            yield float((own - torch.tensor(thought.behaviour_logps)).abs().max())


def shard_on_cpu() -> None:
    """Let accelerate shard with FSDP on CPUs too, where it would take DDP."""
    make = AcceleratorState.__init__

    def made(self: Any, *given: Any, fsdp_plugin: Any = None, **named: Any) -> None:
        make(self, *given, fsdp_plugin=fsdp_plugin, **named)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = made


class Whole(Kept):
    """As `Kept`, with whole weights under the names of the checkpoint."""

    def __init__(self, reward: Any):
        self.reward, self.calls = reward, []
        call = reward.score

        def spy(groups: Any) -> Any:
            out = call(groups)
            weights = {n: p.clone() for n, p in whole_weights(plain(reward.model), reward.model)}
            self.calls.append((groups, out.for_trl(), weights))
            return out

        reward.score = spy


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
