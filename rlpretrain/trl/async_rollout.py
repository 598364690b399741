"""Rollouts for TRL's asynchronous trainer: one of our engines samples on a thread, the live model scores
between steps.

    reward = InformationGainReward(tokenizer=tokenizer) data = reward.dataset("docs.jsonl") rollouts =
    AsyncRollouts(reward, VLLMEngine(path), data, args) AsyncGRPOTrainer(path, args=args, train_dataset=data,
    processing_class=tokenizer, callbacks=[reward.callback],
                     rollout_worker=rollouts, weight_transfer=rollouts).train()

A gain needs the policy, and weights that an optimizer is changing are nobody's. So thoughts are sampled
meanwhile, and a group is scored when the trainer comes for it: in the trainer's own thread, between two
steps.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import wait
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlpretrain.compat import INSTALL
from rlpretrain.config import ConfigError
from rlpretrain.models.lengths import check_engine, check_rows, limit_of
from rlpretrain.objectives import Setting
from rlpretrain.trl.callback import plain
from rlpretrain.trl.prompts import NAMES, longest_row, position_of
from rlpretrain.trl.reward import COLUMNS, ObjectiveReward
from rollout.engine import Engine
from rollout.hf import HFEngine
from rollout.queue import Rollout, RolloutQueue
from rollout.types import Group, Position, SamplingParams

PATIENCE = 1000
"""Groups in a row with fewer than two thoughts that count, after which a run gives up."""


class AsyncRollouts:
    """Both `rollout_worker` and `weight_transfer` of TRL's AsyncGRPOTrainer, whose arguments `args` are.

    `dataset` is what `reward.dataset` makes, of any length; it is gone through in its order, again and again.
    `args` say how thoughts are drawn, how many for a position, how stale they may be, and how many are
    sampled ahead (`max_inflight_tasks`). `attention` is what the model scores with: that of the trainer reads
    its own packed rows only. In several processes each makes one, and the first one's is used: the others
    need no engine.

    Versions are the trainer's: 1 is that of the first weights. A thought is sampled under one; new weights
    wait for what is being sampled, at most `heartbeat_stale_after_s`. A failure of the engine is raised where
    the trainer next asks for a sample.

    Raises ConfigError for settings that cannot work, ImportError without TRL.
    """

    def __init__(
        self,
        reward: ObjectiveReward,
        engine: Engine | None,
        dataset: Any,
        args: Any,
        *,
        seed: int = 0,
        attention: str = "sdpa",
    ):
        try:
            from trl.experimental.async_grpo.async_rollout_worker import RolloutSample
        except ImportError as error:
            raise ImportError(
                f"AsyncRollouts needs TRL with its asynchronous trainer: {INSTALL['trl']}"
            ) from error
        _check(reward, engine, dataset, args)
        reward.attention = attention
        reward.longest.append(longest_row(dataset))
        self.reward, self.args, self.seed, self.sample = reward, args, seed, RolloutSample
        self.engine: Any = engine
        self.version = 0
        self.rollout_buffer: Any = _Buffer(self)
        self.metrics_queue: Any = queue.Queue()
        self.queue: RolloutQueue | None = None
        self.waiting: deque[_Asked] = deque()  # in the order in which they will be trained on
        self.positions = _positions(dataset)
        self.asked = 0  # groups, so far
        self.barren = 0  # groups in a row that nothing can be learned from
        self.since = 0.0  # when something last happened here

    # rollout_worker

    def start(self) -> None:
        """Begin to sample."""
        if self.reward.model is None:
            raise RuntimeError(
                "AsyncRollouts has no model to score with: pass callbacks=[reward.callback] to the trainer"
            )
        a, eos = self.args, self.reward.tokenizer.eos_token_id
        params = SamplingParams(
            a.max_completion_length, a.temperature, a.top_p, max(a.top_k, 0), () if eos is None else (eos,)
        )
        objective, longest = self.reward.objective, max(self.reward.longest)
        objective.setting = Setting(params, a.num_generations, 0.0)
        check_rows(objective, longest, limit_of(plain(self.reward.model)), NAMES)
        check_engine(objective, longest, self.engine.info.max_model_len, NAMES)
        self.ahead = max(1, a.max_inflight_tasks // a.num_generations)
        alone = isinstance(
            self.engine, HFEngine
        )  # computes in its caller's thread: more at a time would only delay a pause
        self.queue = RolloutQueue(1 if alone else self.ahead, a.heartbeat_stale_after_s)
        self._ask()

    def stop(self) -> None:
        """Give up what is being sampled; the engine stays open."""
        if self.queue is not None:
            self.queue.close()
        self.queue = None
        self.waiting.clear()

    def update_model_version(self, model_version: int) -> None:
        """Which version the trainer takes its weights for."""
        self.version = model_version
        if self.engine.version != model_version:
            raise RuntimeError(
                f"the trainer's weights are version {model_version}, the engine's {self.engine.version}: "
                "pass the same AsyncRollouts as weight_transfer"
            )

    def check_health(self, stale_after_s: float) -> None:
        """Raises RuntimeError if the engine failed, or nothing was sampled for `stale_after_s` seconds."""
        if self.queue is None:
            raise RuntimeError("these rollouts are not running: AsyncRollouts serves one training")
        for asked in self.waiting:
            if asked.piece.done():
                asked.group()
        age = time.time() - max([self.since, *(asked.finished for asked in self.waiting)])
        if age > stale_after_s:
            raise RuntimeError(
                f"no thoughts came for {age:.0f} s (heartbeat_stale_after_s is {stale_after_s:.0f}): "
                f"{type(self.engine).__name__} hangs, or is too slow for that"
            )

    # weight_transfer

    def init_weight_transfer(self) -> None:
        """Nothing to set up: the engine knows how its weights come."""

    def pause(self) -> None:
        """Start no more thoughts, and wait for those that are being sampled."""
        if self.queue is None:
            return
        try:
            self.queue.pause()
        except TimeoutError as error:
            raise RuntimeError(
                f"{error}: {type(self.engine).__name__} hangs, or heartbeat_stale_after_s is too short for "
                "thoughts as long as these"
            ) from error

    def send_weights(self, iterator: Iterator[tuple[str, Tensor]]) -> None:
        """Hand the engine the weights of the next version, adapters merged in."""
        self.engine.sync(lambda: iterator, self.version + 1)

    def resume(self) -> None:
        """Go on."""
        self.since = time.time()
        if self.queue is not None:
            self.queue.resume()

    def destroy(self) -> None:
        """Nothing to release: whoever made the engine closes it."""

    # groups

    def draw(self, timeout: float | None) -> list[Any]:
        """The samples of the next group: none if it is too stale or teaches nothing, queue.Empty if it is
        not there yet.
        """
        if self.queue is None:
            self.check_health(0.0)
        asked = self.waiting[0]
        wait([asked.piece], timeout)
        if not asked.piece.done():
            raise queue.Empty
        group = asked.group()
        self.waiting.popleft()
        self._ask()
        if self.version - group.policy_version > self.args.max_staleness:
            self.metrics_queue.put({"sample/dropped_stale_total": float(len(group.thoughts))})
            return []
        return self._scored(group, asked)

    def _ask(self) -> None:
        """Let as many groups be sampled as may be ahead."""
        assert self.queue is not None
        self.since = time.time()
        objective = self.reward.objective
        while len(self.waiting) < self.ahead:
            seed = int(np.random.default_rng((self.seed, self.asked)).integers(2**62))
            work = partial(objective.rollout, self.engine, [next(self.positions)], [seed])
            self.waiting.append(_Asked(self.asked, work, self.queue))
            self.asked += 1

    def _scored(self, group: Group, asked: _Asked) -> list[Any]:
        """A sample for each thought that counts, with its advantage."""
        rewards, found = self.reward.rewards([group])
        self.reward.log([group], found, lambda name, value: self.metrics_queue.put({name: value}))
        counted = [r for r in rewards if r is not None]
        self.metrics_queue.put({"frac_reward_zero_std": float(len(set(counted)) < 2)})
        if len(counted) < 2:
            self.metrics_queue.put({"sample/dropped_uncounted_total": float(len(rewards))})
            self.barren += 1
            if self.barren >= PATIENCE:
                raise RuntimeError(
                    f"{self.barren} groups in a row had fewer than two thoughts that count: raise "
                    "max_completion_length, or let unclosed ones count (cut='force_close')"
                )
            return []
        self.barren = 0
        advantages = self.reward.objective.advantage(torch.from_numpy(found["reward"])[None], [group])[
            0
        ].tolist()
        decode, prompt = self.reward.tokenizer.decode, list(group.prompt.token_ids)
        said, spread = [{"role": "user", "content": decode(prompt)}], float(np.std(counted))
        return [
            self.sample(
                prompt=said,
                completion=[{"role": "assistant", "content": decode(list(thought.token_ids))}],
                input_ids=np.array([*prompt, *thought.token_ids], dtype=np.int64),
                completion_mask=np.array([0] * len(prompt) + [1] * len(thought.token_ids), dtype=np.int64),
                old_log_probs=np.array([0.0] * len(prompt) + list(thought.behaviour_logps), dtype=np.float32),
                advantage=advantage,
                model_version=group.policy_version,
                group_id=asked.number,
                metrics={"reward": reward, "reward_std": spread, f"rewards/{self.reward.__name__}": reward},
                enqueued_at=asked.finished,
            )
            for thought, reward, advantage in zip(group.thoughts, rewards, advantages, strict=True)
            if reward is not None
        ]


class _Asked:
    """A group that is being sampled, or waits for the trainer."""

    def __init__(self, number: int, rollout: Rollout, queue: RolloutQueue):
        self.number, self.rollout, self.finished = number, rollout, 0.0
        (self.piece,) = queue.submit([self._sample]).pieces

    async def _sample(self) -> list[Group]:
        groups = await self.rollout()
        self.finished = time.time()
        return groups

    def group(self) -> Group:
        """What came of it."""
        try:
            (group,) = self.piece.result(0)
        except ValueError as error:
            raise ConfigError(f"cannot sample thoughts: {error}") from error
        except Exception as error:
            raise RuntimeError(f"the engine failed while it sampled thoughts: {error!r}") from error
        return group


class _Buffer(queue.Queue):
    """The queue that the trainer draws samples from, filled when it does."""

    def __init__(self, rollouts: AsyncRollouts):
        super().__init__()
        self.rollouts = rollouts

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """The next sample; queue.Empty if there is none within `timeout` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        while self.empty():
            left = 0.0 if not block else None if end is None else max(0.0, end - time.monotonic())
            for sample in self.rollouts.draw(left):
                self.put_nowait(sample)
        return super().get(block=False)

    def qsize(self) -> int:
        """Samples that wait, those of groups that are not scored yet among them."""
        done = sum(asked.piece.done() for asked in self.rollouts.waiting)
        return super().qsize() + done * self.rollouts.args.num_generations


