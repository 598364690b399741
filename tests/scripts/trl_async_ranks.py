"""TRL's asynchronous trainer in two ranks: rank 0 samples and scores for both."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from trl.experimental.async_grpo import packing

from tests.builders.async_trainer import made, sampled_from, settings, varlen_attention, whole
from tests.builders.trl import by_hand


def main(corpus: Path, out: Path) -> None:
    torch.set_num_threads(1)
    packing._flash_attn = lambda: SimpleNamespace(flash_attn_varlen_func=varlen_attention)
    torch.cuda.get_device_name = lambda device: "a CPU"
    rank = int(os.environ["RANK"])
    args = settings(out, per_device_train_batch_size=4)
    trainer, rollouts, kept, drawn = made(corpus, args, engine=None if rank == 0 else False)
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    record = {
        "calls": len(kept.calls),
        "drawn": len(drawn),
        "worst": 0.0,
        "sampled": 0.0,
        "sum": [float(p.double().sum()) for p in trainer.model.parameters()],
        "logs": [row for row in trainer.state.log_history if "ratio" in row],
    }
    if rank == 0:
        live = whole(corpus)
        for groups, rewards, weights in kept.calls:
            live.load_state_dict(weights, strict=False)
            apart = [abs(a - b) for a, b in zip(rewards, by_hand(live, groups, "force_close"), strict=True)]
            record["worst"] = max(record["worst"], *apart)
        record["sampled"] = sampled_from(kept, live)
        record["engine"] = [float(p.double().sum()) for p in rollouts.engine.model.parameters()]
    (out / f"rank-{rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
