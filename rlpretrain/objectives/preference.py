"""Pretraining with human preferences: segments of documents have scores, higher is worse (arXiv 2302.08582).

The scores come from `data.score_column`. A segment (or document) is good if its score is at most `threshold`;
a token's score s is its segment's, and its reward R = −s. `loss` is one of

- `mle`: next-token prediction, the control;
- `filter`: the same, on documents whose segments have a good mean score;
- `conditional`: the same, with a control token before each segment that says whether it is good;
- `unlikelihood`: −log p of a good token, −α·log(1 − p) of a bad one. Without a threshold, with scores in
  [0, 1]: −(1 − s)·log p − s·α·log(1 − p);
- `rwr`: w·(−log p) with w = min(exp(R / β), cap), reward-weighted regression;
- `awr`: α·w·(−log p) with w = min(exp((R − V) / β), cap), advantage-weighted regression.

In the paper, conditional training had the least undesirable text at a given loss of capability.

The paper's V is a head on the hidden states of the trunk, trained with weight 1 − α. An objective sees
log-probs and no hidden states, so `value: head` is refused. R is fixed in the data: it does not depend on the
policy. So V can be its mean at a place, which `value: position` takes from the first documents of the data.

Our choices: a filtered document's score is the mean over its segments; control tokens are dropped one by one;
they start at the mean of the other embeddings, without noise. In an evaluation documents stay as they are, so
a loss there is that of the text alone: the same tokens as for `mle`.

The paper's code clamps 1 − p at 1e-20. Here 1 − p is computed from log p and clamped at float32's resolution.

Exact reductions to `ntp`: `mle`; `rwr` with a β so large that weights round to 1; `conditional` with `drop:
1`; a threshold above all scores in `filter` and `unlikelihood` (refused in a run). The control of each is
`permuted`: scores of random segments.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from rewards import log_complement
from rlpretrain.config import ConfigError, PretrainConfig
from rlpretrain.data.scores import SEGMENT_STARTS, PlaceMeans, bucket_of, segments_of, spread
from rlpretrain.objectives.ntp import NTP
from rlpretrain.prompts import ControlTokens
from rlpretrain.types import Document, MicroBatch, Scores, Window

SAMPLE = 2000
"""Documents from which the scores of `permuted` and the values of `value: position` are taken."""
WITH_THRESHOLD = ("filter", "conditional")
WEIGHTED = ("rwr", "awr")


@dataclass(kw_only=True)
class Config:
    """What is done with the scores of documents. Defaults are the paper's where it has one for all tasks."""

    loss: Literal["mle", "filter", "conditional", "unlikelihood", "rwr", "awr"] = "mle"
    """How scores enter; see the formulas of this module."""
    threshold: float | None = None
    """Largest score of a good segment, or of a document that `filter` keeps. Required by `filter` and
    `conditional`; with `unlikelihood`, None means that scores in [0, 1] are weights.
    """
    alpha: Annotated[float, Field(ge=0)] = 1.0
    """α: the weight of bad tokens in unlikelihood (paper: 1; .01 for code), of the loss in awr (.5, .05)."""
    beta: Annotated[float, Field(gt=0)] = 10.0
    """β of rwr and awr, in units of the score. The paper's 10 is nearly `mle` for scores in [0, 1]."""
    weight_cap: Annotated[float, Field(gt=0)] = 1000.0
    """Largest weight of rwr and awr."""
    value: Literal["none", "position", "head"] = "position"
    """V of awr. none: 0. position: the mean reward of tokens that are about as far from the beginning (by
    powers of two), our choice. head: the paper's; it needs hidden states, and is refused.
    """
    good: str = "<|good|>"
    """Control token before a good segment; added to the tokenizer if it is missing."""
    bad: str = "<|bad|>"
    """Control token before a bad segment; added to the tokenizer if it is missing."""
    drop: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Probability with which a control token is left out (paper: .01; .1 for code)."""
    max_length: Annotated[int, Field(ge=2)] | None = None
    """Longest document with its control tokens; its end is cut off. None: up to one for each token is
    expected, so the model must take twice `data.max_length`.
    """
    permuted: bool = False
    """Control: each segment gets the score of a random segment of the data; with `filter`, each document that
    of a random document.
    """


class Preference(NTP):
    """Continue pretraining, with scores of segments."""

    Config = Config

    def __init__(self, config: Any, tokenizer: Any):
        super().__init__(config, tokenizer)
        _check(config)
        self.pool = np.zeros(0)
        """Scores of segments, or of documents with `filter`, that `permuted` draws from."""
        self.values = np.zeros(1)
        """V of awr by `bucket_of`; the last value stands for all later places."""
        self.judged = [0, 0]
        """Good segments (with `filter`: documents) and all, since the last step."""
        self.control: dict[bool, int] = {}
        if config.loss == "conditional":
            vocabulary = tokenizer.get_vocab()
            missing = [token for token in (config.good, config.bad) if token not in vocabulary]
            if missing:
                raise ConfigError(f"the tokenizer lacks the control token {' and '.join(missing)}")
            self.control = {True: vocabulary[config.good], False: vocabulary[config.bad]}

    @classmethod
    def control_tokens(cls, config: Any) -> ControlTokens | None:
        """The control tokens of `conditional`."""
        return ControlTokens((config.good, config.bad)) if config.loss == "conditional" else None

    def window(self, size: int, thought_tokens: int | None = None) -> Window:
        """The longest row of a document of `size` tokens, with its control tokens."""
        if self.config.loss == "conditional":
            size = max(size, min(2 * size, self.config.max_length or 2 * size))
        return super().window(size, thought_tokens)

    # before the run

    def check_run(self, run: PretrainConfig) -> None:
        """Raise ConfigError for data without scores, and for a replay that would need all documents."""
        c = self.config
        if run.replay is not None:
            if c.loss == "awr" and c.value == "position":
                raise ConfigError(
                    "objective.value position reads all documents, which a replay has not: set none"
                )
            return
        for name, data in (run.data.sources or {"": run.data}).items():
            if c.loss != "mle" and data.score_column is None and data.source is None:
                where = f"data.sources.{name}" if name else "data"
                raise ConfigError(f"{where}.score_column: objective.loss {c.loss} needs the column of scores")

    def inspect(self, documents: Iterable[Document]) -> None:
        """Look at scores; ConfigError if the threshold divides nothing: all documents are good, or none."""
        c = self.config
        needs_pool = c.permuted or (c.loss == "awr" and c.value == "position")
        if not needs_pool and c.threshold is None:
            return
        pool: list[float] = []
        rewards = PlaceMeans()
        good = total = 0
        for number, document in enumerate(documents):
            divides = c.threshold is None or 0 < good < total
            if divides and (number >= SAMPLE or not needs_pool):
                break
            units = self._units(document)
            total += len(units)
            good += sum(self._is_good(score) for score in units) if c.threshold is not None else 0
            if number < SAMPLE:
                pool += units
                rewards.add(-np.asarray(document.scores))
        if c.threshold is not None and good in (0, total):
            unit = "documents" if c.loss == "filter" else "segments"
            raise ConfigError(
                f"objective.threshold is {c.threshold:g}: {'all' if good else 'none'} of {total} {unit} are "
                f"good, so it divides nothing; their scores reach from {min(pool):g} to {max(pool):g}"
            )
        self.pool, self.values = np.asarray(pool), rewards.values()

    # documents

    def prepare(self, document: Document, rng: Any) -> Document | None:
        """Permute scores, drop what is filtered, insert control tokens, as the loss asks."""
        c = self.config
        if c.loss == "mle":
            return document
        starts, scores = self._segments(document)
        if c.loss == "filter":
            unit = rng.choice(self._drawn_from()) if c.permuted else float(np.mean(scores))
            self._count([unit])
            return document if self._is_good(unit) else None
        if c.permuted:
            scores = rng.choice(self._drawn_from(), len(scores)).tolist()
            document = replace(document, scores=spread(starts, scores, len(document.token_ids)))
        if c.threshold is not None:
            self._count(scores)
        elif c.loss == "unlikelihood" and not all(0 <= score <= 1 for score in scores):
            raise ConfigError(
                f"{document.source}: scores have to be in [0, 1] for objective.loss 'unlikelihood' without "
                "objective.threshold"
            )
        return self._insert(document, starts, scores, rng) if c.loss == "conditional" else document

    def prepare_held_out(self, document: Document, rng: Any) -> Document | None:
        """The document as it is: control tokens count in no evaluation, and nothing is filtered."""
        return document

    def _insert(self, document: Document, starts: list[int], scores: list[float], rng: Any) -> Document:
        """The document with a control token before each segment, but for those that are dropped.

        The first one follows the tokens that the tokenizer puts before every text.
        """
        ids, old = document.token_ids, document.scores
        assert old is not None, "it has segments"
        kept = (rng.random(len(starts)) >= self.config.drop).tolist()
        head = int(ids[0] == self.tokenizer.bos_token_id)
        new_ids, new_scores = list(ids[:head]), list(old[:head])
        ends = [*starts[1:], len(ids)]
        for start, end, score, keep in zip(starts, ends, scores, kept, strict=True):
            if keep:
                new_ids.append(self.control[self._is_good(score)])
                new_scores.append(score)
            new_ids += ids[max(start, head) : end]
            new_scores += old[max(start, head) : end]
        most = self.config.max_length
        meta = {name: value for name, value in (document.meta or {}).items() if name != SEGMENT_STARTS}
        return replace(
            document, token_ids=tuple(new_ids[:most]), scores=tuple(new_scores[:most]), meta=meta or None
        )

    def _segments(self, document: Document) -> tuple[list[int], list[float]]:
        """The first token of each segment, and its score."""
        if document.scores is None:
            raise ConfigError(
                f"{document.source}: the document has no scores, which objective.loss '{self.config.loss}' "
                "needs: set data.score_column"
            )
        return segments_of(document)

    def _units(self, document: Document) -> list[float]:
        """The scores that the threshold judges: of segments, or with `filter` of the document."""
        scores = self._segments(document)[1]
        return [float(np.mean(scores))] if self.config.loss == "filter" else scores

    def _is_good(self, score: float) -> bool:
        return score <= self.config.threshold

    def _drawn_from(self) -> np.ndarray:
        assert len(self.pool), "`inspect` was called before"
        return self.pool

    def _count(self, scores: Iterable[float]) -> None:
        for score in scores:
            self.judged[0] += self._is_good(score)
            self.judged[1] += 1

    def notes(self) -> dict[str, float]:
        """The share of good segments, or of kept documents, among those drawn since the last step."""
        good, total = self.judged
        self.judged = [0, 0]
        return {"preference/good_frac": good / total} if total else {}

    # losses

    def trunk_loss(self, micro: MicroBatch, scores: Scores) -> Tensor:
        """The loss [M] of each predicted token."""
        c, logps = self.config, scores.trunk_logps
        if c.loss != "unlikelihood":
            return super().trunk_loss(micro, scores)
        badness = _of_predicted(micro).to(logps)
        if c.threshold is not None:
            badness = (badness > c.threshold).to(logps)
        likely, unlikely = (1 - badness) * -logps, badness * c.alpha * -log_complement(logps)
        return torch.where(badness == 0, -logps, torch.where(badness == 1, unlikely, likely + unlikely))

    def ntp_weights(self, micro: MicroBatch, scores: Scores) -> Tensor:
        """Weights [M] of rwr and awr, else 1; they do not depend on the model."""
        c = self.config
        if c.loss not in WEIGHTED or not micro.documents:
            return super().ntp_weights(micro, scores)
        advantage = -_of_predicted(micro)
        if c.loss == "awr" and c.value == "position":
            values = torch.from_numpy(self.values)
            places = [bucket_of(np.arange(1, len(d.token_ids)), len(values)) for d in micro.documents]
            advantage = advantage - values[torch.from_numpy(np.concatenate(places))]
        weights = (advantage / c.beta).exp().clamp(max=c.weight_cap)
        return (weights * (c.alpha if c.loss == "awr" else 1.0)).to(scores.trunk_logps)


def _of_predicted(micro: MicroBatch) -> Tensor:
    """The scores [M] of the predicted tokens of the micro-batch's documents, in float64."""
    scores: list[float] = []
    for document in micro.documents:
        if document.scores is None:
            raise ConfigError(f"{document.source}: the document has no scores: set data.score_column")
        scores += document.scores[1:]
    return torch.tensor(scores, dtype=torch.float64)


def _check(config: Any) -> None:
    """Raise ConfigError for settings that do not belong together."""
    loss, threshold = config.loss, config.threshold
    if loss in WITH_THRESHOLD and threshold is None:
        raise ConfigError(
            f"objective.loss '{loss}' needs objective.threshold, the largest score of what is good"
        )
    if threshold is not None and loss not in (*WITH_THRESHOLD, "unlikelihood"):
        raise ConfigError(f"objective.threshold is not used by objective.loss '{loss}': leave it out")
    if config.permuted and loss == "mle":
        raise ConfigError("objective.permuted has no effect with objective.loss 'mle', which reads no scores")
    if loss == "awr" and config.value == "head":
        raise ConfigError(
            "objective.value 'head' needs the hidden states of the trunk, which an objective does not see: "
            "use 'position' or 'none'"
        )
    if config.good == config.bad or not config.good.strip() or not config.bad.strip():
        raise ConfigError("objective.good and objective.bad have to be two different tokens")


OBJECTIVE = Preference
