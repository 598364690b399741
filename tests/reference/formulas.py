"""Each objective's loss once more, slowly, straight from the papers' formulas: what the trainer is compared
with.

Nothing here comes from the library: one full forward a row, one softmax a token, plain loops, float64. Of
groups and documents only the plain data are read (ids, finish reasons, seeds). The loss of an update is

    1/N sum_i sum_t w_t min(rho_t A_i, clip(rho_t) A_i) v_t     over counted thoughts i and their tokens t,
    with minus
  + 1/N sum_i sum_k c_ik (-log p(y_k | x, c_i))                 the direct term
  + ntp_coef / M sum_d sum_j u_dj (-log p(x_j | x_<j))          over all documents as often as they were drawn

with N thoughts and M predicted tokens in the step, rho the ratio to the step's first weights, v = min(first /
behaviour, cap).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Reward = Callable[[Any, list["Judged"]], list[float]]
"""A group and its counted thoughts → what each earns."""
Slopes = Callable[[Any, list["Judged"]], list[list[float]]]
"""The same → the derivative of the score by each log-prob of the target."""
Advantage = Callable[[list[float]], list[float]]


@dataclass
class Settings:
    """What a test sets. `reduction` is written out: the paper's, not what the library takes by itself."""

    cut: str = "force_close"
    penalty: float = 0.0
    temperature: float = 1.0
    reduction: str = "thought_mean"
    clip_low: float = 0.2
    clip_high: float = 0.28
    cap: float = 2.0
    policy: float = 1.0
    ntp: float = 0.3
    reader: float = 0.1


@dataclass
class Method:
    """An objective. `reward` is of a group's counted thoughts, `slopes` of their target tokens; `keep`
    drops whole groups.
    """

    reward: Reward
    advantage: Advantage | None = None
    slopes: Slopes | None = None
    keep: Callable[[Any, list[float]], bool] = lambda group, rewards: True
    target: bool = True
    ntp_weight: Callable[[Any, int, Sequence[Any]], float] = lambda document, j, groups: 1.0
    no_think: Callable[[Any], Sequence[int] | None] = lambda group: None


@dataclass
class Judged:
    """What a reward may see of a counted thought: log-probs of the target's tokens after it, and without
    it.
    """

    thought: Any
    after: list[float]
    without: list[float]


def row_logps(model: Any, ids: Sequence[int], start: int, temperature: float = 1.0) -> list[torch.Tensor]:
    """log p(ids[j] | ids[:j]) for j from `start`."""
    logits = model(input_ids=torch.tensor([list(ids)])).logits[0].double()
    out = []
    for j in range(start, len(ids)):
        out.append(torch.log_softmax(logits[j - 1] / temperature, dim=-1)[ids[j]])
    return out


def counts(group: Any, k: int, settings: Settings) -> bool:
    """Whether thought k of a group takes part."""
    thought = group.thoughts[k]
    if thought.finish_reason == "abort" or (settings.cut == "mask" and thought.finish_reason != "close"):
        return False
    return group.rewards is None or not math.isnan(group.rewards[k])


def row_of(group: Any, thought: Any) -> list[int]:
    """Prompt, thought, a close tag where it has none, and what stands before the target."""
    close = [] if thought.finish_reason == "close" else list(group.prompt.close_ids)
    return [*group.prompt.token_ids, *thought.token_ids, *close, *group.prompt.join_ids]


def thought_logps(model: Any, group: Any, thought: Any, temperature: float) -> list[torch.Tensor]:
    """log pi(c_t | x, c_<t) at the sampling temperature."""
    ids = [*group.prompt.token_ids, *thought.token_ids]
    return row_logps(model, ids, len(group.prompt.token_ids), temperature)


def target_logps(model: Any, group: Any, thought: Any) -> list[torch.Tensor]:
    """log p(y_k | x, c, y_<k)."""
    head = row_of(group, thought)
    return row_logps(model, [*head, *group.position.target_ids], len(head))


def without_thought(model: Any, group: Any, method: Method) -> list[float]:
    """log p(y_k | x, y_<k) of a baseline model; no model, 0."""
    if model is None:
        return [0.0] * len(group.position.target_ids)
    head = method.no_think(group) or group.position.context_ids
    with torch.no_grad():
        return [float(x) for x in row_logps(model, [*head, *group.position.target_ids], len(head))]


def leave_one_out(rewards: list[float]) -> list[float]:
    """r_i minus the mean of the others; a reward that does not apply is no other, and has advantage 0."""
    out = []
    for i, reward in enumerate(rewards):
        others = [r for j, r in enumerate(rewards) if j != i and not math.isnan(r)]
        out.append(0.0 if math.isnan(reward) or not others else reward - sum(others) / len(others))
    return out


