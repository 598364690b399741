"""Scores what thoughts in the text itself are worth, under a frozen model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rlpretrain.config import ConfigError, PretrainConfig
from rlpretrain.corpora.thought_texts import Candidate
from rlpretrain.objectives import Objective, load_objective
from rlpretrain.scoring import attention
from rlpretrain.scoring.checks import limit_of_difference
from rlpretrain.scoring.groups import (
    GroupScores,
    micro_batches,
    no_think_contexts,
    score_batch,
    token_entropies,
)
from rlpretrain.scoring.packing import Layout
from rlpretrain.scoring.scorer import Scorer, score_function
from rlpretrain.types import Batch, Document
from rollout.types import Group


class GainScorer:
    """Entropies of documents, and gains of thoughts by the objective's own reward, without gradient.

    Thoughts are scored as they stand in the text: behind the document's own tokens, whatever template they
    were sampled with. `stack` takes the tree attention out of the model again.
    """

    def __init__(self, model: nn.Module, config: PretrainConfig, tokenizer: Any, stack: ExitStack):
        in_text = replace(config, objective=dict(config.objective) | {"template": "raw"})
        self.objective = load_objective(in_text, tokenizer)
        self.scorer = Scorer(model)
        self.device = next(model.parameters()).device
        self.is_checked = config.packing != "tree"
        pad = tokenizer.pad_token_id
        self.layout = Layout(config.token_budget, cut="force_close", pad_id=pad if pad is not None else 0)
        if config.packing == "tree":
            reason = stack.enter_context(attention.installed(model))
            self.layout = replace(self.layout, tree=reason is None)

    def entropies(self, documents: Sequence[Document]) -> list[Tensor]:
        """For each document, the entropies (nats) of the model's predictions of its tokens."""
        score = score_function(self.scorer, entropies=True)
        return token_entropies(score, documents, self.layout.token_budget, self.device)

    def gains(self, groups: Sequence[Group], documents: Sequence[Document]) -> dict[str, GroupScores]:
        """The scores of each group by its id; `rewards` [G] are the gains in nats.

        The first call checks the tree against padded rows, and stays with these where they differ.
        """
        scored = self._score(groups, documents, self.layout)
        if not self.is_checked and self.layout.tree and groups:
            first = groups[0]
            of_first = [document for document in documents if document.id == first.position.document_id]
            padded = self._score([first], of_first[:1], replace(self.layout, tree=False))
            half = next(self.scorer.parameters()).dtype != torch.float32
            difference = (padded[first.id].rewards - scored[first.id].rewards).abs().max()
            if not difference <= limit_of_difference(half):
                print(
                    f"scored without trees: they differ from padded rows by {float(difference):.2g} nats",
                    file=sys.stderr,
                )
                self.layout = replace(self.layout, tree=False)
                scored = self._score(groups, documents, self.layout)
        self.is_checked = self.is_checked or bool(groups)
        return scored

    def _score(
        self, groups: Sequence[Group], documents: Sequence[Document], layout: Layout
    ) -> dict[str, GroupScores]:
        prompted = [replace(group, prompt=self.objective.prompt(group.position)) for group in groups]
        distinct = {document.id: document for document in documents}
        layout = replace(layout, no_think_ids=no_think_contexts(self.objective, prompted))
        micros = micro_batches(Batch(tuple(prompted), tuple(distinct.values())), layout)
        score = score_function(self.scorer)
        return score_batch(score, micros, self.device, objective=self.objective).groups


def check_rewards(objective: Objective) -> None:
    """Raise ConfigError unless an objective rewards thoughts by log-probs of the target alone."""
    if "target" not in objective.needs or objective.needs - {"target", "entropy"}:
        raise ConfigError(
            "--where inferable takes an objective that rewards a thought by log-probs of what follows, and "
            f"{type(objective).__name__} needs {', '.join(sorted(objective.needs)) or 'none'}: use rlp or "
            "likelihood"
        )


def with_gains(candidates: Sequence[Candidate], scores: GroupScores) -> list[Candidate]:
    """The candidates with their gains; `scores` are those of their group, in the same order."""
    return [
        replace(
            candidate,
            logp_with=float(scores.joint_target[k]),
            logp_without=float(scores.joint_own[k]),
            gain=float(scores.rewards[k]),
        )
        for k, candidate in enumerate(candidates)
    ]
