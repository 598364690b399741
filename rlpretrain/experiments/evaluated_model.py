"""The model of a job of an experiment."""

from __future__ import annotations

from typing import Any

from torch import nn

from rlpretrain import models
from rlpretrain.config import PretrainConfig
from rlpretrain.experiments.experiment import Job
from rlpretrain.objectives import delimiters
from rlpretrain.ranks import join


def load_evaluated(job: Job, config: PretrainConfig, path: str) -> tuple[nn.Module, Any]:
    """(model, tokenizer) at `path`, which the job has trained; the base model as `config` describes it."""
    start = config.model.saved_at(path) if job.method else config.model
    model, tokenizer, _ = models.load_with_tokenizer(start, delimiters(config.objective), job.seed)
    return model.to(join(config.device).device), tokenizer
