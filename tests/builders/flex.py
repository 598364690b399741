"""FlexAttention with gradients on a CPU: torch refuses them by a check of the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.nn.attention import flex_attention as library

from rlpretrain.scoring.attention import flex, interface


class Compilations:
    """A backend that runs the graphs that dynamo hands over, and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[Any] = []

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


@contextmanager
def flex_on_cpu() -> Iterator[Compilations]:
    """`flex` takes tensors on a CPU, with gradients, and what it compiles is kept, from nothing.

    Without the check, torch's own definition of the operator computes them; its kernels for GPUs implement
    that definition.
    """
    torch._dynamo.reset()
    backend = Compilations()
    function = torch.compile(flex._attend, dynamic=False, fullgraph=True, backend=backend)
    with (
        mock.patch.object(flex, "compiled", lambda: function),
        mock.patch.object(library, "_validate_device", lambda *tensors: None),
    ):
        yield backend
    torch._dynamo.reset()


@contextmanager
def models_use_flex() -> Iterator[list[Any]]:
    """Models with trees on a CPU attend by `flex`; gives the trees of its calls."""
    trees: list[Any] = []

    def attend(*args: Any) -> torch.Tensor:
        trees.append(args[3])
        return flex.flex(*args)

    with (
        mock.patch.object(interface, "uses_flex", lambda x: True),
        mock.patch.object(interface, "flex", attend),
    ):
        yield trees
