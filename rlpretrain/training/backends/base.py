"""The protocol of a backend, and functions that the backends share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rlpretrain.ranks import Ranks
from rlpretrain.scoring.scorer import Scorer
from rlpretrain.types import MicroBatch, Scores


@dataclass(frozen=True, slots=True)
class StepInfo:
    """The result of an optimizer step."""

    grad_norm: float
    lr: float
    applied: bool


class Policy(Protocol):
    """The trained model behind the methods that a run calls.

    It is constructed with (model, PolicyConfig, OptimConfig, steps of the run, Ranks, sampling temperature,
    inner epochs). All ranks call every method together, equally often. The loss of a micro-batch is already
    divided by the step's global counts, so gradients are summed over micro-batches and over ranks.
    """

    model: nn.Module
    scorer: Scorer
    ranks: Ranks
    shares_weights: bool
    """Whether the embedded engine can sample from `model` as it is."""
    stage_gathers: bool
    """Whether `weights` gives tensors that are freed when the next one is asked for."""
    loads_on_any_ranks: bool
    """Whether `load` works on another number of ranks than wrote the checkpoint."""

    def score(self, micro: MicroBatch, *, entropies: bool = False) -> Scores:
        """The scores of a micro-batch in one forward, with their graph."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` to the gradient of this step."""
        ...

    def step(self) -> StepInfo:
        """Sum gradients over ranks, clip, update, clear; a step with NaN or inf gradients changes nothing."""
        ...

    def discard(self) -> None:
        """Drop the gradient of this step."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, full tensor) pairs as transformers names them, adapters merged in."""
        ...

    def adapter(self) -> Iterator[tuple[str, Tensor]]:
        """The adapters alone, as PEFT names them in files."""
        ...

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """(name, values) of each trained parameter, as this rank holds them: whole, or under ZeRO 3 a shard.

        Writing to the values changes the parameter. Only `average` needs this method.
        """
        ...

    def save(self, path: Path) -> None:
        """Write the state that a bit-identical resume needs to the folder `path`."""
        ...

    def load(self, path: Path) -> None:
        """Restore what `save` wrote."""
        ...


@runtime_checkable
class WritesParts(Protocol):
    """A policy whose ranks write tensors like `parts` together, for any number of ranks to read.

    The average of the weights is then kept that way in a checkpoint; else each rank writes its own.
    """

    def save_parts(self, tensors: Mapping[str, Mapping[str, Tensor]], path: Path) -> None:
        """Write tensors of the shapes of `parts`, by kind and name, to the folder `path`."""
        ...

    def load_parts(self, tensors: Mapping[str, Mapping[str, Tensor]], path: Path) -> None:
        """Fill such tensors with what `save_parts` wrote, in place."""
        ...


def apply_gradients(optimizer: torch.optim.Optimizer, norm: float, lr: float) -> bool:
    """Update at a learning rate, unless the norm of the gradients is not finite, and clear them.

    Return whether weights were updated.
    """
    applied = math.isfinite(norm)
    if applied:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return applied


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def copy_trained(src: Mapping[str, Tensor], dst: nn.Module) -> None:
    for name, p in trained_parameters(dst).items():
        p.copy_(src[name])
