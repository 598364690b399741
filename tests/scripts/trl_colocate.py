"""A script with TRL's colocated vLLM and our reward or trainer, on a CPU."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from trl import GRPOTrainer  # noqa: E402

from rlpretrain.compat import import_deepspeed  # noqa: E402
from rlpretrain.trl import InformationGainReward, RLPConfig, RLPTrainer  # noqa: E402
from tests.builders.trl import AFTER, Kept, by_hand, settings  # noqa: E402


def main(base: Path, documents: str, out: Path, kind: str) -> None:
    """`kind`: lora or zero with GRPOTrainer; new-tags with RLPTrainer and a tokenizer without tags."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    more, lora = {}, None
    if kind == "zero":
        more = {
            "use_cpu": False,
            "deepspeed": {
                "zero_optimization": {"stage": 2},
                "zero_force_ds_cpu_optimizer": False,
                "train_micro_batch_size_per_gpu": 8,
                "gradient_accumulation_steps": 1,
                "train_batch_size": 8,
            },
        }
        deepspeed = import_deepspeed(on_cpu=True)
    if kind == "lora":
        import peft

        lora = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    trainer_of = RLPConfig if kind == "new-tags" else None
    args = settings(
        out,
        **({"kind": trainer_of} if trainer_of else {}),
        learning_rate=0.05,
        max_steps=3,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=128,
        **more,
    )
    if kind == "zero":
        assert args.device.type == "cpu"
        deepspeed.init_distributed("gloo")  # on a CPU accelerate leaves that out
    common = {"args": args, "processing_class": tokenizer, "peft_config": lora}
    if kind == "new-tags":
        from datasets import Dataset

        args.cut, args.positions, args.marker = "force_close", "after", "shows"
        trainer = RLPTrainer(model, train_dataset=Dataset.from_json(documents), **common)
        reward = trainer.reward
    else:
        reward = InformationGainReward(model, tokenizer, cut="force_close", **AFTER)
        trainer = GRPOTrainer(
            model,
            reward_funcs=[reward],
            callbacks=[reward.callback],
            train_dataset=reward.dataset(documents),
            **common,
        )
    kept = Kept(reward)
    trainer.train()
    if kind == "zero":
        assert trainer.model_wrapped.zero_optimization_stage() == 2
    live = reward.model.eval()
    live = getattr(live, "module", live)
    worst = 0.0
    for groups, rewards, weights in kept.calls:
        live.load_state_dict({n.removeprefix("module."): w for n, w in weights.items()}, strict=False)
        pairs = zip(rewards, by_hand(live, groups, "force_close"), strict=True)
        worst = max([worst, *(abs(a - b) for a, b in pairs)])
    ids = [t.token_ids for groups, _, _ in kept.calls for g in groups for t in g.thoughts]
    record = {
        "worst": worst,
        "calls": len(kept.calls),
        "name": live.name_or_path,
        "logs": [row for row in trainer.state.log_history if "ig/mean" in row],
        "rewards": [rewards for _, rewards, _ in kept.calls],
        "close_inside": sum(reward.close_id in x[:-1] for x in ids),
    }
    (out / "record.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4])
