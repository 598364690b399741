"""One run: its parts, built from the configuration, and the steps that the loop calls by name."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rewards.controls import CollapseMonitor
from rlpretrain import adapters, attention, checkpoint, compat, lengths, models, records
from rlpretrain.baseline import make_references
from rlpretrain.batches import BatchSource, ReplaySource
from rlpretrain.config import ConfigError, PretrainConfig
from rlpretrain.config.io import to_dict
from rlpretrain.console import Console
from rlpretrain.documents import DocumentStream
from rlpretrain.engines import SyncProbe, lie_down, make_engine, wake_up, write_start
from rlpretrain.evaluate import Evaluation, evaluate, held_out
from rlpretrain.metrics import StepMetrics, Trackers, staleness
from rlpretrain.objectives import delimiters, parse_section
from rlpretrain.objectives import load as load_objective
from rlpretrain.packing import Layout, balanced, count, idle, pack
from rlpretrain.policy import make_policy
from rlpretrain.prompts import table_size
from rlpretrain.ranks import Ranks, join
from rlpretrain.scoring import Beside, check_tree
from rlpretrain.types import Batch, Document, MicroBatch, Scores, Totals
from rollout.engine import Engine
from rollout.hf import HFEngine
from rollout.store import Recorded, Store
from rollout.types import Group
from rollout.weights import copy_weights


class Diverged(RuntimeError):
    """Too many steps in a row had NaN or inf; the message says where the batches are."""


class Run:
    """The resources of one run, and the steps that the loop calls by name."""

    def __init__(self, config: PretrainConfig, resume: str | bool | None):
        self.config = config
        self.ranks: Ranks = join(config.device)
        self.folder = Path(config.output_dir)
        owner, _ = parse_section(config.objective)
        if config.positions_per_step % self.ranks.size:
            raise ConfigError(f"positions_per_step {config.positions_per_step} does not divide over {self.ranks.size} ranks")
        if "batch" in owner.needs and self.ranks.size > 1:
            raise ConfigError("an objective that compares groups across the batch runs on one rank only, for now")
        adapters.check(config)
        start = checkpoint.open_folder(self.folder, resume, self.ranks)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.delimiters = delimiters(config.objective)
        model, self.tokenizer, added = models.load(config.model, self.delimiters, config.seed)
        models.check_head(model.to(self.ranks.device))
        self.objective = load_objective(config, self.tokenizer)
        shortest = self.objective.min_length
        place = {"rank": self.ranks.rank, "world_size": self.ranks.size, "seed": config.seed}
        replayed = ReplaySource(Store(config.replay, self.ranks.rank)) if config.replay else None
        stream = None if replayed else DocumentStream(config.data, self.tokenizer, min_length=shortest, **place)
        self.held_out = held_out(config, self.tokenizer, self.objective, self.ranks.size)
        others = DocumentStream(config.ntp_data, self.tokenizer, **place) if config.ntp_data else None
        lengths.check_run(model, self.objective, stream, others, self.held_out)
        self.total_steps = self._total_steps(stream, replayed)

        begin = write_start(config, model, self.tokenizer, self.ranks, changed=bool(added) or config.model.from_scratch)
        wants_frozen = owner.has_positions and bool(config.baseline.frozen_every or self.held_out)
        each = getattr(self.objective.config, "positions_per_document", 1)
        sized = stream is not None and not config.data.streaming
        again = sized and self.total_steps * config.positions_per_step / each > len(stream)
        self.frozen, self.baseline = make_references(config, model, wants_frozen, again, self.ranks)
        if lora := config.policy.lora:
            adapters.add_lora(model, lora, self.tokenizer.convert_tokens_to_ids(added) if lora.new_tokens else ())
        self.policy = make_policy(model, config.policy, config.optim, self.total_steps, self.ranks, config.sampling.temperature,
                                  config.loss.inner_epochs)  # fmt: skip
        self.handed_over = self.policy.adapter if lora and lora.sync == "adapter" else self.policy.weights
        self.engine = Recorded(replayed.facts) if replayed else self._engine(model, begin)
        self.source = replayed or BatchSource(
            self.objective, stream, self.engine, self.policy, seed=config.seed, rank=self.ranks.rank, size=self.ranks.size,
            ntp_stream=others, token_budget=config.token_budget, in_flight=config.engine.in_flight, steps=self.total_steps,
        )  # fmt: skip
        self.store = Store(self.folder / "rollouts", self.ranks.rank) if config.save_rollouts else None
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        s, needs = config.sampling, self.objective.needs
        why = attention.install(model) if config.packing == "tree" else None
        tree = config.packing == "tree" and why is None
        self.layout = Layout(config.token_budget, s.cut, s.cut_penalty, config.loss.reduction, pad, tree, "target" in needs,
                             whole_arms=bool(self.frozen and self.frozen.keep))  # fmt: skip
        self.half = config.model.dtype != "float32" or config.policy.autocast != "none"
        self.step, self.spent, self.sampled, self.skipped, self.skipped_in_row = 0, records.Spent(), 0, 0, 0
        self.best: dict[str, Any] = {"step": None, "gain": None, "stale": 0}
        self.parameters = models.count(self.policy.model)
        self.monitor, self.stopped, self.last = self._monitor(), None, {}
        self.metrics, self.timer = StepMetrics(), {"rollout": 0.0, "sync": 0.0, "start": time.perf_counter()}
        self._bad: str | None = None
        self._whole: nn.Module | None = None
        if start is not None:
            self._resume(start)
        vocabulary = table_size(self.tokenizer)
        probed = not isinstance(self.engine, HFEngine | Recorded)
        self.probe = SyncProbe(config, self.engine, self.policy, vocabulary) if probed else None
        self.engine.sync(self.handed_over, self.step)  # a resumed run's; and servers may hold those of another run
        if self.probe:
            self.probe(self.step)
        self.console = Console(config, self.total_steps, self.step, self.ranks.first)
        fixed = "; policy.lora.new_tokens is off: their embeddings stay as they begin" if lora and not lora.new_tokens else ""
        self.console.say(f"added to the tokenizer: {', '.join(added)}{fixed}" if added else None)
        self.console.say(f"rows are padded, not packed in trees: {why}" if why else None)
        dropped = stream.dropped if stream is not None else 0
        self.console.say(f"{dropped} documents shorter than {shortest} tokens left out" if dropped else None)
        self.console.say(f"resumed from {start}" if start else f"no checkpoint in {self.folder} yet" if resume else None)
        log = (self.folder, config.report_to, to_dict(config), self.folder.name, self.step, max(1, self.total_steps // 5))
        self.trackers = Trackers(*log) if self.ranks.first else None
        self.facts = {"added_tokens": added, "documents_too_short": dropped, "resumed_from": str(start) if start else None}
        self.write_run_json("running")

    # what the loop calls, in its order

    def remaining_steps(self) -> Iterator[int]:
        """Steps still to do; ends early when something asked the run to stop."""
        while self.step < self.total_steps and self.stopped is None:
            self.metrics, self.timer = StepMetrics(), {"rollout": 0.0, "sync": 0.0, "start": time.perf_counter()}
            self._bad = None
            yield self.step

    def take(self) -> Batch:
        """This rank's share of the step's groups, and their documents."""
        begin = time.perf_counter()
        ahead = min(self.config.engine.max_staleness, self.total_steps - self.step - 1)
        batch = self.source.take(self.config.positions_per_step // self.ranks.size, ahead)
        self.note(**staleness(batch.groups, self.engine.version), **self.objective.notes())
        lie_down(self.config, self.engine)
        self.timer["rollout"] = time.perf_counter() - begin
        if self.store:
            facts = {"engine": self.engine.health(), "shares_weights": self.engine.shares_weights, **compat.versions()}
            self.store.write(self.step + 1, batch.groups, batch.documents, facts)
        self.sampled = sum(len(g.prompt.token_ids) + sum(len(t.token_ids) for t in g.thoughts) for g in batch.groups)
        return replace(batch, groups=tuple(self.objective.select(batch.groups)))

    def count(self, batch: Batch) -> Totals:
        """Denominators over all ranks."""
        here = count(batch, self.layout.cut)
        return Totals(*self.ranks.sum([here.thoughts, here.thought_tokens, here.trunk]))

    def pack(self, batch: Batch, totals: Totals) -> list[MicroBatch]:
        """Micro-batches, as many on every rank and of much the same cost."""
        batch = balanced(batch, self.layout, self.ranks)
        arms = {g.id: ids for g in batch.groups if (ids := self.objective.no_think(g.position)) is not None}
        fresh = self.engine.shares_weights and all(g.policy_version == self.engine.version for g in batch.groups)
        layout = replace(self.layout, no_think_ids=arms)
        micros = [replace(m, on_policy=fresh) for m in pack(batch, layout, totals)]
        most, spread = self.ranks.max([float(len(micros)), float(any(k for m in micros for k in m.offsets))])
        self.spread = bool(spread)  # a group fits into no micro-batch, on some rank
        self.metrics.add("batch/micro_batches", most)
        self._account(batch, micros)
        micros += [idle(self.layout.pad_id)] * (int(most) - len(micros))
        if layout.tree and "tree_difference" not in self.facts:
            self.facts["tree_difference"] = check_tree(self.policy.score, micros[0], layout, totals, self.ranks, self.half)
            self.console.say(f"packed trees and padded rows: the same to {self.facts['tree_difference']:.1e} nats")
        return micros

    def note(self, **values: Any) -> None:
        """Numbers for the log: losses are summed over micro-batches, everything else averaged."""
        for name, value in values.items():
            (self.metrics.total if name.endswith("loss") else self.metrics.add)(name, float(value))

    def not_finite(self, loss: torch.Tensor, scores: Scores, micro: MicroBatch) -> bool:
        """Whether log-probs or loss are NaN or inf on any rank; then the step's gradients are forgotten, the batch is kept."""
        logps = (scores.thought_logps, scores.target_logps, scores.baseline_logps, scores.trunk_logps)
        fine = [all(bool(torch.isfinite(t).all()) for t in logps), bool(torch.isfinite(loss))]
        bad_logps, bad_loss = self.ranks.max([float(not f) for f in fine])
        if bad_logps or bad_loss:
            self._bad = "log-probs" if bad_logps else "loss"
            if not all(fine):
                self._keep_batch(self.step + 1, micro.groups, micro.documents)
        return self._bad is not None

    def observe(self, micro: MicroBatch, scores: Any, loss: torch.Tensor, reward: Any, own: torch.Tensor) -> None:
        """Gather what the log will show of a micro-batch."""
        self.note(loss=loss.detach())
        self.metrics.observe(micro, scores, reward, own)
        every = self.config.baseline.frozen_every
        if self.frozen is not None and every and self.step % every == 0:
            base = scores.baseline_logps if self.frozen is self.baseline else self.frozen.logps(micro)
            base = (base * micro.target_mask).sum(-1)
            target = (scores.target_logps.detach() * micro.target_mask[:, None]).sum(-1)
            if micro.target_mask.any():
                self.metrics.add("ig/frozen", (target - base[:, None])[micro.counted])

    def update(self) -> None:
        """The optimizer step, then the baseline's; one with NaN or inf is skipped."""
        if self._bad is None:
            info = self.policy.step()
            if info.applied:
                self.metrics.add("grad_norm", info.grad_norm)
                self.metrics.add("learning_rate", info.lr)
                self.baseline.update(self.policy)
                return
            self._bad = "gradients"
        self.policy.discard()

    def sync(self, version: int) -> None:
        """Hand the new weights to the engine."""
        begin = time.perf_counter()
        wake_up(self.config, self.engine)
        with self.source.paused():
            self.engine.sync(self.handed_over, version)
        self.timer["sync"] = time.perf_counter() - begin
        if self.probe:
            self.probe(version)
            seen = {"perf/probe_s": self.probe.seconds, "sampling/probe_difference": self.probe.difference}
            self.note(**seen, **getattr(self.engine, "timings", {}))

    def finish(self, step: int, batch: Batch) -> None:
        """Log, evaluate, checkpoint, and decide whether to go on."""
        self.step = step
        c, total = self.config, time.perf_counter() - self.timer["start"]
        if self._bad:
            self.skipped, self.skipped_in_row = self.skipped + 1, self.skipped_in_row + 1
            self.metrics = StepMetrics()  # half a step's numbers would mislead
            self.console.say(f"step {step} skipped: NaN or inf in {self._bad} ({self.skipped_in_row} in a row)")
            if self._bad == "gradients":
                self._keep_batch(step, batch.groups, batch.documents)
        else:
            self.skipped_in_row = 0
        row = self.metrics.means(self.ranks) | {
            "step_time": total, "perf/rollout_s": self.timer["rollout"], "perf/sync_s": self.timer["sync"],
            "perf/train_s": total - self.timer["rollout"] - self.timer["sync"],
            **self.spent.row(), "run/epoch": self.source.epoch, "run/skipped_steps": self.skipped,
            "run/documents_without_position": self.source.without,
        }  # fmt: skip
        if self.skipped_in_row >= c.stop.nonfinite:
            self.stopped = (
                f"nonfinite: {self.skipped_in_row} steps in a row skipped; the batches are in {self.folder / 'nonfinite'}"
            )
        over = self.spent.over(c.stop.input_tokens, c.stop.flops)
        self.stopped, last = self.stopped or over, over is not None or step == self.total_steps
        if c.stop.collapse and "ntp/loss" in row and self.objective.has_positions:
            # ig/frozen is the honest gain but known only now and then; where ig/self flatters, the no-think loss rises
            why = self.monitor.observe(gain=row.get("ig/self", 0.0), no_think_loss=row["ntp/loss"],
                                      grad_norm=row.get("grad_norm", 0.0),
                                      thought_length=row.get("completions/mean_length", 0.0))  # fmt: skip
            self.stopped = self.stopped or (f"collapse: {why}" if why else None)
        if self.held_out is not None and (last or c.eval.every and step % c.eval.every == 0):
            row |= self._evaluate()
        if self.trackers:
            mine = [g for g in batch.groups if (g.id, 0) in self.metrics.rewards]  # the rest went to other ranks
            self.trackers.write(step, row, mine, self.tokenizer, self.metrics.rewards)
        self.console.step(step, row, batch.groups, self.tokenizer)
        self.last = row
        if c.checkpoint.every and (step % c.checkpoint.every == 0 or last or self.stopped):
            self._checkpoint()

    # the end

    def end(self) -> dict[str, Any]:
        """Save the final model: the best checkpoint's after a collapse, else the last."""
        if self.stopped and self.stopped.startswith("nonfinite"):
            raise Diverged(self.stopped)
        best = self.folder / f"checkpoint-{self.best['step']}"
        back = best if self.stopped and self.stopped.startswith("collapse") and best.is_dir() else None
        if back:
            self.policy.load(back)
        models.save_model(self.policy, self.tokenizer, self.folder / "model", self.ranks.first)
        if self.ranks.first:
            name = self.config.objective.get("name", "rlp")
            models.model_card(self.folder / "model", base=self.config.model.path, objective=name, steps=self.step,
                              delimiters=self.delimiters)  # fmt: skip
        self.write_run_json("done", best_checkpoint_restored=str(back) if back else None)
        self.console.say(f"stopped early: {self.stopped}" if self.stopped else None)
        self.console.say(f"model saved to {self.folder / 'model'}" + (f", from {back.name}" if back else ""))
        if self.config.push_to_hub and self.ranks.first:
            models.push(self.folder / "model", self.config.push_to_hub)
        return self.last | {"stopped": self.stopped, "model": str(self.folder / "model"), "steps": self.step}

    def close(self) -> None:
        """Release source, engine, trackers and console."""
        self.source.close()
        self.engine.close()
        self.console.close()
        if self.trackers:
            self.trackers.close()

    # inside

    def _engine(self, model: nn.Module, start: Path | None) -> Engine:
        """The engine; where the hf engine cannot read the trainer's weights (ZeRO 3) it has a copy of its own."""
        c, ranks = self.config, self.ranks
        if c.engine.name == "hf" and not self.policy.shares_weights:
            model = models.load(c.model, self.delimiters, c.seed)[0].to(ranks.device)
        return make_engine(c, model, self.tokenizer, self.objective, ranks, shares=self.policy.shares_weights, start=start)

    def _evaluated(self) -> nn.Module:
        """A whole model with the policy's present weights; with adapters, where those are trained."""
        lora = self.config.policy.lora
        if isinstance(self.engine, HFEngine) and not lora:
            return self.engine.model
        if self.policy.shares_weights:
            return self.policy.model
        if self._whole is None:
            self._whole = models.load(self.config.model, self.delimiters, self.config.seed)[0].to(self.ranks.device)
            if lora:
                adapters.add_lora(self._whole, lora, adapters.new_tokens(self.policy.model))
        if lora:
            adapters.copy_adapter(self._whole, dict(self.policy.adapter()))
        else:
            copy_weights(self._whole, self.policy.weights)
        return self._whole

    def _total_steps(self, stream: DocumentStream | None, replayed: ReplaySource | None) -> int:
        c = self.config
        if stream is None or replayed:
            return min(c.max_steps or len(replayed.steps), len(replayed.steps))
        if c.max_steps is not None:
            return c.max_steps
        if c.data.streaming:
            raise ConfigError("a stream has no known length: give max_steps instead of epochs")
        per_document = getattr(self.objective.config, "positions_per_document", 1)
        return max(1, math.ceil((c.epochs or 1.0) * len(stream) * per_document / c.positions_per_step))

    def _monitor(self) -> CollapseMonitor:
        s = self.config.stop
        return CollapseMonitor(window=s.collapse_window, no_think_rise=s.collapse_no_think)

    def _account(self, batch: Batch, micros: list[MicroBatch]) -> None:
        """Tokens and floating-point operations so far, over all ranks: 6 N per trained token, 2 N per sampled one."""
        trained = sum(float(m.attention_mask.sum()) for m in micros)
        here = [float(sum(len(d.token_ids) for d in batch.documents)), trained, float(self.sampled)]
        self.spent.add(*self.ranks.sum(here), self.parameters, self.config.loss.inner_epochs)

    def _evaluate(self) -> dict[str, float]:
        c, mine = self.config.eval, self.held_out[self.ranks.rank :: self.ranks.size]
        model, frozen = self._evaluated(), self.frozen and self.frozen.model
        if self.frozen and self.config.policy.lora:
            frozen = Beside(model, bare=True)
        here = evaluate(model, self.objective, mine, frozen=frozen, thoughts=c.thoughts, seed=self.config.seed,
                        token_budget=self.config.token_budget, pad_id=self.layout.pad_id)  # fmt: skip
        whole = Evaluation.join(self.ranks.gather(here))
        row = {f"eval/{k}": v for k, v in whole.summary().items() if not k.endswith("_ci")}
        score = row.get("eval/gain_frozen", row.get("eval/reward", -row["eval/no_think_loss"]))
        if self.best["gain"] is None or score > self.best["gain"]:
            self.best = {"step": self.step, "gain": score, "stale": 0}
            if self.config.checkpoint.every and self.step % self.config.checkpoint.every:
                self._checkpoint()
        else:
            self.best["stale"] += 1
            if self.config.stop.patience and self.best["stale"] >= self.config.stop.patience:
                self.stopped = f"patience: no better gain in {self.best['stale']} evaluations"
        return row

    def _checkpoint(self) -> None:
        state = {"config": self._resolved(), "backend": type(self.policy).__name__, "best": self.best,
                 "spent": asdict(self.spent), "skipped": self.skipped, "skipped_in_row": self.skipped_in_row,
                 "monitor": self.monitor.state_dict()}  # fmt: skip
        mine = {"source": self.source.state_dict(), "baseline": self.baseline.state_dict(), "rng": torch.get_rng_state()}
        checkpoint.save(self.folder, self.step, self.ranks, {"policy": self.policy}, state, mine)
        if self.ranks.first:
            checkpoint.rotate(self.folder, self.config.checkpoint.keep, self.best["step"])

    def _resolved(self) -> dict[str, Any]:
        """The configuration with the objective's defaults."""
        objective = {"name": self.config.objective.get("name", "rlp"), **asdict(self.objective.config)}
        return to_dict(self.config) | {"objective": objective}

    def _resume(self, path: Path) -> None:
        state, mine = checkpoint.read(path, self.ranks, type(self.policy).__name__, self._resolved())
        self.step, self.best, self.spent = state["step"], state["best"], records.Spent(**state["spent"])
        self.stopped = self.spent.over(self.config.stop.input_tokens, self.config.stop.flops)
        self.skipped, self.skipped_in_row = state["skipped"], state["skipped_in_row"]
        self.monitor.load_state_dict(state["monitor"])
        self.source.load_state_dict(mine["source"])
        self.baseline.load_state_dict(mine["baseline"])
        torch.set_rng_state(mine["rng"])
        self.policy.load(path)
        if self.store:
            self.store.cut(self.step)

    def _keep_batch(self, step: int, groups: Sequence[Group], documents: Sequence[Document]) -> None:
        records.keep_batch(self.folder, step, self.ranks.rank, self._bad, groups, documents)

    def write_run_json(self, status: str, **more: Any) -> None:
        """run.json: the resolved configuration, what the run found, all versions."""
        if not self.ranks.first:
            return
        record = {
            "status": status, "stopped": self.stopped, "step": self.step, "total_steps": self.total_steps,
            "parameters": self.parameters, "ranks": self.ranks.size, "device": str(self.ranks.device),
            "backend": type(self.policy).__name__,
            "config": self._resolved(),
            "engine": self.engine.health(), "versions": compat.versions(), "best": self.best, **self.facts, **more,
        }  # fmt: skip
        records.write_json(self.folder / "run.json", record)
