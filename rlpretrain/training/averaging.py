"""The average of the trained weights (`average`): kept during a run, evaluated, saved, never sampled from.

Each rank averages its part: under ZeRO 3 and FSDP its shards, else every W-th parameter of W ranks. With
adapters these are averaged, not the merged weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from rlpretrain.config import AverageConfig, ConfigError
from rlpretrain.models.averages import move_towards
from rlpretrain.training.backends import Policy
from rlpretrain.training.backends.base import WritesParts

SHARDED = "average"
"""The folder of a checkpoint that has the average of a policy that writes its parts."""


class WeightAverage:
    """The average of a policy's trained weights after some of its steps."""

    def __init__(self, config: AverageConfig, policy: Policy):
        self.config, self.policy = config, policy
        self.device = torch.device("cpu") if config.device == "cpu" else policy.ranks.device
        self.count = 0
        """How many weights have counted."""
        self.means: dict[str, Tensor] = {}
        """sma and ema: this rank's part of the average, in float32."""
        self.latest: deque[dict[str, Tensor]] = deque(maxlen=config.last)
        """last_k: this rank's part of the latest weights, in CPU memory and their own dtype."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Let the present weights count, if those after this step do."""
        if step < self.config.start or step % self.config.every:
            return
        own = ((name, values) for name, values, is_own in self._parts() if is_own)
        if self.config.kind == "last_k":
            self.latest.append({name: values.to("cpu", copy=True) for name, values in own})
        elif self.count:
            share = 1 - self.config.decay if self.config.kind == "ema" else 1 / (self.count + 1)
            move_towards(self.means, own, share)
        else:
            self.means = {name: values.to(self.device, torch.float32, copy=True) for name, values in own}
        self.count += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The policy has the average in place of its weights, which it gets back. All ranks call it."""
        live: dict[str, Tensor] = {}
        try:
            with torch.no_grad():
                for place, (name, values, is_own) in enumerate(self._parts()):
                    live[name] = values.to("cpu", copy=True)
                    mean = self._mean(name).to(values.device) if is_own else torch.empty_like(values).float()
                    if self._is_split:
                        dist.broadcast(mean, src=place % self.policy.ranks.size)
                    values.copy_(mean)
            yield
        finally:
            with torch.no_grad():
                for name, values in self.policy.parts():
                    if name in live:
                        values.copy_(live[name])

    def save(self, path: Path) -> None:
        """Write this rank's part to the folder `path`."""
        state = {"count": self.count, "means": self.means, "latest": list(self.latest)}
        if isinstance(self.policy, WritesParts):
            self.policy.save_parts(self._named(state["means"], state["latest"]), path / SHARDED)
            state |= {"means": {}, "latest": []}
        torch.save(state, path / f"average-{self.policy.ranks.rank}.pt")

    def load(self, path: Path) -> None:
        """Restore what `save` wrote, on another number of ranks too."""
        ranks = self.policy.ranks
        files = sorted(path.glob("average-*.pt"))
        if len(files) == ranks.size:
            files = [path / f"average-{ranks.rank}.pt"]
        states = [torch.load(file, map_location="cpu", weights_only=True) for file in files]
        self.count = states[0]["count"]
        means = {name: mean for state in states for name, mean in state["means"].items()}
        latest = [
            {name: values for weights in of_step for name, values in weights.items()}
            for of_step in zip(*(state["latest"] for state in states), strict=True)
        ]
        if isinstance(self.policy, WritesParts):
            means, latest = self._load_parts(self.policy, path / SHARDED)
        own = {name for name, _, is_own in self._parts() if is_own}
        self.means = {name: mean.to(self.device) for name, mean in means.items() if name in own}
        kept = [{name: values for name, values in weights.items() if name in own} for weights in latest]
        self.latest = deque(kept, maxlen=self.config.last)

    def _load_parts(
        self, policy: WritesParts, path: Path
    ) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """(means, latest) of the parts that this rank holds."""
        own = {name: values.to("cpu", copy=True) for name, values in self.policy.parts()}
        means: dict[str, Tensor] = {}
        latest: list[dict[str, Tensor]] = []
        if self.config.kind == "last_k":
            kept = min(self.count, self.config.last)
            latest = [{name: torch.empty_like(values) for name, values in own.items()} for _ in range(kept)]
        elif self.count:
            means = {name: torch.empty_like(values, dtype=torch.float32) for name, values in own.items()}
        policy.load_parts(self._named(means, latest), path)
        return means, latest

    @staticmethod
    def _named(means: dict[str, Tensor], latest: list[dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """All parts, by the names that they have in a checkpoint."""
        return {"means": means} | {f"latest-{k}": weights for k, weights in enumerate(latest)}

    def _parts(self) -> Iterator[tuple[str, Tensor, bool]]:
        """(name, values, whether this rank averages them) of each parameter."""
        ranks = self.policy.ranks
        for place, (name, values) in enumerate(self.policy.parts()):
            yield name, values, not self._is_split or place % ranks.size == ranks.rank

    @property
    def _is_split(self) -> bool:
        """Whether all ranks hold whole parameters, of which each averages some."""
        return self.policy.shares_weights and self.policy.ranks.size > 1

    def _mean(self, name: str) -> Tensor:
        """The average of a parameter in float32."""
        if self.config.kind != "last_k":
            return self.means[name]
        first, *others = (weights[name] for weights in self.latest)
        mean = {name: first.to(torch.float32, copy=True)}
        for count, values in enumerate(others, start=2):
            move_towards(mean, [(name, values)], 1 / count)
        return mean[name]


def check_average(config: AverageConfig | None, steps: int) -> None:
    """Raise ConfigError if too few of `steps` steps count."""
    if config is None:
        return
    first = max(1, -(-config.start // config.every)) * config.every
    count = max(0, (steps - first) // config.every + 1)
    if not count:
        raise ConfigError(
            f"average: no weights count, the first would be those after step {first} of {steps}: lower "
            "average.every or average.start"
        )
    if config.kind == "last_k" and config.last > count:
        raise ConfigError(
            f"average.last {config.last}: only {count} of the run's {steps} steps count (average.every "
            f"{config.every}, average.start {config.start})"
        )
