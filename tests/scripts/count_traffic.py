"""Count the bytes that each step of a run receives from other ranks, as rings; `torchrun` starts it.

Arguments: the run's settings as JSON, and the file for rank 0's counts.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rlpretrain.config.io import build
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run

counts = [0.0]


def count(name: str, whole: int, times: int) -> None:
    """Let the collective `name` count its argument `whole`, which has the full size, `times` a ring."""
    original = getattr(dist, name)
    keyword = list(inspect.signature(original).parameters)[whole]

    def call(*args: Any, **kwargs: Any) -> Any:
        tensor = kwargs[keyword] if keyword in kwargs else args[whole]
        ranks = dist.get_world_size(kwargs.get("group"))
        size = tensor.numel() * tensor.element_size()
        if tensor.dtype != torch.float64:  # such are counts of losses and metrics
            counts[-1] += times * size * (ranks - 1) / ranks
        return original(*args, **kwargs)

    setattr(dist, name, call)


count("all_gather_single", 0, 1)
count("reduce_scatter_single", 1, 1)
count("all_reduce", 0, 2)
run = Run(build(json.loads(sys.argv[1])), None)
begin = run._begin_step


def begin_step() -> None:
    counts.append(0.0)
    begin()


run._begin_step = begin_step
train(run)
if run.ranks.first:
    Path(sys.argv[2]).write_text(json.dumps(counts))
run.close()
