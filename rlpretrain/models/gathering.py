"""Whole weights of a model that ZeRO-3 or FSDP 2 shards, whoever sharded it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rlpretrain.compat import gathered
from rlpretrain.models.merging import Piece, pieces


def whole_weights(model: nn.Module, root: nn.Module | None = None) -> Iterator[tuple[str, Tensor]]:
    """The weights under their checkpoint names, adapters merged in, of a model that is sharded or not.

    `model` is the causal language model, `root` what was sharded if `model` stands inside it. All ranks go
    through the weights together. Under ZeRO-3 a tensor is whole only until the next one is asked for.
    """
    whole = model if root is None else root
    units = [module for module in whole.modules() if isinstance(module, FSDPModule)]
    if units:
        yield from gather_units(units, lambda: pieces(model))
        return
    for piece in pieces(model):
        with gathered(piece.needs):
            yield piece.name, piece.make().detach()


def gather_units(
    units: Sequence[FSDPModule], find: Callable[[], Iterator[Piece]]
) -> Iterator[tuple[str, Tensor]]:
    """The pieces of each of FSDP 2's units while it is gathered; the first unit is the root."""
    by_state = {id(_state_of(unit)): unit for unit in units}  # modules that were sharded together share one
    _state_of(units[0])._lazy_init()  # before the first forward
    for unit in by_state.values():
        unit.reshard()
    for unit in by_state.values():
        unit.unshard()
        try:
            for piece in find():
                if not any(isinstance(p, DTensor) for p in piece.needs):
                    # FSDP frees the memory below a gathered tensor, which a caller may still hold
                    yield piece.name, piece.make().clone()
        finally:
            unit.reshard()


def _state_of(unit: Any) -> Any:
    return unit._get_fsdp_state()
