"""The end of a step: skipped steps, reasons to stop, evaluation, the log, the checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlpretrain.tracking.step_metrics import StepMetrics
from rlpretrain.training import observations, records, run_output, run_state, run_stop, run_tasks
from rlpretrain.training.run_evaluation import evaluate_run
from rlpretrain.types import Batch

if TYPE_CHECKING:
    from rlpretrain.training.run import Run


def finish_step(run: Run, step: int, batch: Batch) -> None:
    """Log, evaluate, checkpoint, and decide whether the run continues. All ranks call it."""
    run.step = step
    _count_skipped(run, batch)
    observations.account(run, batch)
    row = run.metrics.means(run.ranks) | run_output.step_row(run)
    complete = run_stop.over_budget(run) or run_stop.exhausted(run)
    last = complete is not None or step == run.total_steps
    run.stopped = run_stop.nonfinite(run) or run.stopped or complete
    run.stopped = run.stopped or run_stop.collapsed(run, row)
    if run.average and not run.bad:
        run.average.update(step)
    if last or _is_due(step, run.config.eval.every):
        row |= evaluate_run(run) if run.held_out is not None else {}
        row |= run_tasks.task_metrics(run)
    if run.mixing:
        run.console.say(run.mixing.observe(step, row, run.ranks))
    if step < run.total_steps and run.stopped is None:
        run.stopped = run_stop.interrupted(run)
    _log(run, row, batch)
    run.last = row
    every = run.config.checkpoint.every
    is_best = run.best["step"] == step
    regular = bool(every) and (_is_due(step, every) or is_best or last or run.stopped is not None)
    if regular or run_stop.was_interrupted(run):
        run_state.save(run)


def _is_due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens after this step."""
    return bool(every) and step % every == 0


def _count_skipped(run: Run, batch: Batch) -> None:
    """Count and report a step with NaN or inf, and drop its metrics, which cover only a part of it."""
    if not run.bad:
        run.skipped_in_row = 0
        return
    run.skipped, run.skipped_in_row = run.skipped + 1, run.skipped_in_row + 1
    run.metrics = StepMetrics()
    run.console.say(f"step {run.step} skipped: NaN or inf in {run.bad} ({run.skipped_in_row} in a row)")
    if run.bad == "gradients":  # `find_problem` has stored the batches with other problems
        records.keep_batch(run.folder, run.step, run.ranks.rank, run.bad, batch.groups, batch.documents)


def _log(run: Run, row: dict[str, float], batch: Batch) -> None:
    """Write the row and samples to the trackers, and show the step with new warnings on the console."""
    if run.trackers:
        scored_groups = [group for group in batch.groups if (group.id, 0) in run.metrics.rewards]
        run.trackers.write(run.step, row, scored_groups, run.tokenizer, run.metrics.rewards)
    run.console.step(run.step, row, batch.groups, run.tokenizer)
    for finding in run.health.observe(run.step, row):
        run.console.say(f"warning, step {run.step}: {finding}")
