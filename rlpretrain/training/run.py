"""One run: the steps that the loop calls by name. Its parts come from `rlpretrain.training.builder`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rewards.controls import CollapseMonitor
from rlpretrain import models
from rlpretrain.config import ConfigError, PretrainConfig
from rlpretrain.config.io import to_dict
from rlpretrain.models.spending import Size, size_of
from rlpretrain.rollouts.engines import sleep, wake
from rlpretrain.scoring.checks import check_tree
from rlpretrain.scoring.groups import micro_batches, no_think_contexts
from rlpretrain.scoring.packing import balanced, count, is_counted, stored_rewards
from rlpretrain.scoring.references import Frozen
from rlpretrain.tracking.console import Console
from rlpretrain.tracking.health import Health
from rlpretrain.tracking.step_metrics import StepMetrics, staleness
from rlpretrain.tracking.trackers import Trackers
from rlpretrain.training import records, run_output, run_state, run_stop
from rlpretrain.training.advantages import has_uncounted
from rlpretrain.training.builder import Parts, build_parts
from rlpretrain.training.interruption import Signals
from rlpretrain.training.losses import Loss, LossInputs, LossOutput, make_losses
from rlpretrain.training.problems import Problem
from rlpretrain.training.run_evaluation import RunEvaluation, score_of
from rlpretrain.training.tag_gain import gains_of_empty_thoughts
from rlpretrain.types import Batch, MicroBatch, Totals


class Diverged(RuntimeError):
    """Too many steps in a row had NaN or inf; the message says where the batches are."""


@dataclass(slots=True)
class Timer:
    """When a step began, and the seconds that its stages took."""

    start: float
    rollout: float = 0.0
    sync: float = 0.0


@dataclass(init=False, eq=False)
class Run(Parts):
    """The parts of one run, where it stands, and the steps that the loop calls by name."""

    step: int
    """Steps that are done."""
    spent: records.Spent
    skipped: int
    skipped_in_row: int
    best: dict[str, Any]
    """The step and score of the best evaluation, and how many came after it."""
    monitor: CollapseMonitor
    stopped: str | None
    """What ends the run before its last step."""
    last: dict[str, float]
    """The row of the last step."""

    losses: list[Loss]
    """The terms of the loss."""
    metrics: StepMetrics
    timer: Timer
    sizes: dict[int, Size]
    """Of the models that read, by their identity."""
    has_split_groups: bool
    """Whether a group of the present step fits into no micro-batch, on some rank."""
    bad: str | None
    """Where the present step met NaN or inf."""

    evaluation: RunEvaluation
    console: Console
    trackers: Trackers | None
    health: Health
    """What is wrong with the run, so far."""
    signals: Signals
    facts: dict[str, Any]
    """What run.json says beside the configuration."""

    def __init__(self, config: PretrainConfig, resume: str | bool | None):
        super().__init__(**vars(build_parts(config, resume)))
        self.step, self.spent, self.skipped, self.skipped_in_row = 0, records.Spent(), 0, 0
        self.best = {"step": None, "gain": None, "stale": 0}
        self.monitor = run_stop.make_monitor(config)
        self.stopped, self.last = None, {}
        self.has_split_groups, self.sizes = False, {}
        self.losses = make_losses(config.loss.terms or self.objective.losses())
        self._begin_step()
        self.evaluation = RunEvaluation(self)
        self.signals = Signals(quiet=not self.ranks.first)
        if self.resumed_from is not None:
            run_state.restore(self, self.resumed_from)
        moved = run_state.set_aside(self, resume)
        self.engine.sync(
            self.handed_over, self.step
        )  # a resumed run's; and servers may hold those of another run
        if self.probe:
            self.probe(self.step)
        self.console = Console(config, self.total_steps, self.step, self.ranks.first)
        for line in run_output.opening(self, resume):
            self.console.say(line)
        self.console.say(moved)
        log = (
            self.folder,
            config.report_to,
            to_dict(config),
            self.folder.name,
            self.step,
            max(1, self.total_steps // 5),
        )
        self.trackers = Trackers(*log) if self.ranks.first else None
        self.health = Health()
        if self.ranks.first:
            self.health.replay(run_output.logged_rows(self.folder))
        self.facts = run_output.facts(self)
        self.write_run_json("running")

    # what the loop calls, in its order

    def remaining_steps(self) -> Iterator[int]:
        """Steps still to do; ends early when something asked the run to stop."""
        while self.step < self.total_steps and self.stopped is None:
            self._begin_step()
            yield self.step

    def next_batch(self) -> Batch:
        """This rank's share of the step's groups, and their documents."""
        begin = time.perf_counter()
        ahead = min(self.config.engine.max_staleness, self.total_steps - self.step - 1)
        batch = self.source.take(self.config.positions_per_step // self.ranks.size, ahead)
        self.objective.progress = batch.progress
        self.note(**staleness(batch.groups, self.engine.version), **self.objective.notes())
        sleep(self.engine)
        self.timer.rollout = time.perf_counter() - begin
        run_output.keep_rollouts(self, batch)
        kept = tuple(self.objective.select(batch.groups))
        known = {g.id for g in kept}
        for group in batch.groups:
            self.metrics.add("batch/dropped_frac", float(group.id not in known))
            if group.id not in known:
                counted = [is_counted(group, t, k, self.layout.cut) for k, t in enumerate(group.thoughts)]
                self.metrics.observe_dropped(group, counted, stored_rewards(group, self.layout))
        return replace(batch, groups=kept)

    def count(self, batch: Batch) -> Totals:
        """Denominators over all ranks."""
        here = count(batch, self.layout.cut)
        return Totals(*self.ranks.sum([here.thoughts, here.thought_tokens, here.trunk]))

    def pack(self, batch: Batch, totals: Totals) -> list[MicroBatch]:
        """Micro-batches, as many on every rank and of much the same cost."""
        batch = balanced(batch, self.layout, self.ranks)
        arms = no_think_contexts(self.objective, batch.groups)
        fresh = self.engine.info.shares_weights and all(
            g.policy_version == self.engine.version for g in batch.groups
        )
        layout = replace(self.layout, no_think_ids=arms)
        micros = [replace(m, on_policy=fresh) for m in micro_batches(batch, layout, self.ranks, totals)]
        split_here = any(offset for micro in micros for offset in micro.offsets)
        self.has_split_groups = bool(self.ranks.max([float(split_here)])[0])
        if self.has_split_groups and "group" in self.objective.needs:
            raise ConfigError(
                "a group is larger than token_budget, and this objective's loss needs all of its thoughts at "
                f"once: raise token_budget ({self.config.token_budget})"
            )
        self.metrics.add("batch/micro_batches", len(micros))
        if self._measures_frozen() and layout.target:
            gains = gains_of_empty_thoughts(self.policy.score, self.frozen, batch, layout, self.ranks)
            self.metrics.add("ig/empty", gains)
        if layout.tree and "tree_difference" not in self.facts:
            spent = replace(self.policy.scorer.reads)
            self.facts["tree_difference"] = check_tree(
                self.policy, micros[0], layout, totals, self.ranks, self.half
            )
            self.policy.scorer.reads = spent  # once a process: a resumed run would have spent more
            self.console.say(
                f"packed trees and padded rows: the same to {self.facts['tree_difference']:.1e} nats"
            )
        return micros

    def count_losses(self, micros: Sequence[MicroBatch]) -> list[float]:
        """What each term of the loss is divided by: its count over all micro-batches and ranks."""
        return self.ranks.sum([sum(term.count(micro) for micro in micros) for term in self.losses])

    def needs_step_advantages(self) -> bool:
        """Whether the present step is scored before it is trained, on every rank."""
        several = self.config.loss.inner_epochs > 1 or self.has_split_groups
        return self.objective.has_positions and (several or "batch" in self.objective.needs)

    def note(self, **values: Any) -> None:
        """Numbers for the log: losses are summed over micro-batches, everything else averaged."""
        for name, value in values.items():
            (self.metrics.total if name.endswith("loss") else self.metrics.add)(name, float(value))

    def find_problem(self, inputs: LossInputs, output: LossOutput, live: bool) -> Problem | None:
        """What is wrong with a micro-batch on any rank; one all-reduce. A batch that is not finite is kept in
        a file.

        `live`: the rewards are of the forward that trains, so one of NaN was not known when thoughts were
        counted.
        """
        scores, micro = inputs.scores, inputs.micro
        logps = (scores.thought_logps, scores.target_logps, scores.baseline_logps, scores.trunk_logps)
        fine = [all(bool(torch.isfinite(t).all()) for t in logps), bool(torch.isfinite(output.loss))]
        unrewarded = live and has_uncounted(micro, inputs.thoughts)
        bad_logps, bad_loss, no_reward = self.ranks.max(
            [float(not fine[0]), float(not fine[1]), float(unrewarded)]
        )
        if bad_logps or bad_loss:
            self.bad = "log-probs" if bad_logps else "loss"
            if not all(fine):
                records.keep_batch(
                    self.folder, self.step + 1, self.ranks.rank, self.bad, micro.groups, micro.documents
                )
        if self.bad is not None:
            return Problem.NOT_FINITE
        return Problem.NO_REWARD if no_reward else None

    def observe(self, inputs: LossInputs, output: LossOutput, own: torch.Tensor) -> None:
        """Gather what the log will show of a micro-batch; `own` [B, T] are the policy's log-probs without
        a thought.
        """
        scores, micro, epochs = inputs.scores, inputs.micro, self.config.loss.inner_epochs
        self.note(loss=output.loss.detach() / epochs)  # the mean over inner epochs
        self.note(**{n: v / epochs if n.endswith("loss") else v for n, v in output.metrics.items()})
        self.metrics.observe(micro, scores, None if inputs.thoughts is None else inputs.thoughts.rewards, own)
        if self._measures_frozen():
            base = scores.baseline_logps if self.frozen is self.baseline else self.frozen.logps(micro)
            base = (base * micro.target_mask).sum(-1)
            target = (scores.target_logps.detach() * micro.target_mask[:, None]).sum(-1)
            if micro.target_mask.any():
                self.metrics.add("ig/frozen", (target - base[:, None])[micro.counted])

    def update(self) -> None:
        """The optimizer step, then the baseline's; one with NaN or inf is skipped."""
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
        begin = time.perf_counter()
        wake(self.engine)
        with self.source.paused():
            self.engine.sync(self.handed_over, version)
        self.timer.sync = time.perf_counter() - begin
        if self.probe:
            self.probe(version)
            seen = {"perf/probe_s": self.probe.seconds, "sampling/probe_difference": self.probe.difference}
            self.note(**seen, **self.engine.info.timings)

    def finish(self, step: int, batch: Batch) -> None:
        """Log, evaluate, checkpoint, and decide whether to go on."""
        self.step = step
        c = self.config
        if self.bad:
            self.skipped, self.skipped_in_row = self.skipped + 1, self.skipped_in_row + 1
            self.metrics = StepMetrics()  # half a step's numbers would mislead
            self.console.say(
                f"step {step} skipped: NaN or inf in {self.bad} ({self.skipped_in_row} in a row)"
            )
            if self.bad == "gradients":
                records.keep_batch(
                    self.folder, step, self.ranks.rank, self.bad, batch.groups, batch.documents
                )
        else:
            self.skipped_in_row = 0
        self._account(batch)
        row = self.metrics.means(self.ranks) | run_output.step_row(self)
        over = run_stop.over_budget(self)
        last = over is not None or step == self.total_steps
        self.stopped = run_stop.nonfinite(self) or self.stopped or over
        self.stopped = self.stopped or run_stop.collapsed(self, row)
        if self.held_out is not None and (last or c.eval.every and step % c.eval.every == 0):
            row |= self._evaluate()
        if step < self.total_steps and self.stopped is None:
            self.stopped = run_stop.interrupted(self)
        if self.trackers:
            mine = [
                g for g in batch.groups if (g.id, 0) in self.metrics.rewards
            ]  # the rest went to other ranks
            self.trackers.write(step, row, mine, self.tokenizer, self.metrics.rewards)
        self.console.step(step, row, batch.groups, self.tokenizer)
        for finding in self.health.observe(step, row):
            self.console.say(f"warning, step {step}: {finding}")
        self.last = row
        regular = c.checkpoint.every and (step % c.checkpoint.every == 0 or last or self.stopped)
        if regular or run_stop.was_interrupted(self):
            run_state.save(self)

    # the end

    def end(self) -> dict[str, Any]:
        """Save the final model: the best checkpoint's after a collapse, else the last."""
        if run_stop.was_interrupted(self):
            raise run_output.interruption(self)
        if why := records.nothing_learnt(self.stopped, self.skipped, self.step, self.folder):
            raise Diverged(why)
        return run_output.end(self)

    def close(self) -> None:
        """Release source, engine, trackers and console."""
        self.source.close()
        self.engine.close()
        self.console.close()
        if self.trackers:
            self.trackers.close()

    def write_run_json(self, status: str, **more: Any) -> None:
        """run.json: the resolved configuration, what the run found, all versions."""
        if self.ranks.first:
            records.write_json(self.folder / "run.json", run_output.record(self, status) | more)

    # inside

    def _measures_frozen(self) -> bool:
        """Whether gains against the initial model are measured in the present step."""
        every = self.config.baseline.frozen_every
        return self.frozen is not None and every > 0 and self.step % every == 0

    def _begin_step(self) -> None:
        self.metrics, self.timer, self.bad = StepMetrics(), Timer(time.perf_counter()), None

    def _account(self, batch: Batch) -> None:
        """Tokens and floating-point operations of the step, over all ranks."""
        readers = [(self.policy.model, self.policy.scorer.reads), (self.policy.model, self.source.reads)]
        beside = {id(b): b for b in (self.frozen, self.baseline) if isinstance(b, Frozen)}
        readers += [(b.model, b.scorer.reads) for b in beside.values()]
        if self.objective.proxy is not None:
            readers.append((self.objective.proxy.model, self.objective.proxy.reads))
        documents, tokens, operations = float(sum(len(d.token_ids) for d in batch.documents)), 0.0, 0.0
        for model, reads in readers:
            if id(model) not in self.sizes:
                self.sizes[id(model)] = size_of(model, models.count(model))
            here = reads.take()
            tokens += here.tokens + here.trained_tokens
            operations += self.sizes[id(model)].operations(here)
        self.spent.add(*self.ranks.sum([documents, tokens, operations]))

    def _evaluate(self) -> dict[str, float]:
        """Evaluate, and compare with the best so far."""
        row = self.evaluation.evaluate()
        score = score_of(row)
        broken = row.get("eval/not_finite", 0.0)
        if broken or not math.isfinite(score):  # no measurement: neither a best nor one without progress
            said = f"{broken:.0%} of the positions have log-probs of NaN or inf" if broken else "no number"
            self.console.say(f"step {self.step}: the evaluation decides nothing ({said})")
        elif (
            self.best["gain"] is None or not self.best["gain"] >= score
        ):  # an older run may have kept NaN as its best
            self.best = {"step": self.step, "gain": score, "stale": 0}
            if self.config.checkpoint.every and self.step % self.config.checkpoint.every:
                run_state.save(self)
        else:
            self.best["stale"] += 1
            self.stopped = run_stop.out_of_patience(self) or self.stopped
        return row
