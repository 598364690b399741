"""Two ranks that sample with `Rollouts`, where one rank has a prompt with two targets."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlpretrain.trl import InformationGainReward
from rlpretrain.trl.rollout import Rollouts
from rollout.hf import HFEngine
from tests.builders.trl import AFTER, Kept, by_hand, settings


def main(corpus: Path, out: Path) -> None:
    torch.set_num_threads(1)
    args = settings(out, max_steps=1, per_device_train_batch_size=4, shuffle_dataset=False, ddp_timeout=60)
    assert args.device.type == "cpu"  # asking joins the other rank
    model = AutoModelForCausalLM.from_pretrained(corpus / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(corpus / "base")
    reward = InformationGainReward(model, tokenizer, cut="force_close", **AFTER)
    lines = [json.loads(line)["text"] for line in (corpus / "train.jsonl").read_text().splitlines()[:2]]
    heads = [line[: line.rindex("shows") + len("shows")] for line in lines]
    data = reward.dataset([f"{heads[0]} 1", f"{heads[1]} 1", f"{heads[1]} 2"])
    kept, rollouts = Kept(reward), Rollouts(reward, HFEngine(model, tokenizer=tokenizer), data)
    trl.GRPOTrainer(
        model,
        reward_funcs=[reward],
        callbacks=[reward.callback],
        rollout_func=rollouts,
        args=args,
        train_dataset=data.select([0, 2, 0, 2]),
        processing_class=tokenizer,
    ).train()
    groups, rewards, weights = kept.calls[-1]
    live = AutoModelForCausalLM.from_pretrained(corpus / "base", dtype=torch.float32)
    live.load_state_dict(weights, strict=False)
    worst = max(abs(a - b) for a, b in zip(rewards, by_hand(live, groups, "force_close"), strict=True))
    record = {
        "calls": len(kept.calls),
        "worst": worst,
        "targets": [list(g.position.target_ids) for g in groups],
        "wanted": [list(ids) for ids in data["target_ids"]],
    }
    (out / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
