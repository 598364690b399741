"""Checks that an engine samples from the weights it was given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch

from rollout.engine import CachingEngine, Engine
from rollout.types import Prompt, SamplingParams, Thought


class StaleWeights(RuntimeError):
    """An engine does not sample from the weights it was given."""

    says_all = True  # a command line prints the message without a traceback


class Probe:
    """Checks after a sync that an engine samples from the policy's weights: it samples, the trainer scores.

    The prompt is fixed and at least two blocks of the engine's prefix cache long. The probe of the last sync
    sampled after the same prompt, so a prefix cache that outlived the weights shows as well. (Scoring a
    prompt would not show it, since engines do not read the cache for that.) `tolerance` is the largest
    difference of one token in nats.
    """

    def __init__(
        self,
        vocabulary: int,
        block_size: int,
        most: int,
        *,
        tokens: int = 4,
        temperature: float = 1.0,
        tolerance: float = 1e-3,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        length = max(1, min(2 * block_size + 1, most - tokens - 1))
        self.prompt = Prompt(
            tuple(torch.randint(vocabulary, (length,), generator=generator).tolist()), stop_ids=()
        )
        self.params = SamplingParams(max_thought_tokens=tokens, temperature=temperature)
        self.tolerance = tolerance
        self.covers_cache = length > 2 * block_size

    async def ask(self, engine: Engine) -> list[Thought]:
        """A thought of the engine after the prompt; of a pool, one of each engine, as it deals evenly."""
        copies = engine.info.num_engines
        groups = await engine.sample([self.prompt] * copies, self.params, 1, [engine.version] * copies)
        return [thought for (thought,) in groups]

    async def verify(
        self, engine: Engine, thoughts: Sequence[Thought], logps: Sequence[Sequence[float]], version: int
    ) -> float:
        """The largest difference (nats) between the engine's log-probs and the trainer's `logps`.

        Raises StaleWeights above the tolerance. The message names the likely cause: the prefix cache if
        emptying it changes the log-probs, else the weights.
        """
        if stale := [thought.policy_version for thought in thoughts if thought.policy_version != version]:
            raise StaleWeights(
                f"the engine answers with version {stale[0]}, but version {version} was synced"
            )
        differences = [
            _largest_difference(thought.behaviour_logps, own)
            for thought, own in zip(thoughts, logps, strict=True)
        ]
        is_nan = [difference for difference in differences if math.isnan(difference)]
        worst = is_nan[0] if is_nan else max(differences)
        if worst <= self.tolerance:
            return worst
        failing = [i for i, difference in enumerate(differences) if not difference <= self.tolerance]
        of_many = f"; {len(failing)} of {len(differences)} engines" if len(differences) > 1 else ""
        cause = await self._cause(engine, thoughts[failing[0]], failing[0])
        raise StaleWeights(
            f"after the sync of version {version} the engine's log-probs of a fixed probe are up to "
            f"{worst:.3g} nats off the trainer's (tolerance {self.tolerance:g}{of_many}), "
            f"so it does not sample from these weights. Likely cause: {cause}"
        )

    async def _cause(self, engine: Engine, thought: Thought, index: int) -> str:
        """Why the engine's thought `index` has other log-probs: sample again with an empty prefix cache."""
        if engine.info.block_size is not None:
            cast(CachingEngine, engine).reset_prefix_cache()
            again = (await self.ask(engine))[index]
            same = again.token_ids == thought.token_ids and all(
                abs(a - b) <= self.tolerance
                for a, b in zip(again.behaviour_logps, thought.behaviour_logps, strict=True)
            )
            if not same:
                return "its prefix cache kept contexts that were read with the old weights"
        return (
            "a tensor did not arrive, or the engine runs in another dtype than the trainer (then raise "
            "engine.probe_tolerance)"
        )


def _largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest absolute difference of two sequences of one length; 0 if they are empty."""
    return max((abs(a - b) for a, b in zip(ours, theirs, strict=True)), default=0.0)
