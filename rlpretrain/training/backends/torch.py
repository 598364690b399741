"""The policy in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlpretrain.config import OptimConfig, PolicyConfig
from rlpretrain.models.adapters import adapter_pieces, pieces
from rlpretrain.ranks import Ranks
from rlpretrain.scoring.scorer import Scorer, score
from rlpretrain.training.backends.base import StepInfo, apply_gradients, copy_trained, trained_parameters
from rlpretrain.training.backends.masters import make_masters
from rlpretrain.training.optim import groups_for, make_optimizer
from rlpretrain.training.schedules import make_schedule
from rlpretrain.types import MicroBatch, Scores


class TorchPolicy:
    """Plain PyTorch, 1..n processes. Half-precision weights are trained through float32 copies, `masters`."""

    shares_weights = True
    stage_gathers = False
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
        self.model, self.scorer, self.ranks = model, Scorer(model), ranks
        self.optim, self.temperature = optim, temperature
        self.autocast = config.autocast == "bfloat16"
        self.masters = make_masters(model)
        copies = {id(p): m for p, m in self.masters}
        self.updated = [copies.get(id(p), p) for p in model.parameters() if p.requires_grad]
        groups = groups_for(model, optim)
        for group in groups:
            group["params"] = [copies.get(id(p), p) for p in group["params"]]
        self.optimizer = make_optimizer(groups, optim)
        self.factor, self.steps = make_schedule(optim, total_steps, inner_epochs), 0

    def score(self, micro: MicroBatch, *, entropies: bool = False) -> Scores:
        """The scores of a micro-batch in one forward, with their graph; see `scoring.score`."""
        context = torch.autocast(self.ranks.device.type, torch.bfloat16) if self.autocast else nullcontext()
        with context:
            return score(self.scorer, micro.to(self.ranks.device), self.temperature, entropies=entropies)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` to the gradient of this step."""
        loss.backward()

    def step(self) -> StepInfo:
        """Sum gradients over ranks, clip, update, clear; a NaN or inf gradient changes nothing."""
        for tensor in self.updated:
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
            if self.ranks.size > 1:
                dist.all_reduce(tensor.grad)
        limit = self.optim.clip_grad_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(self.updated, limit))
        lr = self.optim.lr * self.factor(self.steps)
        applied = apply_gradients(self.optimizer, norm, lr)
        self.steps += applied
        if applied:
            with torch.no_grad():
                for p, m in self.masters:
                    p.copy_(m)
        return StepInfo(norm, lr, applied)

    def discard(self) -> None:
        """Drop the gradient of this step."""
        for tensor in self.updated:
            tensor.grad = None

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, full tensor) pairs as transformers names them, adapters merged in.

        A tied tensor is given under each of its names.
        """
        return ((piece.name, piece.make()) for piece in pieces(self.model))

    def adapter(self) -> Iterator[tuple[str, Tensor]]:
        """The adapters alone, as PEFT names them in files."""
        return ((piece.name, piece.make()) for piece in adapter_pieces(self.model))

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """(name, values) of each trained parameter, whole on every rank; writing to them changes it."""
        return ((name, p.detach()) for name, p in trained_parameters(self.model).items())

    def save(self, path: Path) -> None:
        """Write the state that a bit-identical resume needs to the folder `path`."""
        if self.ranks.first:
            # a quantized base is loaded from its own files, not from the checkpoint
            rounded = getattr(self.model, "is_quantized", False)
            model = trained_parameters(self.model) if rounded else self.model.state_dict()
            state = {
                "model": model,
                "optimizer": self.optimizer.state_dict(),
                "steps": self.steps,
                "masters": [m.detach() for _, m in self.masters],
            }
            torch.save(state, path / "policy.pt")

    def load(self, path: Path) -> None:
        """Restore what `save` wrote."""
        state = torch.load(path / "policy.pt", map_location=self.ranks.device, weights_only=True)
        if getattr(self.model, "is_quantized", False):
            copy_trained(state["model"], self.model)
        else:
            self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        # an older checkpoint has the state of a LambdaLR instead
        self.steps = state["steps"] if "steps" in state else state["scheduler"]["last_epoch"]
        with torch.no_grad():
            for (_, m), saved in zip(self.masters, state["masters"], strict=True):
                m.copy_(saved)