def judge(
    model: Any, baseline: Any, group: Any, method: Method, settings: Settings
) -> tuple[list[int], list[Judged]]:
    """The counted thoughts of a group, and what a reward may see of them."""
    places = [k for k in range(len(group.thoughts)) if counts(group, k, settings)]
    without = without_thought(baseline, group, method) if method.target else []
    out = []
    for k in places:
        thought = group.thoughts[k]
        with torch.no_grad():
            after = [float(x) for x in target_logps(model, group, thought)] if method.target else []
        out.append(Judged(thought, after, without))
    return places, out


def loss_of(
    model: Any,
    first: Any,
    baselines: tuple[Any, Any],
    groups: Sequence[Any],
    documents: Sequence[Any],
    method: Method,
    settings: Settings,
) -> torch.Tensor:
    """The loss of an update. `first` is the model as it was when the step began, `baselines` those of then
    and of now.
    """
    kept = []
    for group in groups:
        places, judged = judge(first, baselines[0], group, method, settings)
        rewards = method.reward(group, judged)
        for i, seen in enumerate(judged):
            if settings.cut == "penalise" and seen.thought.finish_reason != "close":
                rewards[i] -= settings.penalty
        if method.keep(group, rewards):
            kept.append((group, places, judged, rewards))

    thoughts = tokens = 0
    for _, _, judged, rewards in kept:
        for seen, reward in zip(judged, rewards, strict=True):
            if not math.isnan(reward):
                thoughts += 1
                tokens += len(seen.thought.token_ids)

    policy = direct = torch.zeros((), dtype=torch.float64)
    for group, _, judged, rewards in kept:
        advantages = (method.advantage or leave_one_out)(rewards)
        slopes = [[0.0] * len(group.position.target_ids)] * len(judged)
        if method.slopes is not None:
            slopes = method.slopes(group, judge(model, baselines[1], group, method, settings)[1])
        for i, seen in enumerate(judged):
            if math.isnan(rewards[i]):
                continue
            new = thought_logps(model, group, seen.thought, settings.temperature)
            with torch.no_grad():
                old = [float(x) for x in thought_logps(first, group, seen.thought, settings.temperature)]
            size = len(new)
            mean, over_all = 1 / max(size, 1), thoughts / max(tokens, 1)
            weight = {"thought_mean": mean, "token_mean": over_all, "sum": 1.0}[settings.reduction]
            for t in range(size):
                ratio = torch.exp(new[t] - old[t])
                bounded = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
                trust = min(math.exp(old[t] - seen.thought.behaviour_logps[t]), settings.cap)
                policy = policy - weight * trust * torch.minimum(
                    ratio * advantages[i], bounded * advantages[i]
                )
            if method.target:
                after = target_logps(model, group, seen.thought)
                for k in range(len(after)):
                    direct = direct - (settings.reader + slopes[i][k]) * after[k]

    predicted = 0
    ntp = torch.zeros((), dtype=torch.float64)
    for document in documents:
        logps = row_logps(model, document.token_ids, 1)
        for j, logp in enumerate(logps, 1):
            ntp = ntp - method.ntp_weight(document, j, [g for g, *_ in kept]) * logp
            predicted += 1
    total = settings.ntp * ntp / max(predicted, 1)
    return total + (settings.policy * policy + direct) / max(thoughts, 1)


# rewards


def information_gain(discount: float = 1.0, mean: bool = False, clip: float | None = None) -> Reward:
    """RLP: sum_k gamma^k (log p(y_k | x, c) - log p(y_k | x)), arXiv 2510.01265 eq. 1 for one token."""

    def reward(group: Any, judged: list[Judged]) -> list[float]:
        out = []
        for seen in judged:
            total = norm = 0.0
            for k, (after, without) in enumerate(zip(seen.after, seen.without, strict=True)):
                gain = after - without
                if clip is not None:
                    gain = min(max(gain, -clip), clip)
                total += discount**k * gain
                norm += discount**k
            out.append(total / norm if mean else total)
        return out

    return reward


def log_prob(group: Any, judged: list[Judged]) -> list[float]:
    return [sum(seen.after) for seen in judged]


def prob(group: Any, judged: list[Judged]) -> list[float]:
    """VeriFree, arXiv 2505.21493: p(y | x, c)."""
    return [math.exp(sum(seen.after)) for seen in judged]


def prob_slopes(group: Any, judged: list[Judged]) -> list[list[float]]:
    """d p / d log p_k = p."""
    return [[math.exp(sum(seen.after))] * len(seen.after) for seen in judged]


