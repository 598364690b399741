"""Compute the log-probabilities of thoughts, targets and trunk of a micro-batch in one forward.

Only the rows that count reach the LM head, in chunks (`rewards.token_logps`); nothing of size tokens ×
vocabulary is held. Legend: see rlpretrain/types.py; K counted rows, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rewards import candidate_logps, token_logps, top_logps
from rewards.likelihood import row_entropies
from rlpretrain.compat import backbone_of, gathered, gathered_root, head_of, sharded
from rlpretrain.models import adapters
from rlpretrain.models.lengths import limit_of
from rlpretrain.models.routers import ASK, balance_loss
from rlpretrain.models.spending import Reads, read_by
from rlpretrain.scoring.attention.interface import pad_to_blocks, placeholder
from rlpretrain.tree import Tree
from rlpretrain.types import MicroBatch, Scores


class Scorer(nn.Module):
    """A causal LM whose forward gives log-probabilities of given tokens instead of logits.

    Backbone and head both run inside this forward, so that DeepSpeed can gather sharded parameters around it.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.limit, self.reads = model, limit_of(model), Reads()
        self.experts: int | None = None
        """How many experts take a token, where the balance of the experts is trained."""
        self.balance: Tensor | None = None
        """`balance_loss` of the latest forward with a gradient."""

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
        want_rows: tuple[int, int] | None = None,
        candidates: Tensor | None = None,
        count: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs [K] of `labels` given the states at `rows` of the flattened input.

        `want` is "logps", or adds "entropies", the likeliest token ("top"), or the log-probs of `candidates`
        ("candidates", at temperature 1): those of `rows` in the slice `want_rows`, of all by default. With
        "likeliest" the result is, instead, log-probs and ids [K, count] of the `count` likeliest tokens; with
        "likeliest, label first" the log-probs [K, 1 + count] begin with those of `labels`.
        """
        longest = input_ids.shape[1] if tree is None else tree.deepest
        if self.limit is not None and longest > self.limit.tokens:
            raise ValueError(
                f"a row of {longest} tokens is to be scored, but {self.limit.reason}: shorten documents or "
                "thoughts"
            )
        tokens, pairs = read_by(input_ids, attention_mask, position_ids, tree)
        self.reads.add_forward(tokens, pairs, len(rows), trained=torch.is_grad_enabled())
        extra: dict[str, Any] = {} if position_ids is None else {"position_ids": position_ids}
        if tree is not None:
            input_ids, extra = pad_to_blocks(input_ids), {k: pad_to_blocks(x) for k, x in extra.items()}
            attention_mask, extra["tree"] = placeholder(input_ids.device), tree
        if self.experts and torch.is_grad_enabled():
            extra |= ASK
        hidden = self.hidden(input_ids, attention_mask, **extra).flatten(0, 1)[rows]
        return self.read(hidden, labels, temperature, want, want_rows, candidates, count)

    def read(
        self,
        hidden: Tensor,
        labels: Tensor,
        temperature: Tensor | float,
        want: str,
        want_rows: tuple[int, int] | None = None,
        candidates: Tensor | None = None,
        count: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the head to the states [K, H]: log-probs of `labels` [K], and what `want` adds."""
        head = head_of(self.model)
        form = {"bias": head.bias, "softcap": head.softcap, "scale": head.scale}
        if want.startswith("likeliest"):
            ids, tops = top_logps(hidden, head.weight, count, temperature=temperature, **form)
            if want == "likeliest":
                return tops, ids
            own = token_logps(hidden, head.weight, labels, temperature=temperature, **form)
            return torch.cat([own[:, None], tops], 1), ids
        if want == "candidates":
            assert candidates is not None and want_rows is not None, "they go together"
            first = want_rows[0]  # the rows from there on are read once, for label and candidates
            both = torch.cat([labels[first:, None], candidates], 1)
            several = candidate_logps(hidden[first:], head.weight, both, **form)
            heats = temperature[:first] if isinstance(temperature, Tensor) else temperature
            before = token_logps(hidden[:first], head.weight, labels[:first], temperature=heats, **form)
            return torch.cat([before, several[:, 0]]), several[:, 1:]
        logps = token_logps(hidden, head.weight, labels, temperature=temperature, **form)
        hidden = hidden[slice(*want_rows)] if want_rows else hidden
        if want == "entropies":
            return logps, row_entropies(hidden, head.weight, **form)
        return logps, top_tokens(hidden, head.weight, head.bias) if want == "top" else None

    def hidden(self, input_ids: Tensor, attention_mask: Tensor, **extra: Any) -> Tensor:
        """Final hidden states [R, S, H]."""
        out = backbone_of(self.model)(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **extra
        )
        if self.experts and "output_router_logits" in extra:
            tree: Tree | None = extra.get("tree")  # whose tokens may be padded at the end
            flat = torch.arange(input_ids.shape[1], device=input_ids.device)
            real = attention_mask if tree is None else flat < tree.size
            self.balance = balance_loss(out.router_logits, self.experts, real)
        return out.last_hidden_state

    def take_balance(self) -> Tensor | None:
        """`balance` of the latest forward, once."""
        balance, self.balance = self.balance, None
        return balance


