"""What thinking is worth on held-out text: gain, controls, no-think loss, and hits with and without a
thought.

Every number comes per position, with the document it belongs to; `summary` gives means with 95% intervals
over whole source rows (rlpretrain/evaluation/intervals.py). A thought that did not close itself is closed for
it here, and counted in `unclosed`.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from rewards.controls import other_document, shuffled
from rlpretrain.config import ConfigError, PretrainConfig
from rlpretrain.data.stream import read_all
from rlpretrain.evaluation.intervals import interval, row_of
from rlpretrain.models.lengths import check_rows, limit_of
from rlpretrain.objectives import Objective
from rlpretrain.rollouts.batches import roll_out
from rlpretrain.rollouts.drawing import prepare_held_out
from rlpretrain.scoring.groups import micro_batches, no_think_contexts, score_batch, token_entropies
from rlpretrain.scoring.packing import Layout
from rlpretrain.scoring.scorer import Scorer, score_function
from rlpretrain.types import Batch, Document
from rollout.hf import HFEngine
from rollout.types import FinishReason, Group, Thought

MEANING = {
    "think_sampled": "share of sampled thoughts after which the likeliest continuation is the true one",
    "think_greedy": "the same after the greedy thought",
    "direct": "share of positions where it is so without a thought",
    "gain": "log p(target | context, thought) - log p(target | context) in nats, against the model itself",
    "gain_frozen": "the same against the frozen model without a thought",
    "empty": "gain_frozen of a thought without content",
    "shuffled": "gain_frozen of the thought's own tokens in random order",
    "other": "gain_frozen of a thought made for another document",
    "no_think_loss": "next-token loss on the documents, without thoughts (nats per token)",
    "unclosed": "share of sampled thoughts that did not close themselves",
    "length": "tokens per thought",
    "reward": "reward of thoughts that the objective can judge without log-probabilities",
    "asked": "the same of groups that these asked for (PretrainZero's predictors: their accuracy)",
    "not_finite": (
        "share of positions with a log-probability of NaN or infinity, which are in no mean; only where "
        "there are some"
    ),
}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Numbers per position (`values`), of the documents they belong to (`documents`), and per document
    (`losses`, `tokens`).
    """

    values: dict[str, np.ndarray]
    documents: list[Document]
    losses: np.ndarray
    tokens: np.ndarray
    groups: list[Group]

    @staticmethod
    def join(parts: Sequence[Evaluation]) -> Evaluation:
        """The evaluations of several ranks as one."""
        if len(parts) == 1:
            return parts[0]
        values = {n: np.concatenate([p.values[n] for p in parts]) for n in parts[0].values}
        losses, tokens = (np.concatenate([getattr(p, n) for p in parts]) for n in ("losses", "tokens"))
        return Evaluation(
            values,
            [d for p in parts for d in p.documents],
            losses,
            tokens,
            [g for p in parts for g in p.groups],
        )

    def where(self, keep: Sequence[bool]) -> Evaluation:
        """Only some of the positions, and their documents."""
        mask = np.asarray(keep, bool)
        documents = [d for d, k in zip(self.documents, mask, strict=True) if k]
        groups = [g for g, k in zip(self.groups, mask, strict=True) if k]
        return Evaluation(
            {n: v[mask] for n, v in self.values.items()},
            documents,
            self.losses[mask],
            self.tokens[mask],
            groups,
        )

    def summary(self, seed: int = 0) -> dict[str, float | list[float]]:
        """Mean of every number, and its 95% interval under the same name with `_ci`."""
        out: dict[str, float | list[float]] = {}
        for name, values in self.values.items():
            out[name], out[f"{name}_ci"] = interval(values, rows=self.rows, seed=seed)
        out["no_think_loss"], out["no_think_loss_ci"] = interval(
            self.losses, self.tokens, rows=self.rows, seed=seed
        )
        if broken := self.not_finite:
            out["not_finite"] = broken
        return out

    @property
    def rows(self) -> list[str]:
        """The source row of each position."""
        return [row_of(d.id) for d in self.documents]

    @property
    def not_finite(self) -> float:
        """Share of positions at which a log-probability is NaN or infinite: they are in no mean, and the
        means say less.
        """
        scored = [self.values[n] for n in ("gain", "gain_frozen") if n in self.values]
        fine = np.isfinite([self.losses, *scored]).all(0)
        return float(1 - fine.mean()) if len(fine) else 0.0


