"""Random output heads, and a watch on the size of the tensors that reading them makes."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def problem(
    rows: int = 10, hidden: int = 8, vocabulary: int = 37, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random hidden states, weight and bias of a head, with gradient, and a label for each row."""
    generator = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((rows, hidden), (vocabulary, hidden), (vocabulary,))
    ]
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    return *(values.to(dtype).requires_grad_() for values in made), labels  # type: ignore[return-value]


class Watch(TorchDispatchMode):
    """Records the largest tensor any operation makes, and how often each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.calls = 0, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] = self.calls.get(func.overloadpacket.__name__, 0) + 1
        if isinstance(result, Tensor) and not result._is_view():
            self.largest = max(self.largest, result.numel())
        return result