def mean_prob(group: Any, judged: list[Judged]) -> list[float]:
    return [sum(math.exp(x) for x in seen.after) / len(seen.after) for seen in judged]


def mean_prob_slopes(group: Any, judged: list[Judged]) -> list[list[float]]:
    return [[math.exp(x) / len(seen.after) for x in seen.after] for seen in judged]


def debiased_prob(group: Any, judged: list[Judged]) -> list[float]:
    """RLPR, arXiv 2506.18254: clip(mean p_k with the thought - mean p_k without, 0, 1)."""
    out = []
    for seen in judged:
        without = sum(math.exp(x) for x in seen.without) / len(seen.without)
        out.append(min(max(mean_prob(group, [seen])[0] - without, 0.0), 1.0))
    return out


def debiased_slopes(group: Any, judged: list[Judged]) -> list[list[float]]:
    inside = [0.0 < r < 1.0 for r in debiased_prob(group, judged)]
    return [[x * yes for x in row] for row, yes in zip(mean_prob_slopes(group, judged), inside, strict=True)]


def perplexity_gain(group: Any, judged: list[Judged]) -> list[float]:
    """VR-CLI, arXiv 2503.22828: 100 (1 - PPL(y | x, c) / PPL(y | x))."""
    out = []
    for seen in judged:
        size = len(seen.after)
        out.append(100 * (1 - math.exp(-sum(seen.after) / size) / math.exp(-sum(seen.without) / size)))
    return out


def jepo_advantages(samples: int) -> Advantage:
    """JEPO, arXiv 2503.19618: L - L without i, L = log mean p over the thoughts of a turn; times their
    number, since the loss is a mean over thoughts and the objective a mean over turns.
    """

    def bound(values: list[float]) -> float:
        return math.log(sum(math.exp(v) for v in values) / len(values))

    def advantages(rewards: list[float]) -> list[float]:
        out = []
        for first in range(0, len(rewards), samples):
            turn = rewards[first : first + samples]
            for i in range(len(turn)):
                others = turn[:i] + turn[i + 1 :]
                out.append(len(turn) * (bound(turn) - bound(others)))
        return out

    return advantages


def jepo_slopes(samples: int) -> Slopes:
    """d L / d log p_i is the thought's share in the sum of the probabilities."""

    def slopes(group: Any, judged: list[Judged]) -> list[list[float]]:
        values = [math.exp(sum(seen.after)) for seen in judged]
        out = []
        for i, seen in enumerate(judged):
            turn = values[i // samples * samples : i // samples * samples + samples]
            out.append([len(turn) * values[i] / sum(turn)] * len(seen.after))
        return out

    return slopes


# rewards of what is written after a thought, in words: the tests' tokenizer has one token a word


def written(words: Sequence[str], thought: Any, opening: str, closing: str) -> list[str] | None:
    """The words between the last opening and the closing after it, of what was said after the close tag."""
    if thought.answer_span is None:
        return None
    said = [words[i] for i in thought.token_ids[thought.answer_span[0] : thought.answer_span[1]]]
    if opening not in said:
        return None
    rest = said[len(said) - 1 - said[::-1].index(opening) + 1 :]
    return rest[: rest.index(closing)] if closing in rest else None


def prefix_hits(words: Sequence[str], opening: str, closing: str, fewest: int = 1) -> Reward:
    """RPT, arXiv 2506.08007, in whole words: 1 where the words are the first of what follows. Also RLPT's
    match.
    """

    def reward(group: Any, judged: list[Judged]) -> list[float]:
        truth = [words[i] for i in group.position.target_ids]
        out = []
        for seen in judged:
            found = written(words, seen.thought, opening, closing)
            out.append(float(found is not None and len(found) >= fewest and truth[: len(found)] == found))
        return out

    return reward


def with_length(hits: Reward, budget: Callable[[Any], int], share: float) -> Reward:
    """RMT, arXiv 2509.24375: (1 - w) match + w max(0, 1 - | |c| - B | / B), without the prediction's
    tokens.
    """

    def reward(group: Any, judged: list[Judged]) -> list[float]:
        out = []
        for seen, hit in zip(judged, hits(group, judged), strict=True):
            size = seen.thought.answer_span[0] if seen.thought.answer_span else len(seen.thought.token_ids)
            near = max(0.0, 1 - abs(size - budget(group)) / budget(group))
            out.append((1 - share) * hit + share * near)
        return out

    return reward


def differs(group: Any, rewards: list[float]) -> bool:
    """Dynamic sampling: the thoughts do not all earn the same."""
    return len(set(rewards)) > 1