def evaluate(
    model: nn.Module,
    objective: Objective,
    documents: Sequence[Document],
    *,
    frozen: nn.Module | None = None,
    thoughts: int = 4,
    seed: int = 0,
    token_budget: int = 16384,
    controls: bool = True,
    greedy: bool = True,
    pad_id: int = 0,
) -> Evaluation:
    """Evaluate `model` at the objective's positions in `documents` (one position a document: the first it
    gives).

    `frozen` is the model, or a scorer of it, whose no-think arm the honest gain is measured against (itself,
    if none). Positions and thoughts depend on `seed` and the document's id only, whatever the ranks and the
    order.
    """
    prepared = [prepare_held_out(objective, document, seed) for document in documents]
    documents = [document for document in prepared if document is not None]
    check_rows(objective, max((len(d.token_ids) for d in documents), default=0), limit_of(model))
    scorer, reference = (
        Scorer(model),
        frozen if isinstance(frozen, Scorer) else Scorer(frozen if frozen is not None else model),
    )
    layout = Layout(token_budget, cut="force_close", pad_id=pad_id)
    entropies: Sequence[Any] = [None] * len(documents)
    if "entropy" in objective.needs:  # the frozen model's: the same places whatever is trained
        device = next(reference.parameters()).device
        entropies = token_entropies(
            score_function(reference, entropies=True), documents, token_budget, device
        )
    kept, positions, seeds = [], [], []
    for document, entropy in zip(documents, entropies, strict=True):
        rng = np.random.default_rng((seed, _number(document.id)))
        found = objective.positions(document, rng, entropy) if objective.has_positions else []
        if found or not objective.has_positions:
            kept.append(document)
            positions += found[:1]
            seeds.append(int(rng.integers(2**62)))
    if not kept:
        raise ConfigError(f"none of the {len(prepared)} held-out documents has a position for this objective")
    losses, tokens = no_think(scorer, kept, layout)
    if not objective.has_positions:
        return Evaluation({}, kept, losses, tokens, [])

    engine, setting = HFEngine(model, tokenizer=objective.tokenizer), objective.setting
    prompts = [objective.prompt(p) for p in positions]
    objective.setting = replace(setting, thoughts=thoughts)
    try:
        groups = roll_out(objective, engine, positions, seeds)
    finally:
        objective.setting = setting
    asked: dict[str, list[float]] = {
        g.id: [] for g in groups if g.parent_id is None
    }  # groups that others asked for
    for group in groups:
        if group.parent_id is not None:
            asked[group.parent_id] += group.rewards or ()
    groups = [g for g in groups if g.parent_id is None]
    lengths = np.array([[len(t.token_ids) for t in g.thoughts] for g in groups], float)
    unclosed = np.array(
        [[t.finish_reason is not FinishReason.CLOSE for t in g.thoughts] for g in groups], float
    )
    values = {"unclosed": unclosed.mean(1), "length": lengths.mean(1)}
    if groups[0].rewards is not None:
        values["reward"] = np.array([_mean(g.rewards or ()) for g in groups])
    if any(asked.values()):
        values["asked"] = np.array([_mean(asked[g.id] or (0.0,)) for g in groups])
    if "target" not in objective.needs:
        return Evaluation(values, kept, losses, tokens, groups)
    layout = replace(layout, no_think_ids=no_think_contexts(objective, groups))
    context = (kept, layout)
    scored = score_targets(scorer, groups, *context)
    sampled, own = scored.logps.mean(1), scored.own_logps
    base = (
        score_targets(reference, contrast(groups, "empty"), *context).own_logps if frozen is not None else own
    )
    values |= {
        "think_sampled": scored.hits.mean(1),
        "direct": scored.own_hits,
        "gain": sampled - own,
        "gain_frozen": sampled - base,
    }
    if greedy:
        best = asyncio.run(engine.sample(prompts, replace(setting.params, temperature=0.0), 1, seeds))
        greedy_groups = [replace(g, thoughts=tuple(t)) for g, t in zip(groups, best, strict=True)]
        values["think_greedy"] = score_targets(scorer, greedy_groups, *context).hits.mean(1)
    if controls:
        if len({d.id for d in kept}) < 2:
            raise ConfigError(
                "thoughts of another document need two held-out documents with a position, there is one"
            )
        for kind in ("empty", "shuffled", "other"):
            values[kind] = score_targets(scorer, contrast(groups, kind, seed), *context).logps.mean(1) - base
    return Evaluation(values, kept, losses, tokens, groups)


