"""The policy under PyTorch's FSDP 2 (`fully_shard`)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from rlpretrain import compat
from rlpretrain.config import ConfigError, FsdpConfig, OptimConfig, PolicyConfig
from rlpretrain.models.adapters import adapter_pieces, pieces
from rlpretrain.models.gathering import gather_units
from rlpretrain.ranks import Ranks, ensure_group
from rlpretrain.scoring.scorer import Scorer, score
from rlpretrain.training.backends.base import StepInfo, apply_gradients, trained_parameters
from rlpretrain.training.backends.masters import HALF
from rlpretrain.training.optim import groups_for, make_optimizer
from rlpretrain.training.schedules import make_schedule
from rlpretrain.types import MicroBatch, Scores

STATE = "fsdp"
"""The folder of a checkpoint that has weights and optimizer state."""


class FsdpPolicy:
    """FSDP 2: each rank holds a part of every weight, of its gradient and of its optimizer state.

    Each decoder layer is gathered while it computes; embedding, last norm and head are gathered together, by
    the scorer. Trained half-precision weights are kept in float32 and gathered in half precision; gradients
    are summed over micro-batches and ranks in float32. Checkpoints are those of
    torch.distributed.checkpoint, which any number of ranks can read.
    """

    shares_weights = False
    stage_gathers = True
    loads_on_any_ranks = True

    def __init__(
        self,
        model: nn.Module,
        config: PolicyConfig,
        optim: OptimConfig,
        total_steps: int,
        ranks: Ranks,
        temperature: float = 1.0,
        inner_epochs: int = 1,
    ):
        ensure_group(ranks)
        self.model, self.ranks, self.temperature, self.optim = model, ranks, temperature, optim
        self.autocast = config.autocast == "bfloat16"
        self.scorer = Scorer(model.to(ranks.device))
        self.units = shard(self.scorer, make_mesh(ranks, config.fsdp.replicas), config.fsdp.reshard)
        self.optimizer = make_optimizer(groups_for(model, optim), optim)
        self.factor, self.steps = make_schedule(optim, total_steps, inner_epochs), 0

    def score(self, micro: MicroBatch, *, entropies: bool = False) -> Scores:
        """As TorchPolicy.score. All ranks call it equally often."""
        context = torch.autocast(self.ranks.device.type, torch.bfloat16) if self.autocast else nullcontext()
        with context:
            scores = score(self.scorer, micro.to(self.ranks.device), self.temperature, entropies=entropies)
        if not torch.is_grad_enabled():
            self._free()  # with a gradient, the backward pass does it
        return scores

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, summed over ranks. All ranks call it equally often."""
        loss.backward()

    def step(self) -> StepInfo:
        """Clip, update, clear; a NaN or inf gradient changes nothing."""
        trained = list(trained_parameters(self.model).values())
        for p in trained:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        total = nn.utils.clip_grad_norm_(trained, self.optim.clip_grad_norm or math.inf)
        norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
        lr = self.optim.lr * self.factor(self.steps)
        applied = apply_gradients(self.optimizer, norm, lr)
        self.steps += applied
        return StepInfo(norm, lr, applied)

    def discard(self) -> None:
        """Drop the gradient of this step."""
        self._free()
        self.optimizer.zero_grad(set_to_none=True)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """As TorchPolicy.weights, in another order, gathered a layer at a time by all ranks together."""
        return gather_units(self.units, lambda: pieces(self.model))

    def adapter(self) -> Iterator[tuple[str, Tensor]]:
        """As TorchPolicy.adapter."""
        return gather_units(self.units, lambda: adapter_pieces(self.model))

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """(name, values) of this rank's part of each trained parameter; writing to them changes it."""
        self._free()
        for name, p in trained_parameters(self.model).items():
            yield name, _dtensor(p).to_local().detach()

    def save_parts(self, tensors: Mapping[str, Mapping[str, Tensor]], path: Path) -> None:
        """As WritesParts.save_parts."""
        with _reason():
            state_dict_saver.save(
                {kind: self._whole(named) for kind, named in tensors.items()}, checkpoint_id=path
            )

    def load_parts(self, tensors: Mapping[str, Mapping[str, Tensor]], path: Path) -> None:
        """As WritesParts.load_parts."""
        with _reason():
            state_dict_loader.load(
                {kind: self._whole(named) for kind, named in tensors.items()}, checkpoint_id=path
            )

    def _whole(self, named: Mapping[str, Tensor]) -> dict[str, DTensor]:
        """This rank's parts of tensors that have the shapes of the trained parameters."""
        own = {name: _dtensor(p) for name, p in trained_parameters(self.model).items()}
        return {
            name: DTensor.from_local(
                values,
                own[name].device_mesh,
                own[name].placements,
                shape=own[name].shape,
                stride=own[name].stride(),
            )
            for name, values in named.items()
        }

    def _free(self) -> None:
        """Free what a forward without a backward has left gathered."""
        for unit in self.units:
            unit.reshard()

    def save(self, path: Path) -> None:
        """Write the state that a bit-identical resume needs to the folder `path`; all ranks write."""
        self._free()
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state = {"model": model, "optimizer": optimizer, "steps": self.steps}
        with _reason():
            state_dict_saver.save(state, checkpoint_id=path / STATE)

    def load(self, path: Path) -> None:
        """Restore what `save` wrote, on any number of ranks."""
        if not (path / STATE).is_dir():
            raise ConfigError(f"{path} holds no FSDP state: it was written by another backend")
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state = {"model": model, "optimizer": optimizer, "steps": 0}
        with _reason():
            state_dict_loader.load(state, checkpoint_id=path / STATE)
        set_state_dict(
            self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        self.steps = state["steps"]


@contextmanager
def _reason() -> Iterator[None]:
    """Raise a rank's own error for the CheckpointException of all ranks, which is not an Exception."""
    try:
        yield
    except CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        raise reason from error


def check_replicas(config: FsdpConfig, ranks: int) -> None:
    """Raise ConfigError if the ranks do not divide over the replicas."""
    if ranks % config.replicas:
        raise ConfigError(f"policy.fsdp.replicas {config.replicas} does not divide the {ranks} ranks")


def make_mesh(ranks: Ranks, replicas: int) -> DeviceMesh:
    """The ranks that share the weights; with several `replicas`, each of them holds all weights."""
    kind = ranks.device.type
    if replicas == 1:
        return init_device_mesh(kind, (ranks.size,))
    return init_device_mesh(kind, (replicas, ranks.size // replicas), mesh_dim_names=("replicate", "shard"))


def shard(scorer: Scorer, mesh: DeviceMesh, reshard: bool) -> list[FSDPModule]:
    """Shard a scorer's model in place, and return what is gathered together: the scorer, then each layer.

    Raises ConfigError for a model whose layers cannot be told.
    """
    layers = find_layers(scorer.model)
    dtypes = {p.dtype for p in scorer.parameters() if p.requires_grad and p.dtype in HALF}
    half = next(iter(dtypes), None)
    precision = MixedPrecisionPolicy(
        param_dtype=half, reduce_dtype=half and torch.float32, cast_forward_inputs=False
    )
    for module in (*layers, scorer):
        for p in module.parameters():
            if p.requires_grad and not isinstance(p, DTensor):
                p.data = p.data.float()
        fully_shard(
            module, mesh=mesh, reshard_after_forward=reshard and module is not scorer, mp_policy=precision
        )
    units: list[Any] = [scorer, *layers]
    for unit in units:  # the loss is divided by global counts already
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    # scores are parts of one tensor, which nobody changes in place
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(FSDPScorer\) returned a view")
    compat.set_root(scorer.model, scorer)
    return units


def find_layers(model: Any) -> list[nn.Module]:
    """The decoder layers of a model of transformers; ConfigError if it does not name them."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers: list[nn.Module] = [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) or type(module).__name__ in names
    ]
    if not layers:
        raise ConfigError(
            f"policy.backend fsdp: {type(model).__name__} does not say which modules are its layers "
            "(_no_split_modules); use torch or deepspeed"
        )
    return layers


def _dtensor(p: Any) -> DTensor:
    assert isinstance(p, DTensor), "all parameters are sharded between forwards"
    return p
