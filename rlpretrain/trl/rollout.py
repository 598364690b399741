"""A `rollout_func` for TRL's trainers: one of our engines samples, and the live model scores.

    rollouts = Rollouts(reward, VLLMEngine(...), dataset)
    GRPOTrainer(model, reward_funcs=[reward], callbacks=[reward.callback], rollout_func=rollouts,
                train_dataset=dataset, ...)

The reward reaches TRL as a field of the rollout. After each optimizer step the engine gets the trainer's
weights before it samples. TRL marks this interface as experimental.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
from torch import Tensor

from rlpretrain.config import ConfigError
from rlpretrain.models.gathering import whole_weights
from rlpretrain.models.lengths import check_engine, check_rows, limit_of
from rlpretrain.objectives import Setting
from rlpretrain.rollouts.batches import roll_out
from rlpretrain.trl.callback import plain
from rlpretrain.trl.data import PROMPT_COLUMNS
from rlpretrain.trl.prompts import NAMES, longest_row, position_of
from rlpretrain.trl.reward import ObjectiveReward
from rollout.engine import Engine
from rollout.types import Group, Position, SamplingParams

NO_MODEL = "Rollouts has no model yet: pass callbacks=[reward.callback] to the trainer"


class Rollouts:
    """Samples with `engine` at the rows of a dataset that `reward.dataset` made, with the trainer's settings.

    Raises ConfigError for a dataset that is a stream or lacks columns, and for a prompt that is not in it.
    """

    def __init__(self, reward: ObjectiveReward, engine: Engine, dataset: Any, seed: int = 0):
        if not hasattr(dataset, "__len__") or not set(PROMPT_COLUMNS) <= set(dataset.column_names):
            raise ConfigError(
                "Rollouts needs the dataset that reward.dataset(documents) makes, and not as a stream: TRL "
                "hands over prompts only, and their positions are looked up in the dataset"
            )
        self.reward, self.engine, self.seed, self.calls = reward, engine, seed, 0
        self.position_of_prompt: dict[str, Position] = {}
        for row in dataset.select_columns(list(PROMPT_COLUMNS)):
            self.position_of_prompt.setdefault(row["prompt"], position_of(row))
        self.synced: int | None = None
        reward.longest.append(longest_row(dataset))

    def __call__(self, prompts: Sequence[str], trainer: Any) -> dict[str, list[Any]]:
        """Thoughts for the prompts, which TRL repeats as often as it wants completions."""
        step, args, tokenizer = trainer.state.global_step, trainer.args, self.reward.tokenizer
        if unknown := next((p for p in prompts if p not in self.position_of_prompt), None):
            raise ConfigError(f"a prompt is not in the dataset of Rollouts: …{unknown[-80:]!r}")
        if self.synced != step:
            self.engine.sync(self.weights, step)
            self.synced = step
        eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        params = SamplingParams(
            args.max_completion_length, args.temperature, args.top_p, max(args.top_k, 0), eos
        )
        if not self.calls:
            self._check_lengths(params)
        rng = np.random.default_rng((self.seed, self.calls, trainer.accelerator.process_index))
        self.calls += 1
        runs = [(prompt, len(list(same))) for prompt, same in groupby(prompts)]
        positions, counts = [self.position_of_prompt[prompt] for prompt, _ in runs], [n for _, n in runs]
        by_place: dict[int, Group] = {}
        objective = self.reward.objective
        for count in sorted(set(counts)):  # usually one: an engine samples as often at every position
            places = [i for i, n in enumerate(counts) if n == count]
            objective.setting = Setting(params, count, 0.0)
            seeds = [int(seed) for seed in rng.integers(2**62, size=len(places))]
            sampled = roll_out(objective, self.engine, [positions[i] for i in places], seeds)
            for i, group in zip(places, sampled, strict=True):
                by_place[i] = replace(group, id=f"{group.id}:{i}")
        groups = [by_place[i] for i in sorted(by_place)]
        thoughts = [(group, thought) for group in groups for thought in group.thoughts]
        rewards = self.reward.score_and_remember(groups)
        return {
            "prompt_ids": [list(g.prompt.token_ids) for g, _ in thoughts],
            "completion_ids": [list(t.token_ids) for _, t in thoughts],
            "logprobs": [list(t.behaviour_logps) for _, t in thoughts],
            self.reward.__name__: rewards,
        }

    def _check_lengths(self, params: SamplingParams) -> None:
        """Raise ConfigError for rows that are too long for the model or the engine."""
        if self.reward.model is None:
            raise RuntimeError(NO_MODEL)
        objective, longest = self.reward.objective, max(self.reward.longest)
        objective.setting = Setting(params, 2, 0.0)
        check_rows(objective, longest, limit_of(plain(self.reward.model)), NAMES)
        check_engine(objective, longest, self.engine.info.max_model_len, NAMES)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The trained weights under their checkpoint names, adapters merged in and shards gathered."""
        if self.reward.model is None:
            raise RuntimeError(NO_MODEL)
        yield from whole_weights(plain(self.reward.model), self.reward.model)
