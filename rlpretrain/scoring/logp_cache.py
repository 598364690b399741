"""A cache of the log-probs that a frozen model gives to token sequences."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlpretrain.types import MicroBatch


def digest(ids: Sequence[int] | np.ndarray, *, context: int = 0) -> str:
    """The key of a sequence of ids, of which the first `context` are read and not predicted."""
    written = np.asarray([context, *ids], np.int64).tobytes()
    return blake2b(written, digest_size=16).hexdigest()


def keys_of(micro: MicroBatch) -> list[str]:
    """Keys of the documents, then of the thoughts in the loss, which depend on their prompts too."""
    keys = [digest(document.token_ids, context=1) for document in micro.documents]
    for b, g in micro.thought_mask.any(-1).nonzero().tolist():
        group = micro.groups[b]
        prompt = group.prompt.token_ids
        keys.append(digest((*prompt, *group.thoughts[g].token_ids), context=len(prompt)))
    return keys


class LogpCache:
    """Up to `keep` numbers, by the digest of the ids; those used least recently are dropped.

    A sequence has a log-prob for each predicted token [n], or several numbers [n, width].
    """

    def __init__(self, keep: int):
        self.keep, self.kept = keep, 0
        self.known: OrderedDict[str, Tensor] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        return key in self.known

    def __getitem__(self, key: str) -> Tensor:
        return self.known[key]

    def add(self, key: str, logps: Tensor) -> None:
        """Keep log-probs under a key. Those of a known key stay, and count as used."""
        if key in self.known:
            self.known.move_to_end(key)
            return
        self.known[key], self.kept = logps.detach().cpu().clone(), self.kept + logps.numel()
        while self.kept > self.keep:
            _, dropped = self.known.popitem(last=False)
            self.kept -= dropped.numel()

    def take(self, keys: Iterable[str]) -> list[Tensor] | None:
        """The log-probs of all keys, which count as used; None if one of them is not known."""
        wanted = list(keys)
        if any(key not in self.known for key in wanted):
            return None
        for key in wanted:
            self.known.move_to_end(key)
        return [self.known[key] for key in wanted]

    def state_dict(self) -> dict[str, Any]:
        """The contents, from the least recently used on."""
        values = list(self.known.values())
        return {
            "keys": list(self.known),
            "sizes": [logps.numel() for logps in values],
            "widths": [logps.shape[1] if logps.ndim > 1 else 0 for logps in values],
            "logps": torch.cat([logps.flatten() for logps in values]) if values else torch.zeros(0),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the contents by what `state_dict` returned."""
        self.known, self.kept = OrderedDict(), 0
        widths = state.get("widths", [0] * len(state["keys"]))  # none in older versions
        parts = state["logps"].split(state["sizes"])
        for key, logps, width in zip(state["keys"], parts, widths, strict=True):
            self.add(key, logps.view(-1, width) if width else logps)
