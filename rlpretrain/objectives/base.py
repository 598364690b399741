"""What an objective is: what to predict, and how thinking about it is rewarded. Nothing here knows how
models run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rewards import leave_one_out
from rlpretrain.data.positions import PositionPicker
from rlpretrain.data.token_text import TokenReader
from rlpretrain.prompts import Delimiters, ThoughtPrompt
from rlpretrain.types import Document, MicroBatch, Scores, Window
from rollout.engine import Engine
from rollout.types import FinishReason, Group, Position, Prompt, SamplingParams, Thought


@dataclass(kw_only=True)
class Config:
    """Fields that every objective with thoughts has; an objective's own `Config` extends it."""

    positions: str = "random"
    """Where to think: random, every_k, entropy, before, after, sentence, answer, or
    package.module:function.
    """
    positions_per_document: int = 1
    """Positions drawn in each document; the paper uses one."""
    target_length: int = 1
    """Tokens predicted after the thought; 1 in the paper."""
    min_context: int = 1
    """Fewest tokens before a position."""
    marker: str | None = None
    """Text that positions `before` and `after` look for."""
    every: int = 16
    """Stride of positions `every_k`."""
    top_fraction: float = 0.2
    """Positions `entropy` draws among this share of a document's highest next-token entropies."""
    template: str = "raw"
    """raw: the thought is opened inside the document. rlp: the paper's system prompt in our words. Or a
    text with {context}.
    """
    no_think: str = "raw"
    """What the arm without a thought sees: raw (the document), template, or empty_thought."""
    open: str = "<think>"
    """Delimiter that opens a thought; added to the tokenizer where it is missing."""
    close: str = "</think>"
    """Delimiter that closes it."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What the run tells its objective: how thoughts are drawn, the weight of the reader term, how thought
    tokens are weighed.
    """

    params: SamplingParams
    thoughts: int
    reader_coef: float
    reduction: str = "thought_mean"


def rewards_differ(group: Group) -> bool:
    """Whether two thoughts of a group earn different rewards; NaN, which differs from itself too, is none."""
    return len({reward for reward in group.rewards or () if not math.isnan(reward)}) > 1


def derive_seed(seed: int, k: int = 1) -> int:
    """Another stream of random numbers for what is sampled after something with `seed`."""
    return (seed * 0x9E3779B97F4A7C15 + k) % 2**62


NEEDS = {
    "target": "log-probs of the targets, after the thoughts and without them",
    "entropy": "the entropy of each token of a document, for `positions`",
    "batch": "`advantage` sees all groups of a step at once",
    "group": "`target_weights` sees a whole group: it may not be spread over micro-batches",
    "ntp_data": "a second stream of documents",
}
"""What an objective can ask of a run; each of them is read somewhere, and a test holds it."""


RENAMED = {
    "think": "sample_thoughts",
    "say": "sample_answers",
    "said": "answer_text",
    "rewarded": "add_rewards",
}
"""Hooks by the names that they had before; subclasses that override or call an old name keep working."""


