"""A TRL training in several ranks: every rank's rewards are the scorer's under every ZeRO stage."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.integrations.deepspeed import unset_hf_deepspeed_config  # noqa: E402

from rlpretrain.compat import import_deepspeed  # noqa: E402
from rlpretrain.trl import RLPConfig, RLPTrainer  # noqa: E402
from tests.builders.trl import Kept, by_hand  # noqa: E402


def main(corpus: Path, out: Path, stage: int) -> None:
    torch.set_num_threads(1)
    deepspeed = import_deepspeed(on_cpu=True) if stage else None
    ranks = int(os.environ["WORLD_SIZE"])
    zero = {
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 4 * ranks,
    }
    args = RLPConfig(
        output_dir=str(out / "out"),
        per_device_train_batch_size=4,
        num_generations=4,
        max_steps=2,
        max_completion_length=6,
        learning_rate=1e-2,
        use_cpu=not stage,
        bf16=False,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        cut="force_close",
        positions="after",
        marker="shows",
        target_length=2,
        deepspeed=zero if stage else None,
        lr_scheduler_type="constant",
    )
    assert args.device.type == "cpu"  # asking joins the other ranks
    if deepspeed is not None:
        deepspeed.init_distributed("gloo")  # on a CPU accelerate leaves that out
    model = AutoModelForCausalLM.from_pretrained(corpus / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(corpus / "base")
    data = Dataset.from_json(str(corpus / "train.jsonl"))
    trainer = RLPTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)
    seen = Whole(trainer, deepspeed) if stage == 3 else Kept(trainer.reward)
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == ("DeepSpeedEngine" if stage else "DistributedDataParallel")
    if stage:
        assert trainer.model_wrapped.zero_optimization_stage() == stage
    unset_hf_deepspeed_config()  # another model, whole
    other = AutoModelForCausalLM.from_pretrained(corpus / "base", dtype=torch.float32)
    worst = 0.0
    for groups, rewards, weights in seen.calls:
        other.load_state_dict(weights, strict=False)
        worst = max(
            [
                worst,
                *(abs(a - b) for a, b in zip(rewards, by_hand(other, groups, "force_close"), strict=True)),
            ]
        )
    logs = [row for row in trainer.state.log_history if "ig/mean" in row]
    record = {
        "worst": worst,
        "calls": len(seen.calls),
        "logs": logs,
        "rewards": [rewards for _, rewards, _ in seen.calls],
    }
    (out / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(record))


class Whole(Kept):
    """As `Kept`, with weights that ZeRO-3 has gathered."""

    def __init__(self, trainer: Any, deepspeed: Any):
        reward, self.calls = trainer.reward, []
        call = reward.score

        def spy(groups: Any) -> Any:
            out = call(groups)
            parameters = list(reward.model.parameters())
            with deepspeed.zero.GatheredParameters(parameters):
                weights = {n: p.detach().clone() for n, p in reward.model.named_parameters()}
            self.calls.append((groups, out.for_trl(), weights))
            return out

        reward.score = spy


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
