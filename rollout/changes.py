"""Weights as the numbers that changed since the last sync: found and applied.

In half precision most numbers stay at a small learning rate (docs/rollout.md has counts). A tensor's changes
are two: `NAME@places` [n], where they are in the flattened tensor, and `NAME@values` [n]. A tensor that
would not be smaller so stands whole under its own name, and one without a change does not stand there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rollout.weights import Parameter

PLACES, VALUES = "@places", "@values"
BASE = "base"
"""In a file's metadata: the mark of the weights that changed."""
FOLLOWED = "followed"
"""In the metadata of whole weights: changes of them will come, so their reader keeps them."""
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def changes_between(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `apply_changes` needs to make `after` of `before`, bit by bit; both have the same names."""
    changes = {}
    for name, tensor in after.items():
        places = _places(before[name], tensor)
        if places is None or places.nbytes + len(places) * tensor.itemsize >= tensor.nbytes:
            changes[name] = tensor
        elif len(places):
            changes |= {name + PLACES: places, name + VALUES: tensor.flatten()[places.long()]}
    return changes


def _places(before: Tensor, after: Tensor) -> Tensor | None:
    """Where two tensors differ in their bits, [n]; None if they have other types or shapes."""
    if (before.dtype, before.shape) != (after.dtype, after.shape):
        return None
    bits = BITS[after.itemsize]
    places = (before.flatten().view(bits) != after.flatten().view(bits)).nonzero().squeeze(1)
    return places.int() if after.numel() < 1 << 31 else places


def apply_changes(state: dict[str, Tensor], changes: Mapping[str, Tensor]) -> None:
    """Write changes into contiguous tensors.

    Raises ValueError, before any is written, if one does not fit.
    """
    for name, tensor in changes.items():
        _check(state, name, tensor, changes)
    for name, tensor in changes.items():
        if name.endswith(PLACES):
            own = name.removesuffix(PLACES)
            state[own].view(-1)[tensor.long()] = changes[own + VALUES]
        elif not name.endswith(VALUES):
            state[name] = tensor.clone()


def _check(state: Mapping[str, Tensor], name: str, tensor: Tensor, changes: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless an entry of changes fits the weights and its other half."""
    own = name.removesuffix(PLACES).removesuffix(VALUES)
    if own not in state:
        raise ValueError(f"the changes have {name}, and the weights have no {own}")
    if own == name:
        if tensor.shape != state[own].shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, and the weights {tuple(state[own].shape)}")
        return
    places, values = changes.get(own + PLACES), changes.get(own + VALUES)
    if places is None or values is None or places.shape != values.shape or places.dim() != 1:
        raise ValueError(f"the changes of {own} have not one value for each place")
    if places.dtype not in (torch.int32, torch.int64) or values.dtype != state[own].dtype:
        raise ValueError(f"the changes of {own} are {values.dtype}, and the weights {state[own].dtype}")
    if len(places) and not 0 <= int(places.min()) <= int(places.max()) < state[own].numel():
        raise ValueError(f"the changes of {own} name places that it does not have")


def once(state: Mapping[str, Tensor], parameters: Sequence[Parameter]) -> dict[str, Tensor]:
    """Every parameter under one name: tied weights have several."""
    return {p.names[0]: state[p.names[0]] for p in parameters}
