"""One run: its state, and the methods that the loop calls.

Its parts come from `rlpretrain.training.builder`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rewards.controls import CollapseMonitor
from rlpretrain.config import PretrainConfig
from rlpretrain.models.spending import Reads, Size
from rlpretrain.rollouts.engines import sleep, wake
from rlpretrain.scoring.packing import count, is_counted, stored_rewards
from rlpretrain.tracking.console import Console
from rlpretrain.tracking.health import Health
from rlpretrain.tracking.step_metrics import StepMetrics, staleness
from rlpretrain.tracking.throughput import StepWork
from rlpretrain.tracking.trackers import Trackers
from rlpretrain.training import observations, records, run_output, run_state, run_stop, run_tasks
from rlpretrain.training.builder import Parts, build_parts
from rlpretrain.training.interruption import Signals
from rlpretrain.training.losses import Loss, LossInputs, LossOutput, make_losses
from rlpretrain.training.problems import Problem, find_problem
from rlpretrain.training.run_evaluation import RunEvaluation
from rlpretrain.training.step_end import finish_step
from rlpretrain.training.step_packing import pack_step
from rlpretrain.types import Batch, MicroBatch, Scores, Totals


class Diverged(RuntimeError):
    """Too many steps in a row had NaN or inf; the message says where the batches are."""


@dataclass(slots=True)
class Timer:
    """The start of a step, and the seconds that its stages took."""

    start: float
    rollout: float = 0.0
    sync: float = 0.0


@dataclass(init=False, eq=False)
class Run(Parts):
    """The parts of one run, its state, and the methods that the loop calls."""

    step: int
    """Completed steps."""
    spent: records.Spent
    skipped: int
    skipped_in_row: int
    best: dict[str, Any]
    """The step and score of the best evaluation, and the number of evaluations after it."""
    monitor: CollapseMonitor
    source_monitors: dict[str, CollapseMonitor]
    stopped: str | None
    """The reason to end the run before its last step."""
    last: dict[str, float]
    """The row of the last step."""

    losses: list[Loss]
    """The terms of the loss."""
    metrics: StepMetrics
    timer: Timer
    sizes: dict[int, Size]
    """Sizes of the models that read tokens, by `id`; for the count of operations."""
    early: Reads
    """What the policy read in the present step before its batch was complete: entropies of positions."""
    work: StepWork
    """The tokens and operations of the last step."""
    has_split_groups: bool
    """Whether some rank has a group of the present step that is split over micro-batches."""
    bad: str | None
    """Where the present step has NaN or inf: log-probs, loss or gradients."""

    evaluation: RunEvaluation
    console: Console
    trackers: Trackers | None
    health: Health
    """Warnings about the run so far."""
    signals: Signals
    facts: dict[str, Any]
    """What run.json says beside the configuration."""

    def __init__(self, config: PretrainConfig, resume: str | bool | None):
        super().__init__(**vars(build_parts(config, resume)))
        self.step, self.spent, self.skipped, self.skipped_in_row = 0, records.Spent(), 0, 0
        self.best = {"step": None, "gain": None, "stale": 0}
        self.monitor = run_stop.make_monitor(config)
        self.source_monitors = run_stop.make_source_monitors(config)
        self.stopped, self.last = None, {}
        self.has_split_groups, self.sizes = False, {}
        self.early, self.work = Reads(), StepWork()
        router = ("router",) if config.loss.router_coef else ()
        self.losses = make_losses((*(config.loss.terms or self.objective.losses()), *router))
        self._begin_step()
        self.evaluation = RunEvaluation(self)
        self.signals = Signals(quiet=not self.ranks.first)
        if self.resumed_from is not None:
            run_state.restore(self, self.resumed_from)
        moved = run_state.set_aside(self, resume)
        # servers may hold the weights of another run, or of a later step
        self.engine.sync(self.engine_weights, self.step)
        if self.probe:
            self.probe(self.step)
        self.console = Console(config, self.total_steps, self.step, self.ranks.first)
        for line in (*run_output.opening(self, resume), moved):
            self.console.say(line)
        self.health = Health()
        self.trackers = None
        if self.ranks.first:
            self.trackers = run_output.make_trackers(self)
            self.health.replay(run_output.logged_rows(self.folder))
        self.facts = run_output.facts(self)
        self.facts |= run_tasks.base_facts(self)
        self.write_run_json("running")

    # what the loop calls, in its order

    def remaining_steps(self) -> Iterator[int]:
        """The remaining steps; ends early if there is a reason to stop."""
        while self.step < self.total_steps and self.stopped is None:
            self._begin_step()
            yield self.step

    def next_batch(self) -> Batch:
        """This rank's share of the step's groups, and their documents."""
        begin = time.perf_counter()
        ahead = min(self.config.engine.max_staleness, self.total_steps - self.step - 1)
        batch = self.source.take(self.config.positions_per_step // self.ranks.size, ahead)
        self.objective.progress = batch.progress
        self.note(**staleness(batch.groups, self.engine.version))
        sleep(self.engine)
        self.early.merge(self.policy.scorer.reads.take())
        self.timer.rollout = time.perf_counter() - begin
        run_output.keep_rollouts(self, batch)
        kept = tuple(self.objective.select(batch.groups))
        self.note(**self.objective.notes())
        kept_ids = {group.id for group in kept}
        for group in batch.groups:
            self.metrics.add("batch/dropped_frac", float(group.id not in kept_ids))
            if group.id not in kept_ids:
                cut, thoughts = self.layout.cut, enumerate(group.thoughts)
                counted = [is_counted(group, thought, k, cut) for k, thought in thoughts]
                rewards = [] if self.objective.live_rewards else stored_rewards(group, self.layout)
                self.metrics.observe_dropped(group, counted, rewards)
        return replace(batch, groups=kept)

    def count(self, batch: Batch) -> Totals:
        """Denominators over all ranks."""
        local = count(batch, self.layout.cut)
        return Totals(*self.ranks.sum([local.thoughts, local.thought_tokens, local.trunk]))

    def pack(self, batch: Batch, totals: Totals) -> list[MicroBatch]:
        """Micro-batches, as many on every rank and of about the same cost."""
        return pack_step(self, batch, totals)

    def add_references(self, own: Scores, micro: MicroBatch) -> Scores:
        """The policy's scores with the baseline's log-probs, and the reference's where needed."""
        scores = self.baseline(own, micro)
        if self.target_baseline is not None:
            scores = self.target_baseline(scores, micro)
        return scores if self.reference is None else self.reference(scores, micro)

    def count_losses(self, micros: Sequence[MicroBatch]) -> list[float]:
        """The denominator of each term of the loss: its count over all micro-batches and ranks."""
        return self.ranks.sum([sum(term.count(micro) for micro in micros) for term in self.losses])

    def needs_step_advantages(self) -> bool:
        """Whether the present step is scored before it is trained, on every rank."""
        several = self.config.loss.inner_epochs > 1 or self.has_split_groups
        return self.objective.has_positions and (several or "batch" in self.objective.needs)

    def note(self, **values: Any) -> None:
        """Add numbers to the log: losses are summed over micro-batches, everything else is averaged."""
        for name, value in values.items():
            (self.metrics.total if name.endswith("loss") else self.metrics.add)(name, float(value))

    def observe(self, inputs: LossInputs, output: LossOutput, own: torch.Tensor) -> None:
        """Collect the numbers of a micro-batch; `own` [B, T] are the policy's no-think log-probs."""
        observations.observe(self, inputs, output, own)

    def find_problem(self, inputs: LossInputs, output: LossOutput, live: bool) -> Problem | None:
        """The problem of a micro-batch on any rank. `live`: its rewards come from the forward that trains."""
        return find_problem(self, inputs, output, live)

    def update(self) -> None:
        """The optimizer step, then the baseline's. A step with NaN or inf is skipped."""
        if self.bad is None:
            info = self.policy.step()
            if info.applied:
                self.metrics.add("grad_norm", info.grad_norm)
                self.metrics.add("learning_rate", info.lr)
                self.baseline.update(self.policy)
                return
            self.bad = "gradients"
        self.policy.discard()

    def sync(self, version: int) -> None:
        """Hand the new weights to the engine."""
        self.ranks.synchronize()  # the update ends before the sync begins
        begin = time.perf_counter()
        wake(self.engine)
        with self.source.paused():
            self.engine.sync(self.engine_weights, version)
        self.timer.sync = time.perf_counter() - begin
        if self.probe:
            self.probe(version)
            probed = {"perf/probe_s": self.probe.seconds, "sampling/probe_difference": self.probe.difference}
            self.note(**probed, **self.engine.info.timings)

    def finish(self, step: int, batch: Batch) -> None:
        """Log, evaluate, checkpoint, and decide whether to continue."""
        finish_step(self, step, batch)

    # the end

    def end(self) -> dict[str, Any]:
        """Save the final model: the best checkpoint's after a collapse, else the last."""
        if run_stop.was_interrupted(self):
            raise run_output.interruption(self)
        if reason := records.nothing_learnt(self.stopped, self.skipped, self.step, self.folder):
            raise Diverged(reason)
        return run_output.end(self)

    def close(self) -> None:
        """Release source, engine, trackers and console."""
        self.source.close()
        self.engine.close()
        self.console.close()
        if self.trackers:
            self.trackers.close()

    def write_run_json(self, status: str, **more: Any) -> None:
        """Write run.json: the resolved configuration, the results so far, all versions."""
        if self.ranks.first:
            records.write_json(self.folder / "run.json", run_output.record(self, status) | more)

    # inside

    def measures_frozen(self) -> bool:
        """Whether gains against the initial model are measured in the present step."""
        every = self.config.baseline.frozen_every
        return self.frozen is not None and every > 0 and self.step % every == 0

    def _begin_step(self) -> None:
        self.metrics, self.timer, self.bad = StepMetrics(), Timer(time.perf_counter()), None
