"""How weights travel into an engine."""

from __future__ import annotations

import torch
from torch import nn

from rollout.types import WeightSource


def copy_weights(model: nn.Module, weights: WeightSource) -> None:
    """Copy the tensors of a weight source into the parameters (and persistent buffers) of the same names.

    Each is cast to the type and device of its parameter. Every parameter must come under at least one of its names
    (tied weights have several). Raises ValueError, naming the parameters, for unknown names, other shapes and missing
    parameters; tensors that came before the fault was found have then been copied.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    kept = model.state_dict().keys()  # persistent buffers are in it, others are not
    accepted = own | {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name in kept}
    given: set[int] = set()
    unknown: list[str] = []
    with torch.no_grad():
        for name, tensor in weights():
            if name not in accepted:
                unknown.append(name)
                continue
            own_tensor = accepted[name]
            if own_tensor.shape != tensor.shape:
                raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, the engine has {tuple(own_tensor.shape)}")
            own_tensor.copy_(tensor)
            given.add(id(own_tensor))
    missing = [name for name, parameter in own.items() if id(parameter) not in given]
    if unknown or missing:
        parts = [f"{what}: {', '.join(names)}" for what, names in (("unknown", unknown), ("missing", missing)) if names]
        raise ValueError("the weights do not fit the engine's model; " + "; ".join(parts))
