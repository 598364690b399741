"""Samples the thoughts of an evaluation: those of the objective, and greedy ones beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlpretrain.objectives import Objective
from rlpretrain.rollouts.batches import roll_out
from rlpretrain.rollouts.drawing import DrawnPosition
from rollout.blocking import wait_for_result
from rollout.hf import HFEngine
from rollout.types import Group, Prompt, SamplingParams, Thought


class WithGreedy:
    """An engine that also draws a greedy thought after every prompt, and keeps it.

    It is drawn from the same reading of the prompt, which costs more than the thought.
    """

    def __init__(self, engine: HFEngine):
        self.engine, self.greedy = engine, dict[Prompt, Thought]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    async def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, n: int, seeds: Sequence[int]
    ) -> list[list[Thought]]:
        """As the engine's."""
        thoughts = await self.engine.sample(prompts, params, n, seeds, greedy=True)
        self.greedy |= {prompt: of_prompt.pop() for prompt, of_prompt in zip(prompts, thoughts, strict=True)}
        return thoughts

    def greedy_of(
        self, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Thought]:
        """The greedy thought after each prompt; prompts that were not sampled before are sampled now."""
        if not set(prompts) <= self.greedy.keys():
            wait_for_result(self.sample(prompts, params, 1, seeds))
        return [self.greedy[prompt] for prompt in prompts]


@dataclass(slots=True)
class Sampler:
    """Samples thoughts at positions, each position once."""

    objective: Objective
    engine: HFEngine
    places: Sequence[DrawnPosition]
    is_greedy: bool
    groups: dict[int, Group] = field(default_factory=dict)
    """By the index of the position."""
    greedy: dict[int, Group] = field(default_factory=dict)
    children: list[Group] = field(default_factory=list)
    """Groups that the objective made from these."""

    def sample(self, wanted: Iterable[int]) -> None:
        """Sample at the positions with these indices, except where that is done."""
        indices = [i for i in dict.fromkeys(wanted) if i not in self.groups]
        if not indices:
            return
        positions = [self.places[i].position for i in indices]
        seeds = [self.places[i].seed for i in indices]
        engine = WithGreedy(self.engine) if self.is_greedy else self.engine
        rolled_out = roll_out(self.objective, engine, positions, seeds)
        groups = [group for group in rolled_out if group.parent_id is None]
        self.children += [group for group in rolled_out if group.parent_id is not None]
        self.groups |= zip(indices, groups, strict=True)
        if isinstance(engine, WithGreedy):
            prompts = [self.objective.prompt(position) for position in positions]
            thoughts = engine.greedy_of(prompts, self.objective.setting.params, seeds)
            for i, group, thought in zip(indices, groups, thoughts, strict=True):
                self.greedy[i] = replace(group, thoughts=(thought,), rewards=None)
