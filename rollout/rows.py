"""Sequences that grow by one token a step: each context is read once, and its cache forked to its thoughts.

R rows, B contexts, T context tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

logger = logging.getLogger(__name__)

_REFUSALS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


class Path(StrEnum):
    """How a model's rows are decoded."""

    PADDED = "padded"  # attention keys and values only: contexts of different lengths, padded on the left
    EQUAL_LENGTH = "equal_length"  # a forkable cache of more than that (Mamba, hybrids), or no position_ids
    RECOMPUTE = (
        "recompute"  # no forkable cache (RWKV, custom code): every step reads the whole sequence again
    )


class Reader:
    """A model and how to call it: its argument names, and the decoding path found by trying its cache."""

    def __init__(self, model: Any, probe: Sequence[int]) -> None:
        """Find the path: read the first tokens of `probe` (at least one), fork the cache, and read on."""
        self.model = model
        # an adapter of PEFT hides the signature of the model
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        accepts = inspect.signature(inner.forward).parameters
        self.cache_name = "cache_params" if "cache_params" in accepts else "past_key_values"
        self.options: dict[str, Any] = {"use_cache": True, "return_dict": True}
        if "logits_to_keep" in accepts:
            self.options["logits_to_keep"] = 1
        self.path = self._try_cache(probe[:8])
        if self.path == Path.PADDED and not {"attention_mask", "position_ids"} <= accepts.keys():
            self.path = Path.EQUAL_LENGTH
        self.options["use_cache"] = self.path != Path.RECOMPUTE

    def _try_cache(self, probe: Sequence[int]) -> Path:
        """The path that the model's cache allows."""
        ids = torch.tensor([probe], device=self.model.device)
        try:
            _, cache = self.read(ids)
            cache.reorder_cache(torch.zeros(2, dtype=torch.long, device=ids.device))
            forked, _ = self.read(ids[:, -1:].expand(2, 1), cache)
            difference = self._difference(forked, torch.cat([ids, ids[:, -1:]], 1))
            if difference > (1e-3 if forked.dtype == torch.float32 else 0.1):
                raise RuntimeError(f"with it, log-probs differ by {difference:.2g} nats on average")
        except _REFUSALS as error:
            logger.warning(
                "%s has no cache that can be forked (%s): every step will read the whole sequence again, "
                "which is slow",
                type(self.model).__name__,
                error,
            )
            return Path.RECOMPUTE
        plain = isinstance(cache, Cache) and all(
            type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
        )
        return Path.PADDED if plain else Path.EQUAL_LENGTH

    def _difference(self, forked: Tensor, ids: Tensor) -> float:
        """Mean difference (nats) of the next log-probs from those of a model that reads `ids` at once."""
        whole, _ = self.read(ids)
        return float((forked.float().log_softmax(-1) - whole.float().log_softmax(-1)).abs().mean())

    def read(self, ids: Tensor, cache: Any = None, **options: Any) -> tuple[Tensor, Any]:
        """Run the model on `ids` [R, T] after `cache`: logits of the next token [R, V], and the new cache."""
        if cache is not None:
            options[self.cache_name] = cache
        output = self.model(input_ids=ids, **self.options, **options)
        return output.logits[:, -1], getattr(output, self.cache_name, None)


