"""Rollouts for TRL's asynchronous trainer: one of our engines samples while the trainer trains.

    reward = InformationGainReward(tokenizer=tokenizer) data = reward.dataset("docs.jsonl") rollouts =
    AsyncRollouts(reward, VLLMEngine(path), data, args) AsyncGRPOTrainer(path, args=args,
    train_dataset=data, processing_class=tokenizer, callbacks=[reward.callback],
                     rollout_worker=rollouts, weight_transfer=rollouts).train()

A gain needs the policy, whose weights change while the optimizer steps. So thoughts are sampled in the
background, and a group is scored when the trainer draws it: in the trainer's own thread, between two
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
from rlpretrain.trl.data import PROMPT_COLUMNS
from rlpretrain.trl.pending import PendingGroup, SampleBuffer, cycle_positions
from rlpretrain.trl.prompts import NAMES, longest_row
from rlpretrain.trl.reward import ObjectiveReward
from rollout.engine import Engine
from rollout.hf import HFEngine
from rollout.queue import RolloutQueue
from rollout.types import Group, SamplingParams

PATIENCE = 1000
"""Groups in a row with fewer than two counted thoughts after which a run stops."""


class AsyncRollouts:
    """Both `rollout_worker` and `weight_transfer` of TRL's AsyncGRPOTrainer, whose arguments are `args`.

    `dataset` is made by `reward.dataset` and may be a stream; its rows are used in order, again and
    again. `args` say how thoughts are sampled, how many for a position, how stale they may be, and how
    many are sampled ahead (`max_inflight_tasks`). `attention` is the kernel that the model scores with,
    since the trainer's own kernel reads only the trainer's packed rows. In several processes each process
    makes an AsyncRollouts, and only that of the first samples: the others need no engine.

    Versions are the trainer's; the first weights have version 1. A thought is sampled under one version:
    new weights wait for the thoughts under way, at most `heartbeat_stale_after_s`. A failure of the
    engine is raised when the trainer next asks for a sample.

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
        _check_settings(reward, engine, dataset, args)
        reward.attention = attention
        reward.longest.append(longest_row(dataset))
        self.reward, self.args, self.seed, self.sample = reward, args, seed, RolloutSample
        self.engine: Any = engine
        self.version = 0
        self.rollout_buffer: Any = SampleBuffer(self.draw, self._count_sampled)
        self.metrics_queue: Any = queue.Queue()
        self.queue: RolloutQueue | None = None
        self.waiting: deque[PendingGroup] = deque()  # in the order of training
        self.positions = cycle_positions(dataset)
        self.submitted = 0  # groups so far
        self.unusable = 0  # groups in a row with fewer than two counted thoughts
        self.last_activity = 0.0  # time of the last submission or sync

    # rollout_worker

    def start(self) -> None:
        """Start sampling."""
        if self.reward.model is None:
            raise RuntimeError(
                "AsyncRollouts has no model to score with: pass callbacks=[reward.callback] to the trainer"
            )
        args, eos = self.args, self.reward.tokenizer.eos_token_id
        stop_ids = () if eos is None else (eos,)
        params = SamplingParams(
            args.max_completion_length, args.temperature, args.top_p, max(args.top_k, 0), stop_ids
        )
        objective, longest = self.reward.objective, max(self.reward.longest)
        objective.setting = Setting(params, args.num_generations, 0.0)
        check_rows(objective, longest, limit_of(plain(self.reward.model)), NAMES)
        check_engine(objective, longest, self.engine.info.max_model_len, NAMES)
        self.ahead = max(1, args.max_inflight_tasks // args.num_generations)
        # HFEngine computes in its caller's thread: more groups at a time would only delay a pause.
        in_flight = 1 if isinstance(self.engine, HFEngine) else self.ahead
        self.queue = RolloutQueue(in_flight, args.heartbeat_stale_after_s)
        self._submit()

    def stop(self) -> None:
        """Stop sampling and drop what is under way; the engine stays open."""
        if self.queue is not None:
            self.queue.close()
        self.queue = None
        self.waiting.clear()

    def update_model_version(self, model_version: int) -> None:
        """Take the trainer's version of its weights."""
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
        for pending in self.waiting:
            if pending.piece.done():
                pending.result()  # raises what the engine raised
        age = time.time() - max([self.last_activity, *(pending.finished for pending in self.waiting)])
        if age > stale_after_s:
            raise RuntimeError(
                f"no thoughts came for {age:.0f} s (heartbeat_stale_after_s is {stale_after_s:.0f}): "
                f"{type(self.engine).__name__} hangs, or is too slow for that"
            )

    # weight_transfer

    def init_weight_transfer(self) -> None:
        """Nothing to set up: the engine receives weights in its own way."""

    def pause(self) -> None:
        """Start no more thoughts, and wait for those under way."""
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
        """Give the engine the weights of the next version, adapters merged in."""
        self.engine.sync(lambda: iterator, self.version + 1)

    def resume(self) -> None:
        """Sample again after a pause."""
        self.last_activity = time.time()
        if self.queue is not None:
            self.queue.resume()

    def destroy(self) -> None:
        """Nothing to release: the caller made the engine and closes it."""

    # groups

    def draw(self, timeout: float | None) -> list[Any]:
        """The samples of the next group; queue.Empty if it is not sampled within `timeout` seconds.

        There are none if the group is too stale, or if fewer than two of its thoughts count.
        """
        if self.queue is None:
            self.check_health(0.0)
        pending = self.waiting[0]
        wait([pending.piece], timeout)
        if not pending.piece.done():
            raise queue.Empty
        group = pending.result()
        self.waiting.popleft()
        self._submit()
        if self.version - group.policy_version > self.args.max_staleness:
            self.metrics_queue.put({"sample/dropped_stale_total": float(len(group.thoughts))})
            return []
        return self._make_samples(group, pending)

    def _count_sampled(self) -> int:
        """Thoughts that are sampled and not yet scored."""
        done = sum(pending.piece.done() for pending in self.waiting)
        return done * self.args.num_generations

    def _submit(self) -> None:
        """Submit groups until as many are ahead as may be."""
        assert self.queue is not None
        self.last_activity = time.time()
        objective = self.reward.objective
        while len(self.waiting) < self.ahead:
            seed = int(np.random.default_rng((self.seed, self.submitted)).integers(2**62))
            work = partial(objective.rollout, self.engine, [next(self.positions)], [seed])
            self.waiting.append(PendingGroup(self.submitted, work, self.queue))
            self.submitted += 1

    def _make_samples(self, group: Group, pending: PendingGroup) -> list[Any]:
        """A sample for each counted thought, with its advantage."""
        scores = self.reward.score([group])
        self.reward.log([group], scores, lambda name, value: self.metrics_queue.put({name: value}))
        rewards = scores.for_trl()
        counted = [reward for reward in rewards if reward is not None]
        self.metrics_queue.put({"frac_reward_zero_std": float(len(set(counted)) < 2)})
        if len(counted) < 2:
            self._count_unusable(len(rewards))
            return []
        self.unusable = 0
        table = torch.from_numpy(scores.rewards)[None]
        advantages = self.reward.objective.advantage(table, [group])[0].tolist()
        decode, prompt = self.reward.tokenizer.decode, list(group.prompt.token_ids)
        message = [{"role": "user", "content": decode(prompt)}]
        spread, name = float(np.std(counted)), f"rewards/{self.reward.__name__}"
        samples = []
        for thought, reward, advantage in zip(group.thoughts, rewards, advantages, strict=True):
            if reward is None:
                continue
            ids, padding = list(thought.token_ids), [0] * len(prompt)
            sample = self.sample(
                prompt=message,
                completion=[{"role": "assistant", "content": decode(ids)}],
                input_ids=np.array([*prompt, *ids], dtype=np.int64),
                completion_mask=np.array([*padding, *([1] * len(ids))], dtype=np.int64),
                old_log_probs=np.array([*padding, *thought.behaviour_logps], dtype=np.float32),
                advantage=advantage,
                model_version=group.policy_version,
                group_id=pending.number,
                metrics={"reward": reward, "reward_std": spread, name: reward},
                enqueued_at=pending.finished,
            )
            samples.append(sample)
        return samples

    def _count_unusable(self, thoughts: int) -> None:
        """Log a group of `thoughts` that was dropped; RuntimeError after PATIENCE of them in a row."""
        self.metrics_queue.put({"sample/dropped_uncounted_total": float(thoughts)})
        self.unusable += 1
        if self.unusable >= PATIENCE:
            raise RuntimeError(
                f"{self.unusable} groups in a row had fewer than two thoughts that count: raise "
                "max_completion_length, or let unclosed ones count (cut='force_close')"
            )


def _check_settings(reward: ObjectiveReward, engine: Engine | None, dataset: Any, args: Any) -> None:
    columns = getattr(dataset, "column_names", None)
    added = " and ".join(reward.added)
    problems = {
        "give the reward a tokenizer: InformationGainReward(tokenizer=tokenizer)": reward.late,
        "the dataset is not one that reward.dataset(documents) makes": (
            columns is not None and not set(PROMPT_COLUMNS) <= set(columns)
        ),
        f"the tokenizer lacked {added}, and so does the checkpoint that the trainer "
        "loads: call ensure_delimiters(tokenizer, model), save both, and start from that folder": bool(added),
        "the engine must have weights of its own, since it samples while those of "
        "the trainer change: HFEngine(model, shares_weights=False)": (
            engine is not None and engine.info.shares_weights
        ),
        "set token_budget: at least the longest prompt and thought, or 0 for micro-batches of "
        "per_device_train_batch_size thoughts. TRL would ask a vLLM server of its own for it": (
            args.token_budget is None
        ),
        "num_generations must be at least 2: a single thought has nothing to be compared with": (
            args.num_generations < 2
        ),
        "our engines support neither min_p nor repetition_penalty": (
            args.min_p or args.repetition_penalty != 1.0
        ),
    }
    for message, applies in problems.items():
        if applies:
            raise ConfigError(f"AsyncRollouts: {message}")
