"""Short runs and their weights and gradients."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rlpretrain import Pretrainer
from rlpretrain.config.io import build
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from tests.builders.processes import ROOT as ROOT
from tests.builders.processes import alone as alone
from tests.builders.processes import ranks


def merged(values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """`values` with `section__field=value` or `field=value` changed."""
    out = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if field:
            out.setdefault(section, {})[field] = value
        else:
            out[section] = value
    return out


def trained(values: dict[str, Any], resume: Any = None, **changes: Any) -> dict[str, torch.Tensor]:
    """The weights after a complete run."""
    config = build(merged(values, **changes))
    Pretrainer(config).train(resume=resume)
    return weights(Path(config.output_dir) / "model")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The parameters of a saved model."""
    return {n: p.detach() for n, p in AutoModelForCausalLM.from_pretrained(folder).named_parameters()}


SGD = {"name": "sgd", "lr": 0.1, "warmup_steps": 0}
"""For runs whose weights are compared within rounding: AdamW moves a weight by its rate however small the
gradient is, so rounding in a gradient near 0 may turn a whole step around.
"""


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], within: float = 0.0) -> bool:
    """Whether names agree and weights are bit-identical, or differ by no more than `within`."""
    return a.keys() == b.keys() and all(float((a[n] - b[n]).abs().max()) <= within for n in a)


def one_step(
    values: dict[str, Any], prepare: Callable[[Run], None] = lambda run: None, **changes: Any
) -> tuple[Run, dict[str, torch.Tensor]]:
    """A run after one step and the gradient of that step before clipping; `prepare` gets the run first."""
    run = Run(build(merged(values, **({"max_steps": 1, "optim__clip_grad_norm": 0.0} | changes))), None)
    prepare(run)
    gradient: dict[str, torch.Tensor] = {}
    step = run.policy.step

    def spy() -> Any:
        gradient.update(
            {n: p.grad.clone() for n, p in run.policy.model.named_parameters() if p.grad is not None}
        )
        return step()

    run.policy.step = spy
    train(run)
    run.close()
    return run, gradient


def launch(runs: list[dict], folder: Path, number: int = 2) -> None:
    """Train each of `runs` with this many gloo ranks."""
    jobs = folder / "jobs.json"
    jobs.write_text(json.dumps(runs))
    environment = alone() | {"DS_ACCELERATOR": "cpu"}
    done = ranks(number, "-m", "tests.scripts.two_ranks", str(jobs), environment=environment)
    assert done.returncode == 0, done.stderr[-4000:]