def _positions(dataset: Any) -> Iterator[Position]:
    while True:
        row = None
        for row in dataset:
            if missing := [name for name in COLUMNS if name not in row]:
                raise ConfigError(
                    f"AsyncRollouts: the dataset lacks {', '.join(missing)}: make it by "
                    "reward.dataset(documents)"
                )
            yield position_of(row)
        if row is None:
            raise ConfigError("AsyncRollouts: the dataset is empty")


def _check(reward: ObjectiveReward, engine: Engine | None, dataset: Any, args: Any) -> None:
    known = getattr(dataset, "column_names", None)
    for wrong, why in (
        (reward.late, "give the reward a tokenizer: InformationGainReward(tokenizer=tokenizer)"),
        (
            known is not None and not set(COLUMNS) <= set(known),
            "the dataset is not one that reward.dataset(documents) makes",
        ),
        (
            reward.added,
            f"the tokenizer lacked {' and '.join(reward.added)}, and so does the checkpoint that the trainer "
            "loads: call ensure_delimiters(tokenizer, model), save both, and start from that folder",
        ),
        (
            engine is not None and engine.info.shares_weights,
            "the engine must have weights of its own, since it samples while those of "
            "the trainer change: HFEngine(model, shares_weights=False)",
        ),
        (
            args.token_budget is None,
            "set token_budget: at least the longest prompt and thought, or 0 for micro-batches of "
            "per_device_train_batch_size thoughts. TRL would ask a vLLM server of its own for it",
        ),
        (
            args.num_generations < 2,
            "num_generations must be at least 2: a lone thought has nothing to be compared with",
        ),
        (
            args.min_p or args.repetition_penalty != 1.0,
            "our engines know neither min_p nor repetition_penalty",
        ),
    ):
        if wrong:
            raise ConfigError(f"AsyncRollouts: {why}")
