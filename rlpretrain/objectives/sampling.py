"""Sample groups for an objective: thoughts after prompts, then answers after thoughts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from rlpretrain.objectives.settings import Setting
from rollout.engine import Engine
from rollout.types import FinishReason, Group, Position, Prompt, SamplingParams, Thought


def derive_seed(seed: int, k: int = 1) -> int:
    """Seed `k` for samples that follow a sample with `seed`."""
    return (seed * 0x9E3779B97F4A7C15 + k) % 2**62


def group_id(position: Position, seed: int) -> str:
    """The id of the group that is sampled at a position with a seed."""
    return f"{position.document_id}@{position.index}:{seed:x}"


async def sample_thoughts(
    engine: Engine,
    setting: Setting,
    positions: Sequence[Position],
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    role: str,
) -> list[Group]:
    """A group of `setting.thoughts` thoughts for each prompt, without rewards."""
    sampled = await engine.sample(prompts, setting.params, setting.thoughts, seeds)
    groups = []
    for position, prompt, thoughts, seed in zip(positions, prompts, sampled, seeds, strict=True):
        version = thoughts[0].policy_version
        groups.append(Group(group_id(position, seed), position, prompt, tuple(thoughts), version, role=role))
    return groups


async def sample_answers(
    engine: Engine, params: SamplingParams, groups: Sequence[Group], closing: str
) -> list[Group]:
    """The groups with an answer after each thought that closed itself; see `Objective.sample_answers`."""
    prompts, seeds = [], []
    for group in groups:
        for thought in group.thoughts:
            if thought.finish_reason is FinishReason.CLOSE:
                ids = (*group.prompt.token_ids, *thought.token_ids)
                prompts.append(Prompt(ids, (), stop_strings=(closing,)))
                seeds.append(derive_seed(thought.seed))
    sampled = await engine.sample(prompts, params, 1, seeds) if prompts else []
    answers = iter([answer for (answer,) in sampled])
    return [_with_answers(group, answers) for group in groups]


def _with_answers(group: Group, answers: Iterator[Thought]) -> Group:
    """The group, with the next answer after each thought that closed itself."""
    thoughts = []
    for thought in group.thoughts:
        closed = thought.finish_reason is FinishReason.CLOSE
        thoughts.append(_joined(thought, next(answers)) if closed else thought)
    version = min(thought.policy_version for thought in thoughts)
    return replace(group, thoughts=tuple(thoughts), policy_version=version)


def _joined(thought: Thought, answer: Thought) -> Thought:
    """Thought and answer as one sampled sequence."""
    start = len(thought.token_ids)
    last = thought.updates[-1][1] if thought.updates else thought.policy_version
    begun = ((start, answer.policy_version),) if answer.policy_version > last else ()
    later = tuple((start + index, version) for index, version in answer.updates)
    return Thought(
        thought.token_ids + answer.token_ids,
        thought.behaviour_logps + answer.behaviour_logps,
        answer.finish_reason,
        min(thought.policy_version, answer.policy_version),
        thought.seed,
        answer_span=(start, start + len(answer.token_ids)),
        updates=thought.updates + begun + later,
    )
