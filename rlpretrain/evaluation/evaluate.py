"""What thinking is worth on held-out text: gain, controls, no-think loss, and accuracy.

Every number is per position; `summary` gives means with 95% intervals over whole source rows
(rlpretrain/evaluation/intervals.py). A thought that did not close itself gets a close tag here, and counts in
`unclosed`. Positions are evaluated in parts, so that an evaluation that is interrupted has numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from rewards.controls import other_document
from rlpretrain.config import ConfigError
from rlpretrain.evaluation.contrast import CONTROLS, contrast, with_thoughts_of
from rlpretrain.evaluation.places import choose_places, held_out, in_parts
from rlpretrain.evaluation.record import MEANING, Evaluation, by_meta
from rlpretrain.evaluation.sampling import Sampler
from rlpretrain.evaluation.targets import (
    KindScores,
    TargetScores,
    document_losses,
    is_first,
    no_think,
    score_kinds,
    score_targets,
)
from rlpretrain.models.lengths import check_rows, limit_of
from rlpretrain.objectives import Objective
from rlpretrain.rollouts.drawing import DrawnPosition, prepare_held_out
from rlpretrain.scoring import attention
from rlpretrain.scoring.checks import limit_of_difference
from rlpretrain.scoring.groups import no_think_contexts, token_entropies
from rlpretrain.scoring.packing import Layout
from rlpretrain.scoring.scorer import Scorer, score_function
from rlpretrain.types import Document
from rollout.hf import HFEngine
from rollout.types import FinishReason, Group

__all__ = [
    "MEANING",
    "Evaluation",
    "Interrupted",
    "TargetScores",
    "by_meta",
    "contrast",
    "evaluate",
    "held_out",
    "no_think",
    "score_targets",
]

ROWS = {"cpu": 64}
"""Thoughts that are sampled at once, by the kind of device; a part of an evaluation has as many."""
MANY_ROWS = 512  # on any other device


class Interrupted(KeyboardInterrupt):
    """An evaluation was interrupted. `done` has the positions that were finished."""

    def __init__(self, done: Evaluation):
        super().__init__()
        self.done = done


def evaluate_losses(
    model: nn.Module,
    objective: Objective,
    documents: Sequence[Document],
    *,
    seed: int = 0,
    token_budget: int = 16384,
    pad_id: int = 0,
) -> Evaluation:
    """The next-token loss of documents and their answers, prepared as the objective does; no thoughts."""
    prepared = _prepare(objective, documents, seed)
    layout = Layout(token_budget, cut="force_close", pad_id=pad_id)
    values, losses, tokens = document_losses(Scorer(model), prepared, layout)
    return Evaluation(values, prepared, losses, tokens, [])


def _prepare(objective: Objective, documents: Sequence[Document], seed: int) -> list[Document]:
    """The documents that the objective does not drop; ConfigError if it drops all."""
    prepared = [prepare_held_out(objective, document, seed) for document in documents]
    kept = [document for document in prepared if document is not None]
    if not kept:
        raise ConfigError(f"the objective's `prepare` dropped all {len(prepared)} held-out documents")
    return kept


def evaluate(
    model: nn.Module,
    objective: Objective,
    documents: Sequence[Document],
    *,
    frozen: nn.Module | None = None,
    thoughts: int = 4,
    positions: int = 1,
    seed: int = 0,
    token_budget: int = 16384,
    controls: bool = True,
    greedy: bool = True,
    pad_id: int = 0,
    tree: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate `model` at the first `positions` of the objective's positions in each document.

    `frozen` is a model, or a scorer of one, whose no-think log-probabilities `gain_frozen` is measured
    against; by default `model`. Positions and thoughts depend only on `seed` and the document's id, not on
    the number of ranks or the order of documents.

    `tree` says whether thoughts are scored in a tree, in which they share their context; by default they are
    if the model supports it and the tree of one document agrees with padded rows. `progress` is called with
    the numbers of positions that are done and of all positions. Raises `Interrupted` on Ctrl-C once some
    positions are done.
    """
    documents = _prepare(objective, documents, seed)
    check_rows(objective, max(len(document.token_ids) for document in documents), limit_of(model))
    scorer = Scorer(model)
    reference = frozen if isinstance(frozen, Scorer) or frozen is None else Scorer(frozen)
    layout = Layout(token_budget, cut="force_close", pad_id=pad_id)
    if not objective.has_positions:
        values, losses, tokens = document_losses(scorer, documents, layout)
        return Evaluation(values, documents, losses, tokens, [])
    entropies: Sequence[Any] = [None] * len(documents)
    if "entropy" in objective.needs:  # of the frozen model, so that the positions do not depend on `model`
        judge = reference or scorer
        score = score_function(judge, entropies=True)
        entropies = token_entropies(score, documents, token_budget, next(judge.parameters()).device)
    places = choose_places(objective, documents, entropies, most=positions, seed=seed)
    partners = _partners(places, seed) if controls and "target" in objective.needs else []
    changed = objective.with_setting(replace(objective.setting, thoughts=thoughts))
    engine = HFEngine(model, tokenizer=objective.tokenizer)
    sampler = Sampler(changed, engine, places, greedy and "target" in objective.needs)
    rows = ROWS.get(next(model.parameters()).device.type, MANY_ROWS)
    done: list[Evaluation] = []
    with ExitStack() as stack:
        scoring = [_Scoring(each, layout, tree, stack) for each in (scorer, reference) if each is not None]
        try:
            for part in in_parts(places, max(1, rows // thoughts)):
                sampler.sample([*part, *(partners[i] for i in part if partners)])
                done.append(_evaluate_part(sampler, scoring, part, partners, seed))
                if progress is not None:
                    progress(sum(len(each.documents) for each in done), len(places))
        except KeyboardInterrupt as error:
            if not done:
                raise
            raise Interrupted(_joined(done, sampler)) from error
    return _joined(done, sampler)


def _partners(places: Sequence[DrawnPosition], seed: int) -> list[int]:
    """For each position one of another document, whose thoughts it gets; ConfigError if there is no other."""
    ids = [place.document.id for place in places]
    if len(set(ids)) < 2:
        raise ConfigError(
            "thoughts of another document need two held-out documents with a position, there is one"
        )
    return other_document(ids, seed)


class _Scoring:
    """A scorer with the layout of its forwards."""

    def __init__(self, scorer: Scorer, layout: Layout, tree: bool | None, stack: ExitStack):
        """`stack` takes the tree attention out of the model again; for `tree` see `evaluate`."""
        self.scorer, self.layout, self.is_checked = scorer, layout, tree is not None
        if tree is not False:
            reason = stack.enter_context(attention.installed(scorer.model))
            self.layout = replace(layout, tree=reason is None)

    def losses(self, documents: list[Document]) -> tuple[np.ndarray, np.ndarray]:
        """`no_think` of each position's document; a document's tokens count once."""
        losses, tokens = no_think(self.scorer, documents, self.layout)
        return losses, tokens * is_first(documents)

    def score(
        self, kinds: dict[str, list[Group]], documents: list[Document], objective: Objective
    ) -> KindScores:
        """`score_kinds`; the first call checks the tree, and falls back to padded rows if it does not fit."""
        groups = next(iter(kinds.values()))
        self.layout = replace(self.layout, no_think_ids=no_think_contexts(objective, groups))
        scores = score_kinds(self.scorer, kinds, documents, self.layout)
        if (
            not self.is_checked
            and self.layout.tree
            and not self._agrees_padded(groups[0], documents[0], scores)
        ):
            self.layout = replace(self.layout, tree=False)
            scores = score_kinds(self.scorer, kinds, documents, self.layout)
        self.is_checked = True
        return scores

    def _agrees_padded(self, group: Group, document: Document, scores: KindScores) -> bool:
        """Whether padded rows give, up to rounding, the tree's log-probs of the first position.

        `group` is the first kind's; two of its thoughts show whether one sees another.
        """
        two = replace(group, thoughts=group.thoughts[:2])
        padded = score_targets(self.scorer, [two], [document], replace(self.layout, tree=False))
        packed = next(iter(scores.kinds.values()))
        is_half = next(self.scorer.parameters()).dtype != torch.float32
        ours = np.append(packed.logps[0, : len(two.thoughts)], packed.own_logps[0])
        theirs = np.append(padded.logps[0], padded.own_logps[0])
        return bool(np.allclose(ours, theirs, rtol=0, atol=limit_of_difference(is_half)))


def _evaluate_part(
    sampler: Sampler, scoring: Sequence[_Scoring], part: Sequence[int], partners: Sequence[int], seed: int
) -> Evaluation:
    """The evaluation of some positions. `scoring` has the model, and the frozen one if that is another."""
    objective, groups = sampler.objective, [sampler.groups[i] for i in part]
    documents = [sampler.places[i].document for i in part]
    if "target" not in objective.needs:
        return Evaluation({}, documents, *scoring[0].losses(documents), groups)
    kinds = {"sampled": groups}
    if sampler.is_greedy:
        kinds["greedy"] = [sampler.greedy[i] for i in part]
    if partners:
        others = [sampler.groups[partners[i]] for i in part]
        kinds["empty"] = contrast(groups, "empty")
        kinds["shuffled"] = contrast(groups, "shuffled", seed)
        kinds["other"] = with_thoughts_of(groups, others)
    scores, losses, tokens = scoring[0].score(kinds, documents, objective)
    sampled = scores["sampled"]
    base_logps, frozen_losses = sampled.own_logps, None
    if len(scoring) > 1:  # the thought does not matter, only the arm without one
        of_frozen = scoring[1].score({"empty": contrast(groups, "empty")}, documents, objective)
        base_logps, frozen_losses = of_frozen.kinds["empty"].own_logps, of_frozen.losses
    values = {
        "think_sampled": sampled.hits.mean(1),
        "direct": sampled.own_hits,
        "gain": sampled.logps.mean(1) - sampled.own_logps,
        "gain_frozen": sampled.logps.mean(1) - base_logps,
    }
    if len(scoring) > 1:
        values["direct_gain"] = sampled.own_logps - base_logps
    if sampler.is_greedy:
        values["think_greedy"] = scores["greedy"].hits.mean(1)
    if partners:
        values |= {kind: scores[kind].logps.mean(1) - base_logps for kind in CONTROLS}
    return Evaluation(values, documents, losses, tokens, groups, frozen_losses)


def _joined(parts: Sequence[Evaluation], sampler: Sampler) -> Evaluation:
    """The evaluations of all parts as one, with the numbers that need no log-probabilities."""
    whole = Evaluation.join(parts)
    return replace(whole, values=_sampled_numbers(whole.groups, sampler.children) | whole.values)


def _sampled_numbers(groups: Sequence[Group], children: Sequence[Group]) -> dict[str, np.ndarray]:
    """Numbers that need no log-probabilities; `children` are the groups that `groups` asked for."""
    sampled = [[thought for thought in group.thoughts if not thought.given] for group in groups]
    lengths = [_mean_known([float(len(t.token_ids)) for t in thoughts]) for thoughts in sampled]
    unclosed = [
        _mean_known([float(t.finish_reason is not FinishReason.CLOSE) for t in thoughts])
        for thoughts in sampled
    ]
    values = {"unclosed": np.array(unclosed), "length": np.array(lengths)}
    if groups[0].rewards is not None:
        values["reward"] = np.array([_mean_known(_rewards_of_sampled(group)) for group in groups])
    asked: dict[str, list[float]] = {group.id: [] for group in groups}
    for child in children:
        assert child.parent_id is not None, "a child names its parent"
        if child.parent_id in asked:  # else its parent's part was interrupted
            asked[child.parent_id] += child.rewards or ()
    if any(asked.values()):
        values["asked"] = np.array([_mean_known(asked[group.id] or (0.0,)) for group in groups])
    return values


def _rewards_of_sampled(group: Group) -> list[float]:
    """The rewards of the thoughts that were not given."""
    pairs = zip(group.rewards or (), group.thoughts, strict=False)
    return [reward for reward, thought in pairs if not thought.given]


def _mean_known(values: Sequence[float]) -> float:
    """Mean of the finite values; NaN, which no mean includes, if there are none."""
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")
