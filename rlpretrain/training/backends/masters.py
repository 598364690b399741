"""float32 copies of half-precision weights, through which an optimizer trains them.

An update far below a weight's resolution in bfloat16 (2^-9 of the weight) would be rounded away; in the copy
such updates add up. Gradients of micro-batches add up in float32 for the same reason. This is mixed
precision as in Micikevicius et al. (arXiv 1710.03740, §3.1), with bfloat16, which needs no loss scaling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


def make_masters(model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    """Return each trained half-precision parameter with its float32 copy.

    As soon as backward has a parameter's gradient, a hook adds it to the gradient of the copy and frees it.
    """
    masters = []
    for parameter in model.parameters():
        if not parameter.requires_grad or parameter.dtype not in HALF:
            continue
        master = parameter.detach().float().requires_grad_()
        collect_gradient(parameter, master)
        masters.append((parameter, master))
    return masters


@dataclass(slots=True)
class GradientSum:
    """The sum of a parameter's gradients in float32; None before the first."""

    grad: Tensor | None = None


def collect_gradient(parameter: nn.Parameter, target: Tensor | GradientSum) -> None:
    """Let each backward add the gradient of `parameter` to `target.grad` in float32, and free it."""

    def move(updated: Tensor) -> None:
        assert updated.grad is not None, "backward has just set it"
        if target.grad is None:
            target.grad = updated.grad.float()
        else:
            target.grad.add_(updated.grad)
        updated.grad = None

    parameter.register_post_accumulate_grad_hook(move)
