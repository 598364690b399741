"""The likeliest tokens of a frozen model's prediction of each document token: soft targets come from them.

Legend: M trunk tokens, K tokens of each prediction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlpretrain.scoring.logp_cache import digest
from rlpretrain.scoring.references import Reference
from rlpretrain.types import Likeliest, MicroBatch

EXACT = 2**24
"""Token ids below this are exact in float32, in which the cache keeps them beside the log-probs."""


class Teacher:
    """The model of `reference.path`, or the initial one, for objectives with need "teacher".

    It reads the same rows as the policy, with the same packing and precision. Where texts are scored again
    its numbers are cached as those of the reference are, 2 K for each token. A micro-batch is scored as a
    whole unless all of its documents are cached.
    """

    def __init__(self, reference: Reference):
        self.reference = reference

    @torch.no_grad()
    def __call__(self, micro: MicroBatch, count: int, temperature: float = 1.0) -> Likeliest:
        """The `count` likeliest tokens of each prediction, or the whole vocabulary if it is smaller.

        Their log-probs (nats) are those of logits / `temperature` over the whole vocabulary, on the teacher's
        device. Under ZeRO-3 all ranks call it together.
        """
        reference, documents = self.reference, micro.documents
        device = next(reference.frozen.model.parameters()).device
        keys = [f"{count}:{temperature}:{digest(document.token_ids, context=1)}" for document in documents]
        if reference.cache is not None and (known := reference.known(keys)) is not None:
            return _split(torch.cat(known or [torch.zeros(0, 2 * count)]).to(device))
        micro = micro.to(device)
        rows, labels = micro.trunk_rows, micro.trunk_labels
        inputs = (micro.input_ids, micro.attention_mask, micro.position_ids, rows, labels, temperature)
        with reference.precision(device):
            logps, ids = reference.frozen.scorer(*inputs, "likeliest", micro.tree, None, None, count)
        if reference.cache is not None:
            assert not ids.numel() or int(ids.max()) < EXACT, "ids would be rounded"
            both = torch.cat([ids.float(), logps.float()], 1).cpu()
            reference.asked += len(both)
            sizes = [len(document.token_ids) - 1 for document in documents]
            for key, numbers in zip(keys, both.split(sizes), strict=True):
                reference.cache.add(key, numbers)
        return Likeliest(ids, logps.float())


def _split(both: Tensor) -> Likeliest:
    """Ids and log-probs from the numbers of the cache."""
    ids, logps = both.chunk(2, dim=1)
    return Likeliest(ids.long(), logps)
