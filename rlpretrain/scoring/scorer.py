"""MicroBatch → log-probabilities of thoughts, targets and trunk, in one forward.

Only the rows that count reach the LM head, in chunks (`rewards.token_logps`); nothing of size tokens ×
vocabulary is held. Legend: see rlpretrain/types.py; K counted rows, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rewards import token_logps
from rewards.likelihood import row_entropies
from rlpretrain.compat import backbone_of, gathered, head_of, sharded
from rlpretrain.models import adapters
from rlpretrain.models.lengths import limit_of
from rlpretrain.models.spending import Reads, read_by
from rlpretrain.scoring.attention.interface import placeholder
from rlpretrain.tree import Tree
from rlpretrain.types import MicroBatch, Scores


class Scorer(nn.Module):
    """A causal LM whose forward gives log-probabilities of given tokens instead of logits.

    Backbone and head both run inside this forward, so that DeepSpeed can gather sharded parameters around it.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.limit, self.reads = model, limit_of(model), Reads()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None,
        rows: Tensor,
        labels: Tensor,
        temperature: Tensor | float = 1.0,
        want: str = "logps",
        tree: Tree | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs [K] of `labels` given the states at `rows` of the flattened input; `want` adds
        entropies or argmaxes [K].
        """
        longest = input_ids.shape[1] if tree is None else tree.deepest
        if self.limit is not None and longest > self.limit.tokens:
            raise ValueError(
                f"a row of {longest} tokens is to be scored, but {self.limit.reason}: shorten documents or "
                "thoughts"
            )
        self.reads.add_forward(
            *read_by(input_ids, attention_mask, position_ids, tree), torch.is_grad_enabled()
        )
        extra: dict[str, Any] = {} if position_ids is None else {"position_ids": position_ids}
        if tree is not None:
            attention_mask, extra["tree"] = placeholder(input_ids.device), tree
        hidden = self.hidden(input_ids, attention_mask, **extra).flatten(0, 1)[rows]
        return self.read(hidden, labels, temperature, want)

    def read(
        self, hidden: Tensor, labels: Tensor, temperature: Tensor | float, want: str
    ) -> tuple[Tensor, Tensor | None]:
        """What the head says of `labels` [K] given the states [K, H]."""
        head = head_of(self.model)
        form = {"bias": head.bias, "softcap": head.softcap, "scale": head.scale}
        logps = token_logps(hidden, head.weight, labels, temperature=temperature, **form)
        if want == "entropies":
            return logps, row_entropies(hidden, head.weight, **form)
        return logps, top_tokens(hidden, head.weight, head.bias) if want == "top" else None

    def hidden(self, input_ids: Tensor, attention_mask: Tensor, **extra: Any) -> Tensor:
        """Final hidden states [R, S, H]."""
        out = backbone_of(self.model)(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **extra
        )
        return out.last_hidden_state


class NoGradScorer(Scorer):
    """A scorer of a model that is being trained by somebody else: without gradient, and with its adapters off
    if `adapters_off`.

    Where ZeRO-3 has sharded the model its layers are gathered by their own hooks, the head here: all ranks
    must call it equally often (`sharded`).
    """

    def __init__(self, model: nn.Module, adapters_off: bool = False):
        super().__init__(model)
        self.adapters_off = adapters_off

    @property
    def sharded(self) -> bool:
        """Whether a forward is an affair of all ranks."""
        return sharded(self.model)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As Scorer's."""
        with adapters.off(self.model) if self.adapters_off else nullcontext():
            return super().forward(*args, **kwargs)

    def read(
        self, hidden: Tensor, labels: Tensor, temperature: Tensor | float, want: str
    ) -> tuple[Tensor, Tensor | None]:
        """With the whole head."""
        with gathered(self.model.get_output_embeddings().parameters()):  # type: ignore[operator]
            return super().read(hidden, labels, temperature, want)


@torch.no_grad()
def top_tokens(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, chunk: int = 1024) -> Tensor:
    """The likeliest token [K] after each state; soft-capping and positive scaling leave it as it is."""
    tops = [nn.functional.linear(part, weight, bias).argmax(-1) for part in hidden.split(chunk)]
    return torch.cat(tops) if tops else hidden.new_zeros(0, dtype=torch.long)


def score(
    scorer: nn.Module,
    micro: MicroBatch,
    temperature: float = 1.0,
    *,
    entropies: bool = False,
    hits: bool = False,
) -> Scores:
    """Scores of a micro-batch; with `entropies` those of the trunk, or with `hits` where a target token is
    the likeliest.

    `scorer` is a Scorer or what wraps one (a DeepSpeed engine). Thoughts are scored at `temperature`,
    everything else at 1. Entries outside the masks are 0. Raises ValueError for entropies and hits at once:
    they are read off different rows.
    """
    if entropies and hits:
        raise ValueError("score gives entropies or hits, not both at once")
    seen = micro.target_mask[:, None, :] & micro.counted[:, :, None]
    parts = [
        (micro.thought_rows, micro.thought_labels, micro.thought_mask),
        (micro.target_rows, micro.target_labels[:, None, :].expand_as(micro.target_rows), seen),
        (micro.baseline_rows, micro.target_labels, micro.target_mask & (micro.baseline_rows >= 0)),
        (micro.trunk_rows, micro.trunk_labels, torch.ones_like(micro.trunk_rows, dtype=torch.bool)),
    ]
    rows = torch.cat([r[m] for r, _, m in parts])
    labels = torch.cat([y[m] for _, y, m in parts])
    heat = torch.ones(len(rows), device=rows.device)
    heat[: int(micro.thought_mask.sum())] = temperature or 1.0
    want = "entropies" if entropies else "top" if hits else "logps"
    logps, more = scorer(
        micro.input_ids, micro.attention_mask, micro.position_ids, rows, labels, heat, want, micro.tree
    )

    sizes = [int(m.sum()) for _, _, m in parts]
    thoughts, targets, baselines, trunk = (
        torch.zeros(m.shape, dtype=v.dtype, device=v.device).masked_scatter(m, v)
        for v, (_, _, m) in zip(logps.split(sizes), parts, strict=True)
    )
    scores = Scores(thoughts, targets, baselines.detach(), trunk, micro.target_mask, micro.counted)
    if entropies:
        return replace(scores, trunk_entropies=more.split(sizes)[3])
    if hits:
        _, after, alone, _ = (
            torch.zeros(m.shape, dtype=torch.bool, device=m.device).masked_scatter(m, v == y[m])
            for v, (_, y, m) in zip(more.split(sizes), parts, strict=True)
        )
        return replace(scores, target_hits=after, baseline_hits=alone)
    return scores


def score_function(scorer: Scorer, **extras: bool) -> Callable[[MicroBatch], Scores]:
    """`score` with a scorer and what is asked of it: what `groups` scores micro-batches by."""
    return partial(score, scorer, **extras)
