"""The contract of an objective: what to predict, and how thinking about it is rewarded.

Nothing here knows how models run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rewards import leave_one_out
from rlpretrain.config import DataConfig, PretrainConfig
from rlpretrain.data.positions import PositionPicker
from rlpretrain.data.token_text import TokenReader
from rlpretrain.objectives import sampling
from rlpretrain.objectives.learner import Learner
from rlpretrain.objectives.settings import ADVANTAGES, DEFAULT_SETTING, NEEDS, AdvantageForm, Config, Setting
from rlpretrain.prompts import ControlTokens, Delimiters, ThoughtPrompt
from rlpretrain.types import Document, Likeliest, MicroBatch, Scores, SoftTargets, Window
from rollout.engine import Engine
from rollout.types import Group, Position, Prompt, Thought

__all__ = [
    "ADVANTAGES",
    "NEEDS",
    "AdvantageForm",
    "Config",
    "Objective",
    "Setting",
    "derive_seed",
    "rewards_differ",
]

derive_seed = sampling.derive_seed

RENAMED = {
    "think": "sample_thoughts",
    "say": "sample_answers",
    "said": "answer_text",
    "rewarded": "add_rewards",
}
"""Old names of hooks; subclasses that override or call an old name keep working."""


ReadLikeliest = Callable[[MicroBatch, int, float], Likeliest]
"""Reads the likeliest tokens of each document token: (micro-batch, how many, temperature)."""


def rewards_differ(group: Group) -> bool:
    """Whether two thoughts of a group have different rewards; NaN (not applicable) is ignored."""
    return len({reward for reward in group.rewards or () if not math.isnan(reward)}) > 1


class Objective:
    """A pretraining objective. Subclass it in a file of its own and name the class `OBJECTIVE`; see rlp.py.

    `needs` lists what a run must provide, by the keys of `NEEDS`; "target" includes log-probs without the
    thought.
    """

    Config: type = Config
    needs: frozenset[str] = frozenset({"target"})
    has_positions = True
    proxy: Any = None
    """A second model of the objective, if any. It has `model`, and `reads` with the tokens that it read."""
    weights_used: Tensor | None = None
    """The weights [M] of the last next-token loss, for the log."""
    answer_tokens = 0
    """Most tokens sampled after a thought, up to `config.closing`; 0: no answer is sampled."""
    refused_cuts: frozenset[str] = frozenset()
    """Values of `sampling.cut` with which a run is refused."""
    refused_baselines: frozenset[str] = frozenset()
    """Values of `baseline.name` with which a run is refused."""
    importance_weights = True
    """False: the thoughts are data for the loss (pairs of a preference), so their sampler does not matter."""
    fewest_thoughts = 2
    """Fewest thoughts of a position; an advantage within the sampled thoughts needs two."""
    live_rewards = False
    """True: `reward` computes other numbers than those on the groups, so those are not logged as rewards."""
    token_reduction = "thought_mean"
    """What `loss.reduction: auto` means: the paper's mean, or the sum over a thought's tokens."""
    own_data: Mapping[str, DataConfig] = {}
    """Documents that the objective reads itself, by the field that names them: a dry run looks for them."""
    __slots__ = ("__dict__", "__weakref__", "_setting")
    _setting: Setting
    """What differs between views of one objective (`with_setting`); all else is in the shared __dict__."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        for old, new in RENAMED.items():
            if old in cls.__dict__ and new not in cls.__dict__:
                setattr(cls, new, cls.__dict__[old])
            elif new in cls.__dict__:
                setattr(cls, old, cls.__dict__[new])

    def __init__(self, config: Any, tokenizer: Any):
        self.config, self.tokenizer = config, tokenizer
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

    @classmethod
    def control_tokens(cls, config: Any) -> ControlTokens | None:
        """Tokens that an objective without thoughts adds to tokenizer and model; None: none."""
        return None

    def check_run(self, run: PretrainConfig) -> None:
        """Raise ConfigError, with the name of the field, for settings of a run that do not fit."""

    def own_parameters(self, vocabulary: int) -> int:
        """Parameters that the objective trains beside the model of so many tokens; for a dry run."""
        return 0

    # the trained model and the checkpoint

    def start(self, learner: Learner) -> None:
        """Called once, on need "learner", before the first step and before a checkpoint is restored."""

    def before_step(self, learner: Learner, micros: Sequence[MicroBatch]) -> Mapping[str, float]:
        """Called in every step, on need "learner", before its micro-batches are scored; numbers for the log.

        All ranks call it, with equally many micro-batches; some may be empty. `soft_targets` is asked for
        them next, in this order. The model has the weights of the previous step, and must have them, bit by
        bit, when this returns. The numbers are averaged over ranks.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of the objective on this rank: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned. {} for a checkpoint of a version that kept nothing."""

    # what the run sets

    @property
    def setting(self) -> Setting:
        """How thoughts are drawn and how far the run is; the run sets it."""
        return getattr(self, "_setting", DEFAULT_SETTING)

    @setting.setter
    def setting(self, value: Setting) -> None:
        self._setting = value

    @property
    def progress(self) -> float:
        """The share of the run that is done when the present batch is trained, 0 to 1.

        It is the same for the batch's positions, prompts, rewards and losses.
        """
        return self.setting.progress

    @progress.setter
    def progress(self, value: float) -> None:
        self.setting = replace(self.setting, progress=value)

    def with_setting(self, setting: Setting) -> Objective:
        """A view of this objective with another setting; all other attributes are shared.

        Thoughts of coming batches are sampled while another batch is trained, so several settings exist at
        a time, while a counter that a hook keeps is one for all.
        """
        view = object.__new__(type(self))
        view.__dict__ = self.__dict__
        view.setting = setting
        return view

    def at(self, progress: float) -> Objective:
        """A view for a batch that is trained at this share of the run."""
        return self.with_setting(replace(self.setting, progress=progress))

    # lengths

    @property
    def min_length(self) -> int:
        """Tokens of the shortest document that has room for a position."""
        if not self.has_positions:
            return 2
        target = 1 if self.config.positions == "answer" else self.config.target_length
        return max(2, self.config.min_context + target)

    @property
    def added_tokens(self) -> int:
        """Most tokens that a prompt adds to its context: the template's text and the open tag."""
        return len(self.prompt(Position("", 1, (0,), (0,))).token_ids) - 1

    @property
    def shortest_target(self) -> int:
        """Fewest tokens of a document that are in no prompt, because they are predicted."""
        return 1 if self.config.positions == "answer" else self.config.target_length

    def window(self, size: int, thought_tokens: int | None = None) -> Window:
        """The longest prompt, sample and row of a document of `size` tokens.

        Thoughts have up to `thought_tokens` tokens (by default those of the setting). Context and target are
        parts of the document, so a row is the document plus the tokens inserted between them. An objective
        whose prompts add other tokens overrides `added_tokens`.
        """
        if not self.has_positions:
            return Window(size, size, size)
        thought = self.setting.params.max_thought_tokens if thought_tokens is None else thought_tokens
        prompt = size - self.shortest_target + self.added_tokens
        sampled = prompt + thought + self.answer_tokens
        close = 1  # injected after a thought that did not close itself
        target = self.shortest_target if "target" in self.needs else 0
        return Window(prompt, sampled, max(size, sampled + close + target))

    # documents

    def inspect(self, documents: Iterable[Document]) -> None:
        """Look at documents of `data` before the run; ConfigError if they cannot be trained on.

        They come in the order of the seed, the same on all ranks and after a resume, and end with one pass.
        What is not taken is not read. Called only if it is overridden, and not for a replay.
        """

    def prepare(self, document: Document, rng: Any) -> Document | None:
        """The document to train on, before positions are chosen in it; None drops it, and another is drawn.

        Called once for each drawn document of `data` and `ntp_data`; `rng` depends on
        the seed and the draw alone. It may insert control tokens or set `scores`; then `answer_at` and
        `scores` have to fit the new tokens. A document that does not change is returned as it is.
        """
        return document

    def prepare_held_out(self, document: Document, rng: Any) -> Document | None:
        """The document to evaluate; by default as `prepare` makes it. None leaves it out."""
        return self.prepare(document, rng)

    # where to think, and with what prompt

    def positions(self, document: Document, rng: Any, trunk: Tensor | None = None) -> list[Position]:
        """Where to think in a document.

        `trunk[i]` is the entropy (nats) of the model's prediction of token i, if "entropy" is needed.
        """
        ids, size = document.token_ids, self.config.target_length
        indices = self.picker(document, rng, trunk)
        return [Position(document.id, i, ids[:i], ids[i : i + size]) for i in indices]

    def mix(self, documents: int) -> int:
        """How many of a step's documents come from `ntp_data`, for objectives without positions."""
        return 0

    def prompt(self, position: Position) -> Prompt:
        """The ids before the thought, the ids that end it, and the ids between thought and target."""
        return self.template(position)

    def no_think(self, position: Position) -> tuple[int, ...] | None:
        """The context of the no-think arm; None: the document itself."""
        if self.config.no_think == "raw":
            return None
        return self.template.no_think(position, self.config.no_think)

    def baseline_prompt(self, group: Group) -> Prompt:
        """The ids around a thought for the baseline's model, which scores targets on need "target_baseline".

        The policy's own by default. Another prompt costs rows of its own, and a model apart from the policy:
        with it, refuse the baselines none and self (`refused_baselines`).
        """
        return group.prompt

    # sampling

    async def rollout(
        self, engine: Engine, positions: Sequence[Position], seeds: Sequence[int]
    ) -> list[Group]:
        """Sample G thoughts for each position, their answers, and the rewards that need no live log-probs."""
        prompts = [self.prompt(position) for position in positions]
        groups = await self.sample_thoughts(engine, positions, prompts, seeds)
        if self.answer_tokens:
            groups = await self.sample_answers(engine, groups, self.config.closing)
        return await self.add_rewards(engine, groups)

    async def add_rewards(self, engine: Engine, groups: list[Group]) -> list[Group]:
        """The groups with rewards that need no live log-probs (a match, a judge); none by default."""
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
        return await sampling.sample_thoughts(engine, self.setting, positions, prompts, seeds, role)

    async def sample_answers(self, engine: Engine, groups: Sequence[Group], closing: str) -> list[Group]:
        """The groups with an answer after each thought that closed itself.

        Sampling continues until `closing` or `answer_tokens`. Thought and answer become one sampled
        sequence and are trained alike; `answer_span` marks the answer. The sequence has the answer's finish
        reason, and the older policy version if the weights changed between the two. Other thoughts do not
        change.
        """
        params = replace(self.setting.params, max_thought_tokens=self.answer_tokens)
        return await sampling.sample_answers(engine, params, groups, closing)

    def answer_text(self, thought: Thought) -> str:
        """The sampled text after a thought's close tag; empty where the thought did not close itself."""
        if thought.answer_span is None:
            return ""
        start, end = thought.answer_span
        return self.reader.text(thought.token_ids[start:end], after=thought.token_ids[:start])

    # rewards and losses

    def notes(self) -> dict[str, float]:
        """The objective's own numbers for the log of a step, asked for after `select`."""
        return {}

    def select(self, groups: Sequence[Group]) -> list[Group]:
        """The groups to train on. Dynamic sampling and filters drop groups here, before the count."""
        return list(groups)

    def reward(self, groups: Sequence[Group], scores: Scores) -> Tensor:
        """Rewards [B, G]; by default those stored on the groups. NaN: not applicable, counted nowhere."""
        shape = scores.counted.shape
        stored = torch.full(shape, float("nan"), dtype=torch.float64, device=scores.counted.device)
        for b, group in enumerate(groups):
            if group.rewards is None:
                raise ValueError(
                    f"group {group.id} has no rewards; {type(self).__name__} must store them or override "
                    "reward()"
                )
            stored[b, : len(group.rewards)] = torch.tensor(group.rewards, dtype=torch.float64)
        return stored

    def advantage(self, reward: Tensor, groups: Sequence[Group]) -> Tensor:
        """Advantages [B, G] from rewards [B, G], formed in float64; leave-one-out (RLP eq. 7)."""
        return leave_one_out(reward)

    def losses(self) -> tuple[str, ...]:
        """The terms of the loss, by name or `package.module:Class` (rlpretrain/training/losses.py)."""
        return ("next_token", "surrogate", "direct")

    def target_weights(self, groups: Sequence[Group], scores: Scores) -> Tensor:
        """Weights [B, G, T] of -log p(target | context, thought) in the loss: the reader term."""
        return torch.full_like(scores.target_logps, self.setting.reader_coef)

    def trunk_loss(self, micro: MicroBatch, scores: Scores) -> Tensor:
        """The loss [M] of each document token, summed over the micro-batch and divided by the step's tokens.

        By default the next-token loss, or the cross-entropy with the soft targets where the micro-batch has
        some, weighted by `ntp_weights`. Override it for a loss that is not linear in log p (unlikelihood).
        """
        logps = scores.trunk_logps
        if scores.soft_logps is not None and micro.soft_probs is not None:
            logps = (micro.soft_probs * scores.soft_logps).sum(-1)
        self.weights_used = weights = self.ntp_weights(micro, scores)
        return -weights * logps

    def soft_targets(self, micro: MicroBatch, teacher: ReadLikeliest | None) -> SoftTargets | None:
        """Several tokens with probabilities for each document token, in its place in `trunk_loss`.

        None, the default: the document's own token alone. Asked for before the micro-batch is scored, on all
        ranks, in a micro-batch without documents too. `teacher(micro, count, temperature)` reads the
        `Likeliest` tokens of a frozen model; it is None without need "teacher".
        """
        return None

    def ntp_weights(self, micro: MicroBatch, scores: Scores) -> Tensor:
        """Weights [M] of the next-token loss. They must carry no gradient: detach what depends on scores."""
        return torch.ones_like(scores.trunk_logps)


for _old, _new in RENAMED.items():
    setattr(Objective, _old, getattr(Objective, _new))