def held_out(
    config: PretrainConfig, tokenizer: Any, objective: Objective, ranks: int
) -> list[Document] | None:
    """The documents of `eval.data`; ConfigError now rather than at the first evaluation if they would not
    do.
    """
    path = config.eval.data
    if not path:
        return None
    data = replace(config.data, path=path, name=None, split="train", streaming=False)
    found = read_all(data, tokenizer, limit=config.eval.documents)
    prepared = [prepare_held_out(objective, document, config.seed) for document in found]
    usable = [
        d is not None
        and (
            not objective.has_positions
            or bool(objective.positions(d, np.random.default_rng(config.seed), torch.zeros(len(d.token_ids))))
        )
        for d in prepared
    ]
    if min(sum(usable[r::ranks]) for r in range(ranks)) < 2:
        raise ConfigError(
            f"eval.data {path}: {sum(usable)} of {len(found)} documents can be used (have a position); "
            "evaluation needs 2 for each rank"
        )
    return found


def _mean(rewards: Sequence[float]) -> float:
    """Mean of the rewards there are; NaN where no thought has one, which then counts nowhere."""
    known = [r for r in rewards if np.isfinite(r)]
    return float(np.mean(known)) if known else float("nan")


def _number(document_id: str) -> int:
    """The same number for the same document in every process."""
    return zlib.crc32(document_id.encode())


def contrast(groups: Sequence[Group], kind: str, seed: int = 0) -> list[Group]:
    """The same groups with thoughts that should not help, and without rewards.

    `kind` is empty (the close tag alone), shuffled (the same tokens) or other (the thoughts of another
    document).
    """
    if kind == "other":
        partner = other_document([g.position.document_id for g in groups], seed)
        return [
            replace(g, thoughts=tuple(groups[j].thoughts), rewards=None)
            for g, j in zip(groups, partner, strict=True)
        ]
    out = []
    for group in groups:
        if kind == "empty":
            close = group.prompt.close_ids
            thoughts = (Thought(close, (0.0,) * len(close), FinishReason.CLOSE, group.policy_version, 0),)
        else:
            first = seed * 1_000_003 + _number(group.position.document_id)
            thoughts = tuple(
                replace(
                    t,
                    token_ids=tuple(
                        shuffled(
                            t.token_ids,
                            seed=first * 1_009 + j,
                            keep_last=t.finish_reason is FinishReason.CLOSE,
                        )
                    ),
                )
                for j, t in enumerate(group.thoughts)
            )
        out.append(replace(group, thoughts=thoughts, rewards=None))
    return out


@dataclass(frozen=True, slots=True)
class TargetScores:
    """Of P groups with up to G thoughts: log p of the target (nats) and whether every token of it is the
    likeliest.
    """

    logps: np.ndarray  # [P, G] after each thought
    hits: np.ndarray  # [P, G]
    own_logps: np.ndarray  # [P] without a thought
    own_hits: np.ndarray  # [P]


def score_targets(
    scorer: Scorer, groups: Sequence[Group], documents: Sequence[Document], layout: Layout
) -> TargetScores:
    """The targets of groups after their thoughts and without one; every thought counts, whatever reward it
    has.
    """
    shape = (len(groups), max(len(g.thoughts) for g in groups))
    out = TargetScores(np.zeros(shape), np.zeros(shape), np.zeros(shape[0]), np.zeros(shape[0]))
    unrewarded = tuple(replace(g, rewards=None) for g in groups)
    batch = Batch(unrewarded, tuple({d.id: d for d in documents}.values()))
    device = next(scorer.parameters()).device
    found = score_batch(score_function(scorer, hits=True), micro_batches(batch, layout), device).groups
    for i, group in enumerate(groups):
        scores, n = found[group.id], len(group.thoughts)
        out.logps[i, :n], out.hits[i, :n] = scores.joint_target.numpy(), scores.target_hits.numpy()
        out.own_logps[i], out.own_hits[i] = float(scores.joint_own[0]), float(scores.own_hits[0])
    return out


def no_think(scorer: Scorer, documents: Sequence[Document], layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Next-token loss per token [D] of each document, and its number of predicted tokens [D]."""
    batch = Batch((), tuple({d.id: d for d in documents}.values()))
    device = next(scorer.parameters()).device
    found = score_batch(score_function(scorer), micro_batches(batch, layout), device).documents
    logps = [found[d.id].logps for d in documents]
    return np.array([-float(x.double().mean()) for x in logps]), np.array([len(x) for x in logps], float)


def by_meta(evaluation: Evaluation, column: str) -> dict[str, Evaluation]:
    """The evaluation split by a column that documents carry (`data.meta_columns`), for instance their
    depth.
    """
    found: Mapping[str, Any] = dict.fromkeys(
        sorted({str((d.meta or {}).get(column)) for d in evaluation.documents})
    )
    return {
        v: evaluation.where([str((d.meta or {}).get(column)) == v for d in evaluation.documents])
        for v in found
    }