class Objective:
    """A pretraining objective. Subclass it in a file of its own, name the class `OBJECTIVE`; see
    objectives/rlp.py.

    `needs` says what a run must have ready, in the words of `NEEDS`; log-probs without the thought come with
    "target".
    """

    Config: type = Config
    needs: frozenset[str] = frozenset({"target"})
    has_positions = True
    proxy: Any = None  # a model of the objective's own, with `model` and `reads`: what it reads is spent too
    answer_tokens = 0  # most that is sampled after a thought, up to `config.closing`; 0: nothing
    token_reduction = (
        "thought_mean"  # what `loss.reduction: auto` is: the paper's mean or sum over a thought's tokens
    )

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        for old, new in RENAMED.items():  # a subclass may override, or call, a hook by either name
            if old in cls.__dict__ and new not in cls.__dict__:
                setattr(cls, new, cls.__dict__[old])
            elif new in cls.__dict__:
                setattr(cls, old, cls.__dict__[new])

    __slots__ = ("__dict__", "__weakref__", "progress")
    progress: float
    """How far the run is with the batch at hand, 0 to 1: the same for its positions, prompts, rewards and
    losses.
    """

    def __new__(cls, *args: Any, **kwargs: Any):
        self = super().__new__(cls)
        self.progress = 0.0
        return self

    def at(self, progress: float) -> Objective:
        """This objective as it is with another batch: `progress` differs, all else is shared.

        Thoughts of coming batches are sampled while another batch is trained, so they cannot ask one
        attribute.
        """
        other = object.__new__(type(self))
        other.__dict__, other.progress = self.__dict__, progress
        return other

    def __init__(self, config: Any, tokenizer: Any):
        self.config, self.tokenizer = config, tokenizer
        self.setting = Setting(SamplingParams(max_thought_tokens=1), 2, 0.0)  # replaced by load_objective
        self.reader = TokenReader(tokenizer)
        if not self.has_positions:
            return
        self.template = ThoughtPrompt(tokenizer, Delimiters(config.open, config.close), config.template)
        self.picker = PositionPicker(
            config.positions,
            tokenizer,
            per_document=config.positions_per_document,
            target_length=config.target_length,
            min_context=config.min_context,
            marker=config.marker,
            every=config.every,
            top_fraction=config.top_fraction,
        )
        if config.positions == "entropy":
            self.needs = self.needs | {"entropy"}

    @property
    def min_length(self) -> int:
        """Tokens of the shortest document that has room for a position."""
        if not self.has_positions:
            return 2
        return max(
            2,
            self.config.min_context + (1 if self.config.positions == "answer" else self.config.target_length),
        )

    @property
    def added_tokens(self) -> int:
        """Most tokens that a prompt adds to its context: the words of the template and the open tag."""
        return len(self.prompt(Position("", 1, (0,), (0,))).token_ids) - 1

    @property
    def shortest_target(self) -> int:
        """Fewest tokens of a document that no prompt contains, since they are predicted."""
        return 1 if self.config.positions == "answer" else self.config.target_length

    def window(self, size: int, thought_tokens: int | None = None) -> Window:
        """The most tokens that a document of `size` tokens makes, with thoughts of up to `thought_tokens`
        (the setting's).

        Context and target are parts of the document, so a row is the document and what is put between them.
        An objective whose prompts hold more than that says so in `added_tokens`.
        """
        if not self.has_positions:
            return Window(size, size, size)
        thought = self.setting.params.max_thought_tokens if thought_tokens is None else thought_tokens
        prompt = size - self.shortest_target + self.added_tokens
        sampled = prompt + thought + self.answer_tokens
        close = 1  # injected after a thought that did not close itself
        target = self.shortest_target if "target" in self.needs else 0
        return Window(prompt, sampled, max(size, sampled + close + target))

    def prepare(self, document: Document, rng: Any) -> Document | None:
        """The document to train on, before positions are chosen in it; None drops it, and another is drawn.

        Called once for each drawn document of `data` and `ntp_data`, and in an evaluation; `rng` depends on
        the seed and the draw alone. It may insert control tokens or set `scores`; then `answer_at` and
        `scores` have to fit the new tokens. A document that does not change is returned as it is.
        """
        return document

    def positions(self, document: Document, rng: Any, trunk: Tensor | None = None) -> list[Position]:
        """Where to think; `trunk[i]` is the entropy (nats) of the model's prediction of token i, where
        "entropy" is needed.
        """
        ids, size = document.token_ids, self.config.target_length
        return [
            Position(document.id, i, ids[:i], ids[i : i + size]) for i in self.picker(document, rng, trunk)
        ]

    def mix(self, documents: int) -> int:
        """How many of a step's documents come from `ntp_data`, for objectives without positions."""
        return 0

    def prompt(self, position: Position) -> Prompt:
        """The ids before the thought, what ends it, and the ids between thought and target."""
        return self.template(position)

    def no_think(self, position: Position) -> tuple[int, ...] | None:
        """The context of the arm without a thought; None: the document itself."""
        return (
            None if self.config.no_think == "raw" else self.template.no_think(position, self.config.no_think)
        )

    async def rollout(
        self, engine: Engine, positions: Sequence[Position], seeds: Sequence[int]
    ) -> list[Group]:
        """G thoughts for each position, what is said after them (`answer_tokens`), and rewards that need
        no live log-probs.
        """
        groups = await self.sample_thoughts(engine, positions, [self.prompt(p) for p in positions], seeds)
        if self.answer_tokens:
            groups = await self.sample_answers(engine, groups, self.config.closing)
        return await self.add_rewards(engine, groups)

    async def add_rewards(self, engine: Engine, groups: list[Group]) -> list[Group]:
        """The groups with rewards that need no live log-probs (a match, a judge) stored on them; none by
        default.
        """
        return groups

    async def sample_thoughts(
        self,
        engine: Engine,
        positions: Sequence[Position],
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        role: str = "policy",
    ) -> list[Group]:
        """A group of G thoughts for each prompt, without rewards."""
        sampled = await engine.sample(prompts, self.setting.params, self.setting.thoughts, seeds)
        return [
            Group(
                f"{p.document_id}@{p.index}:{seed:x}",
                p,
                q,
                tuple(thoughts),
                thoughts[0].policy_version,
                role=role,
            )
            for p, q, thoughts, seed in zip(positions, prompts, sampled, seeds, strict=True)
        ]

    async def sample_answers(self, engine: Engine, groups: Sequence[Group], closing: str) -> list[Group]:
        """After each thought that closed itself, sample on until `closing` or `answer_tokens`: what it comes
        to say.

        Thought and answer become one sampled sequence, trained alike; `answer_span` marks the answer. It ends
        as the answer ended, and is of the older weights if they changed in between. Thoughts that did not
        close themselves stay as they are.
        """
        closed = [
            (b, g)
            for b, group in enumerate(groups)
            for g, t in enumerate(group.thoughts)
            if t.finish_reason is FinishReason.CLOSE
        ]
        prompts, seeds = [], []
        for b, g in closed:
            thought = groups[b].thoughts[g]
            prompts.append(
                Prompt((*groups[b].prompt.token_ids, *thought.token_ids), (), stop_strings=(closing,))
            )
            seeds.append(derive_seed(thought.seed))
        params = replace(self.setting.params, max_thought_tokens=self.answer_tokens)
        answers = await engine.sample(prompts, params, 1, seeds) if prompts else []
        thoughts = [list(group.thoughts) for group in groups]
        for (b, g), (answer,) in zip(closed, answers, strict=True):
            thought = thoughts[b][g]
            size = len(thought.token_ids)
            thoughts[b][g] = Thought(
                thought.token_ids + answer.token_ids,
                thought.behaviour_logps + answer.behaviour_logps,
                answer.finish_reason,
                min(thought.policy_version, answer.policy_version),
                thought.seed,
                (size, size + len(answer.token_ids)),
            )
        return [
            replace(g, thoughts=tuple(t), policy_version=min(x.policy_version for x in t))
            for g, t in zip(groups, thoughts, strict=True)
        ]

    def answer_text(self, thought: Thought) -> str:
        """The text after a thought's close tag, as far as it was sampled; empty where the thought did not
        close itself.
        """
        if thought.answer_span is None:
            return ""
        start, end = thought.answer_span
        return self.reader.text(thought.token_ids[start:end], after=thought.token_ids[:start])

    def notes(self) -> dict[str, float]:
        """Numbers of its own for the log of a step, named `objective/...`."""
        return {}

    def select(self, groups: Sequence[Group]) -> list[Group]:
        """The groups to train on; dynamic sampling and filters drop here, before anything is counted."""
        return list(groups)

    def reward(self, groups: Sequence[Group], scores: Scores) -> Tensor:
        """Rewards [B, G]; by default those stored on the groups. NaN: not applicable, counted nowhere."""
        shape = scores.counted.shape
        stored = torch.full(shape, float("nan"), dtype=torch.float64, device=scores.counted.device)
        for b, group in enumerate(groups):
            if group.rewards is None:
                raise ValueError(
                    f"group {group.id} carries no rewards; {type(self).__name__} must store them or override "
                    "reward()"
                )
            stored[b, : len(group.rewards)] = torch.tensor(group.rewards, dtype=torch.float64)
        return stored

    def advantage(self, reward: Tensor, groups: Sequence[Group]) -> Tensor:
        """Advantages [B, G] from rewards [B, G]: leave-one-out (RLP eq. 7), formed in float64."""
        return leave_one_out(reward)

    def losses(self) -> tuple[str, ...]:
        """The terms of the loss, by name or `package.module:Class` (rlpretrain/training/losses.py)."""
        return ("next_token", "surrogate", "direct")

    def target_weights(self, groups: Sequence[Group], scores: Scores) -> Tensor:
        """Weights [B, G, T] of -log p(target | context, thought) in the loss: the reader term."""
        return torch.full_like(scores.target_logps, self.setting.reader_coef)

    def ntp_weights(self, micro: MicroBatch, scores: Scores) -> Tensor:
        """Weights [M] of the next-token loss."""
        return torch.ones_like(scores.trunk_logps)


for _old, _new in RENAMED.items():
    setattr(Objective, _old, getattr(Objective, _new))
