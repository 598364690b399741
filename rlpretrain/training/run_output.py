"""The output of a run: its first printed lines, run.json, stored rollouts and the final model."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlpretrain import compat, models
from rlpretrain.config.io import to_dict
from rlpretrain.evaluation.places import overlaps
from rlpretrain.files import writing
from rlpretrain.tracking.throughput import throughput
from rlpretrain.tracking.trackers import Trackers
from rlpretrain.training import run_state
from rlpretrain.training.interruption import Interrupted
from rlpretrain.types import Batch

if TYPE_CHECKING:
    from rlpretrain.training.averaging import WeightAverage
    from rlpretrain.training.run import Run


def opening(run: Run, resume: str | bool | None) -> Iterator[str]:
    """The lines that a run prints before its first step."""
    lora = run.config.policy.lora
    if run.added:
        fixed = "; policy.lora.new_tokens is off: their embeddings are not trained"
        yield f"added to the tokenizer: {', '.join(run.added)}{fixed if lora and not lora.new_tokens else ''}"
    if run.padded_because:
        yield f"rows are padded, not packed in trees: {run.padded_because}"
    yield from overlaps(run.config)
    if run.dropped:
        longer = (
            ", or longer than data.max_length with their answer," if run.config.data.answer_column else ""
        )
        yield f"{run.dropped} documents shorter than {run.objective.min_length} tokens{longer} left out"
    if run.peak is None and run.ranks.device.type == "cuda":  # docs/gpu.md
        name = torch.cuda.get_device_name(run.ranks.device)
        yield f"the peak of {name} is not known, so perf/mfu is not logged: set peak_flops"
    if run.resumed_from:
        yield f"resumed from {run.resumed_from}"
    elif resume:
        yield f"no checkpoint in {run.folder} yet"


def make_trackers(run: Run) -> Trackers:
    """The trackers of `report_to`, which get a table of samples about five times in a run."""
    config, sample_every = run.config, max(1, run.total_steps // 5)
    return Trackers(run.folder, config.report_to, to_dict(config), run.folder.name, run.step, sample_every)


def facts(run: Run) -> dict[str, Any]:
    """The entries of run.json about this run, beside its configuration."""
    return {
        "added_tokens": run.added,
        "padded_because": run.padded_because,
        "documents_too_short": run.dropped,
        "peak_flops": run.peak,
        "resumed_from": str(run.resumed_from) if run.resumed_from else None,
    }


def logged_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl: in a resumed run those up to its checkpoint, else none."""
    log = folder / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def keep_rollouts(run: Run, batch: Batch) -> None:
    """Store a batch before its step, if `save_rollouts` is set."""
    if run.store:
        facts = {
            "engine": run.engine.health(),
            "shares_weights": run.engine.info.shares_weights,
            **compat.versions(),
        }
        with writing(run.store.folder):
            run.store.write(run.step + 1, batch.groups, batch.documents, facts)


def step_row(run: Run) -> dict[str, float]:
    """Numbers of a step beside its own metrics: times, tokens and operations spent, progress."""
    total, timer = time.perf_counter() - run.timer.start, run.timer
    train = total - timer.rollout - timer.sync
    return {
        "step_time": total,
        "perf/rollout_s": timer.rollout,
        "perf/sync_s": timer.sync,
        "perf/train_s": train,
        **throughput(run.work, total, train, run.ranks.size, run.peak),
        **run.spent.row(),
        "run/epoch": run.source.epoch,
        "run/skipped_steps": run.skipped,
        "run/documents_without_position": run.source.without,
        **source_row(run),
    }


def source_row(run: Run) -> dict[str, float]:
    """Metrics of the named sources (`data.sources`), over all ranks. All ranks call it."""
    row = run.source.source_row()
    counts = [name for name in row if name.endswith(("/documents", "/tokens"))]
    if not counts:
        return row
    return row | dict(zip(counts, run.ranks.sum([row[name] for name in counts]), strict=True))


def record(run: Run, status: str) -> dict[str, Any]:
    """The content of run.json: the resolved configuration, the results so far, all versions."""
    return {
        "status": status,
        "stopped": run.stopped,
        "step": run.step,
        "total_steps": run.total_steps,
        "parameters": run.parameters,
        "ranks": run.ranks.size,
        "device": str(run.ranks.device),
        "backend": type(run.policy).__name__,
        "config": run_state.resolved(run),
        "engine": run.engine.health(),
        "versions": compat.versions(),
        "best": run.best,
        "warnings": [
            {"step": item.step, "rule": item.rule, "text": item.text} for item in run.health.findings
        ],
        **run.facts,
    }


def save_model(run: Run, name: str = "model") -> None:
    """Write the policy as the folder `name` of `output_dir`, with a model card. All ranks call it."""
    models.save_model(run.policy, run.tokenizer, run.folder / name, run.ranks.first)
    if run.ranks.first:
        models.model_card(
            run.folder / name,
            base=run.config.model.path,
            objective=run.config.objective.get("name", "rlp"),
            steps=run.step,
            delimiters=run.delimiters,
        )


def save_average(run: Run, average: WeightAverage) -> None:
    """Write the average of the weights as `output_dir`/averaged. All ranks call it."""
    if not average.count:
        run.console.say("no weights counted for the average, so none is saved")
        return
    with run.source.paused(), average.in_place():
        save_model(run, "averaged")
    run.console.say(f"average of the weights saved to {run.folder / 'averaged'}")


def interruption(run: Run) -> Interrupted:
    """Mark run.json as interrupted; the exception to raise, which says how to resume."""
    run.write_run_json("interrupted")
    assert run.stopped is not None, "an interrupted run has a reason"
    name = run.stopped.removeprefix("interrupted: ")
    text = (
        f"{name} after step {run.step} of {run.total_steps}: checkpoint-{run.step} is written, go on with "
        "--resume auto"
    )
    return Interrupted(text, signal.Signals[name])


def end(run: Run) -> dict[str, Any]:
    """Save the final model, mark run.json as done, upload the model if `push_to_hub` is set.

    After a collapse the best checkpoint is restored first. Returns the last metrics and the reason to stop.
    """
    best = run.folder / f"checkpoint-{run.best['step']}"
    restored = best if run.stopped and run.stopped.startswith("collapse") and best.is_dir() else None
    if restored:
        run.policy.load(restored)
        if run.average:
            run.average.load(restored)
    save_model(run)
    if run.average:
        save_average(run, run.average)
    run.write_run_json("done", best_checkpoint_restored=str(restored) if restored else None)
    run.console.say(f"stopped early: {run.stopped}" if run.stopped else None)
    origin = f", from {restored.name}" if restored else ""
    run.console.say(f"model saved to {run.folder / 'model'}{origin}")
    if run.config.push_to_hub and run.ranks.first:
        models.push(run.folder / "model", run.config.push_to_hub)
    return run.last | {"stopped": run.stopped, "model": str(run.folder / "model"), "steps": run.step}