class NoGradScorer(Scorer):
    """A scorer of a model that another trainer owns: without gradient, and without adapters on request.

    If ZeRO-3 or FSDP 2 shards the model, hooks of the layers gather their weights, and this class gathers the
    rest. All ranks must then call it equally often (`sharded`).
    """

    def __init__(self, model: nn.Module, adapters_off: bool = False):
        super().__init__(model)
        self.adapters_off = adapters_off

    @property
    def sharded(self) -> bool:
        """Whether all ranks must run a forward together."""
        return sharded(self.model)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As `Scorer.forward`."""
        with adapters.off(self.model) if self.adapters_off else nullcontext(), gathered_root(self.model):
            return super().forward(*args, **kwargs)

    def read(self, *args: Any) -> tuple[Tensor, Tensor | None]:
        """As `Scorer.read`, with the whole head gathered."""
        with gathered(self.model.get_output_embeddings().parameters()):  # type: ignore[operator]
            return super().read(*args)


@torch.no_grad()
def top_tokens(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, chunk: int = 1024) -> Tensor:
    """The likeliest token [K] after each state; soft-capping and positive scaling do not change it."""
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
    """Score a micro-batch.

    `entropies` adds the entropies of the trunk's predictions, `hits` whether a target token is the likeliest.
    A micro-batch with soft targets gets their log-probs, unless one of the two is asked for.
    `scorer` is a Scorer or wraps one (a DeepSpeed engine). Thoughts are scored at `temperature`, everything
    else at 1. Entries outside the masks are 0. Raises ValueError for entropies and hits together, which need
    different rows.
    """
    if entropies and hits:
        raise ValueError("score gives entropies or hits, not both at once")
    soft = micro.soft_ids is not None and not entropies and not hits
    thoughts, targets, baselines, trunk = parts = _parts(micro)
    rows = torch.cat([part.rows[part.mask] for part in parts])
    labels = torch.cat([part.labels[part.mask] for part in parts])
    temperatures = torch.ones(len(rows), device=rows.device)
    temperatures[: int(micro.thought_mask.sum())] = temperature or 1.0
    want = "entropies" if entropies else "top" if hits else "candidates" if soft else "logps"
    sizes = [int(part.mask.sum()) for part in parts]
    before_trunk = sum(sizes[:3])
    want_rows = (before_trunk, len(rows)) if entropies or soft else (sizes[0], before_trunk)
    inputs = (micro.input_ids, micro.attention_mask, micro.position_ids)
    candidates = micro.soft_ids if soft else None
    logps, more = scorer(*inputs, rows, labels, temperatures, want, micro.tree, want_rows, candidates)

    thought_logps, target_logps, baseline_logps, trunk_logps = logps.split(sizes)
    scores = Scores(
        thoughts.spread(thought_logps),
        targets.spread(target_logps),
        baselines.spread(baseline_logps).detach(),
        trunk.spread(trunk_logps),
        micro.target_mask,
        micro.counted,
    )
    whole: Any = scorer  # DeepSpeed's engine passes the attributes of its module on
    if (balance := whole.take_balance()) is not None:
        scores = replace(scores, balance=balance)
    if soft:
        return replace(scores, soft_logps=more)
    if entropies:
        return replace(scores, trunk_entropies=more)
    if hits:
        target_tops, baseline_tops = more.split(sizes[1:3])
        target_hits = targets.spread(target_tops == targets.labels[targets.mask])
        baseline_hits = baselines.spread(baseline_tops == baselines.labels[baselines.mask])
        return replace(scores, target_hits=target_hits, baseline_hits=baseline_hits)
    return scores


@dataclass(frozen=True, slots=True)
class _Part:
    """Log-probs of one kind: the rows and labels of a micro-batch that they are read with."""

    rows: Tensor
    labels: Tensor
    mask: Tensor

    def spread(self, values: Tensor) -> Tensor:
        """Values [K] of the masked entries in the shape of the mask; 0 or False elsewhere."""
        blank = torch.zeros(self.mask.shape, dtype=values.dtype, device=values.device)
        return blank.masked_scatter(self.mask, values)


def _parts(micro: MicroBatch) -> tuple[_Part, _Part, _Part, _Part]:
    """The log-probs of thoughts, targets, no-think targets and trunk."""
    target_labels = micro.target_labels[:, None, :].expand_as(micro.target_rows)
    target_mask = micro.target_mask[:, None, :] & micro.counted[:, :, None]
    baseline_mask = micro.target_mask & (micro.baseline_rows >= 0)
    trunk_mask = torch.ones_like(micro.trunk_rows, dtype=torch.bool)
    return (
        _Part(micro.thought_rows, micro.thought_labels, micro.thought_mask),
        _Part(micro.target_rows, target_labels, target_mask),
        _Part(micro.baseline_rows, micro.target_labels, baseline_mask),
        _Part(micro.trunk_rows, micro.trunk_labels, trunk_mask),
    )


def score_function(scorer: Scorer, **extras: bool) -> Callable[[MicroBatch], Scores]:
    """`score` with a scorer and its extras fixed, for the functions of `groups`."""
    return partial(score, scorer, **extras)
