"""The schedule of a planned run in words: steps, positions, tokens, learning rates, documents, time."""

from __future__ import annotations

import torch

from rlpretrain.config import ConfigError, PretrainConfig
from rlpretrain.objectives import Objective
from rlpretrain.tools.memory import Sizes
from rlpretrain.tools.sizes import count_step_tokens
from rlpretrain.tools.speed import format_duration, measure_speed, time_of_step
from rlpretrain.training.schedules import make_schedule


def make_timetable(
    config: PretrainConfig, objective: Objective, sizes: Sizes, documents: int | None
) -> dict[str, str]:
    """Rows of the table, name → words. `documents` is their number, None where it is not known."""
    positions, sampling = config.positions_per_step, config.sampling
    per_document = objective.config.positions_per_document if objective.has_positions else 1
    steps, needed_documents = config.max_steps, -(-positions // per_document)
    if steps is None and config.data.streaming:
        raise ConfigError("a stream has no known length: give max_steps instead of epochs")
    if steps is None and documents is not None:
        available = int((config.epochs or 1.0) * documents * per_document)
        steps = max(1, -(-available // positions))

    def format_count(per_step: int) -> str:
        return f"{per_step:,} a step" + (f", {per_step * steps:,} in all" if steps else "")

    thoughts = positions * sampling.thoughts
    table = {
        "steps": f"{steps:,}" if steps else f"unknown offline: {config.epochs:g} epochs",
        "positions": format_count(positions),
        "document tokens, at most": format_count(needed_documents * config.data.longest),
    }
    if objective.has_positions:
        table["thoughts"] = format_count(thoughts)
        table["sampled tokens, at most"] = format_count(thoughts * sampling.max_thought_tokens)
        scored = format_count(thoughts * sizes.row)
        table["scored tokens, at most"] = f"{scored}, in rows of up to {sizes.row:,}"
    if sizes.device == "cpu" or torch.cuda.is_available():
        table["time on this machine, roughly"] = estimate_time(config, objective, sizes, steps)
    table["learning rate"] = _format_learning_rates(config, steps)
    if mixing := config.data.mixing:
        table["shares of the sources"] = f"change every {mixing.every} steps, by {mixing.name}"
    table["documents, at least"] = format_count(needed_documents)
    if documents is None:
        table["rows there are"] = "of several sources" if config.data.sources else "unknown offline"
        return table
    epochs = f": {needed_documents * steps / documents:.3g} epochs" if steps else ""
    split = "; long ones are split" if config.data.long == "split" else ""
    table["rows there are"] = f"{documents:,}{epochs}{split}"
    return table


def _format_learning_rates(config: PretrainConfig, steps: int | None) -> str:
    """The learning rate at the first step, at the end of the warm-up, in the middle and at the end."""
    warmup, updates = config.optim.warmup_steps, config.loss.inner_epochs
    factor = make_schedule(config.optim, steps or 1, updates)
    places = {1, max(1, warmup)}
    if steps:
        places = {place for place in (*places, max(1, steps // 2), steps) if place <= steps}
    rates = [f"{config.optim.lr * factor(i * updates - 1):.2e} (step {i})" for i in sorted(places)]
    return f"{', '.join(rates)}; {warmup} steps of warm-up, then {config.optim.schedule.name}"


def estimate_time(config: PretrainConfig, objective: Objective, sizes: Sizes, steps: int | None) -> str:
    """The time of a step, and of all steps, from the measured speed of this machine."""
    speed = measure_speed(sizes.device, getattr(torch, config.model.dtype))
    positions = config.positions_per_step // sizes.ranks
    thoughts = positions * config.sampling.thoughts if objective.has_positions else 0
    trained = count_step_tokens(config, objective, sizes.longest, sizes.ranks)
    sampled = thoughts * config.sampling.max_thought_tokens
    seconds = time_of_step(config, sizes, speed, trained, thoughts, sampled)
    total = f", {format_duration(seconds * steps)} in all" if steps else ""
    return f"{format_duration(seconds)} a step{total}, if every document and thought is as long as it may be"
