"""Groups that are being sampled for TRL's asynchronous trainer, and the buffer that it draws samples from."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rlpretrain.config import ConfigError
from rlpretrain.trl.data import PROMPT_COLUMNS
from rlpretrain.trl.prompts import position_of
from rollout.queue import Rollout, RolloutQueue
from rollout.types import Group, Position


class PendingGroup:
    """A group that is being sampled, or that waits for the trainer."""

    def __init__(self, number: int, rollout: Rollout, rollouts: RolloutQueue):
        self.number, self.rollout = number, rollout
        self.finished = 0.0  # when it was sampled, in the seconds of `time.time`
        (self.piece,) = rollouts.submit([self._sample]).pieces

    async def _sample(self) -> list[Group]:
        groups = await self.rollout()
        self.finished = time.time()
        return groups

    def result(self) -> Group:
        """The sampled group; ConfigError or RuntimeError if the engine failed."""
        try:
            (group,) = self.piece.result(0)
        except ValueError as error:
            raise ConfigError(f"cannot sample thoughts: {error}") from error
        except Exception as error:
            raise RuntimeError(f"the engine failed while it sampled thoughts: {error!r}") from error
        return group


class SampleBuffer(queue.Queue):
    """The queue that the trainer draws samples from. It is filled when the trainer draws.

    `draw_group(timeout)` gives the samples of the next group, or raises queue.Empty; `waiting()` counts
    samples of groups that are sampled and not yet scored.
    """

    def __init__(self, draw_group: Callable[[float | None], Sequence[Any]], waiting: Callable[[], int]):
        super().__init__()
        self.draw_group, self.waiting = draw_group, waiting

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """The next sample; queue.Empty if there is none within `timeout` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        while self.empty():
            left = None if end is None else max(0.0, end - time.monotonic())
            for sample in self.draw_group(left if block else 0.0):
                self.put_nowait(sample)
        return super().get(block=False)

    def qsize(self) -> int:
        """Samples that wait, including those of groups that are not scored yet."""
        return super().qsize() + self.waiting()


def cycle_positions(dataset: Any) -> Iterator[Position]:
    """The positions of a prompt dataset in its order, again and again."""
    while True:
        row = None
        for row in dataset:
            if missing := [name for name in PROMPT_COLUMNS if name not in row]:
                raise ConfigError(
                    f"AsyncRollouts: the dataset lacks {', '.join(missing)}: make it by "
                    "reward.dataset(documents)"
                )
            yield position_of(row)
        if row is None:
            raise ConfigError("AsyncRollouts: the dataset is empty")
