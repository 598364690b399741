"""TRL's next-token loss through a ZeRO-3 engine: its gradients equal those of whole logits without it."""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch  # noqa: E402

from rlpretrain.compat import import_deepspeed  # noqa: E402
from rlpretrain.trl.next_token import add_next_token_logps, next_token_loss  # noqa: E402
from tests.builders.next_token import DOCUMENTS, TIMES, gradients, loss_of_logits  # noqa: E402
from tests.builders.tiny import tiny_model  # noqa: E402

ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def main(architecture: str, adapters: bool) -> None:
    torch.set_num_threads(1)
    deepspeed = import_deepspeed(on_cpu=True)
    deepspeed.init_distributed("gloo")
    model: Any = tiny_model(architecture, 64, initializer_range=0.2)
    if adapters:
        import peft

        config = peft.LoraConfig(
            r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
        )
        model = peft.get_peft_model(model, config)
    expected = loss_of_logits(model)
    expected_gradients = gradients(model, expected)
    add_next_token_logps(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trained, lr=0.0), config=ZERO3)
    for _ in range(2):  # in the second round ZeRO-3 prefetches in the order of the first
        loss = next_token_loss(engine, DOCUMENTS, TIMES, torch.device("cpu"))
        assert abs(float(loss) / float(expected) - 1) < 1e-6
        engine.backward(loss)
        for name, p in model.named_parameters():
            if p.requires_grad:
                gradient = deepspeed.utils.safe_get_full_grad(p)
                scale = expected_gradients[name].abs().max().clamp(min=1e-6)
                assert float((gradient - expected_gradients[name]).abs().max() / scale) < 1e-5, name
        engine.step()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "adapters")