class Rows:
    """The sequences being decoded: after each change, `logits` [R, V] are those of every row's next token."""

    def __init__(self, reader: Reader, contexts: Sequence[Sequence[int]], copies: int, room: int) -> None:
        """Read each context once and fork it to `copies` rows, which may grow by `room` tokens.

        Contexts of different lengths need the padded path: they are padded on the left, with mask and
        positions to match, for models with learned positions as well as rotary ones.
        """
        self.reader, device = reader, reader.model.device
        lengths = [len(context) for context in contexts]
        self.width = max(lengths)
        ids = torch.tensor([[0] * (self.width - len(c)) + list(c) for c in contexts], device=device)
        self.mask: Tensor | None = None
        self.positions: Tensor | None = None
        if min(lengths) < self.width:
            padding = self.width - torch.tensor(lengths, device=device)
            offsets = torch.arange(self.width + room, device=device) - padding[:, None]
            self.mask, self.positions = (offsets >= 0).long(), offsets.clamp(min=0)
        self.logits, self.cache = reader.read(ids, **self._places(0))
        self.ids = ids if reader.path == Path.RECOMPUTE else None  # a cache remembers the rest
        for i, layer in enumerate(getattr(self.cache, "layers", ()) if self.ids is None else ()):
            if type(layer) is DynamicLayer and layer.get_seq_length() > 0:
                self.cache.layers[i] = _RoomyLayer(layer)
        if copies > 1:
            self.keep(torch.arange(len(contexts), device=device).repeat_interleave(copies))

    def keep(self, indices: Tensor) -> None:
        """Keep only the rows of these indices; an index that appears twice forks its row."""
        self.logits = self.logits[indices]
        if self.mask is not None and self.positions is not None:
            self.mask, self.positions = self.mask[indices], self.positions[indices]
        if self.ids is not None:
            self.ids = self.ids[indices]
        else:
            self.cache.reorder_cache(indices)

    def step(self, tokens: Tensor) -> None:
        """Append one token [R] to every row."""
        self.width += 1
        if self.ids is not None:
            self.ids = torch.cat([self.ids, tokens[:, None]], 1)
            self.logits, _ = self.reader.read(self.ids)
        else:
            self.logits, self.cache = self.reader.read(
                tokens[:, None], self.cache, **self._places(self.width - 1)
            )

    def _places(self, start: int) -> dict[str, Tensor]:
        """Mask and positions of the tokens from `start` on; empty if no row is padded."""
        if self.mask is None or self.positions is None:
            return {}
        return {
            "attention_mask": self.mask[:, : self.width],
            "position_ids": self.positions[:, start : self.width],
        }


@contextmanager
def sampling_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every submodule has its former mode.

    A model of transformers runs in `torch.inference_mode`, which saves a small model a tenth of its time.
    Tensors that it rebuilt meanwhile (rotary frequencies for a longer sequence) are then replaced by
    ordinary copies, which training can use. Models with hooks, which may swap parameters (ZeRO,
    offloading), and models of custom code run in `torch.no_grad`.

    cuDNN's attention is left out: it plans anew for each length, that is, for each token. Which other kernels
    torch may use is left as it is.
    """
    modules = list(model.modules())
    training = [module for module in modules if module.training]
    is_plain = type(model).__module__.startswith("transformers.") and not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in modules
    )
    uses_cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    for module in training:
        module.training = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with torch.inference_mode() if is_plain else torch.no_grad():
            yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(uses_cudnn)
        for module in training:
            module.training = True
        stores = [store for module in modules for store in (vars(module), module._buffers)]
        for store in stores if is_plain else ():
            for name, value in store.items():
                if isinstance(value, Tensor) and value.is_inference():
                    store[name] = value.clone()


class _RoomyLayer(DynamicLayer):
    """A `DynamicLayer` that appends to spare room instead of copying all keys and values at every token."""

    def __init__(self, layer: DynamicLayer) -> None:
        """Take over the keys and values [R, heads, T, size] of a layer that is not empty."""
        super().__init__()
        assert layer.keys is not None and layer.values is not None
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values
        self._make_room(self.get_seq_length())

    def _show(self, end: int) -> None:
        """Make the first `end` tokens the keys and values."""
        self.keys, self.values = self._keys[..., :end, :], self._values[..., :end, :]

    def _make_room(self, end: int) -> None:
        """Allocate room for `end` tokens and half as many more, so that this happens seldom."""
        assert self.keys is not None and self.values is not None
        spare = end + end // 2 + 16 - self.get_seq_length()
        self._keys, self._values = F.pad(self.keys, (0, 0, 0, spare)), F.pad(self.values, (0, 0, 0, spare))

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [R, heads, new, size]; returns all so far."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self._keys.shape[-2]:
            self._make_room(end)
        self._keys[..., start:end, :] = key_states
        self._values[..., start:end, :] = value_states
        self._show(end)
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep only these rows."""
        end = self.get_seq_length()
        self._keys, self._values = (
            self._keys.index_select(0, beam_idx),
            self._values.index_select(0, beam_idx),
        )
        self._show(end)
