"""Muon for the matrices of a model's body and AdamW for the rest, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimizers of torch behind one list of groups and one state.

    `algorithm` of a group says which of them trains it. Muon orthogonalises the update of a matrix of hidden
    layers; embeddings, the head and vectors need another optimizer (documentation of torch.optim.Muon).
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], lr: float, betas: tuple[float, float], **options: Any
    ):
        muon = [group for group in groups if group["algorithm"] == "muon"]
        rest = [group for group in groups if group["algorithm"] != "muon"]
        self.parts: list[torch.optim.Optimizer] = []
        if muon:
            self.parts.append(torch.optim.Muon(muon, lr=lr, **options))
        if rest:
            self.parts.append(torch.optim.AdamW(rest, lr=lr, betas=betas, fused=True))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both optimizers use the groups and the state of this one."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        assert closure is None, "a run computes its gradients before the step"
        for part in self.parts:
            part.step()
