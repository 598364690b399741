"""Learning-rate schedules: a linear warm-up, then the shape that `optim.schedule` names.

docs/schedules.md has the formulas, their sources, and when to use which.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from rlpretrain.config import OptimConfig
from rlpretrain.config.plugins import find

Schedule = Callable[[int, int, OptimConfig], float]
"""(optimizer step after warm-up, number of such steps, settings) → factor on the peak learning rate.

Settings that are steps (`warmup_steps` and those of the schedule) are optimizer steps there.
"""


def constant(step: int, total: int, config: OptimConfig) -> float:
    """The peak up to the end."""
    return 1.0


def cosine(step: int, total: int, config: OptimConfig) -> float:
    """Half a cosine, from the peak to `min_lr_ratio` of it."""
    return _between(1.0, config.min_lr_ratio, _cosine(step / total))


def linear(step: int, total: int, config: OptimConfig) -> float:
    """A line, from the peak to `min_lr_ratio` of it."""
    return _between(1.0, config.min_lr_ratio, 1 - min(1.0, step / total))


def inverse_sqrt(step: int, total: int, config: OptimConfig) -> float:
    """sqrt(W / (W + step)) with W steps of warm-up (arXiv 1706.03762, §5.3); without warm-up W is 1."""
    scale = max(1, config.warmup_steps)
    return math.sqrt(scale / (scale + step))


def wsd(step: int, total: int, config: OptimConfig) -> float:
    """The peak, then a decay to `min_lr_ratio` over the last share of the steps (arXiv 2404.06395).

    The decay is a line, or 1 - sqrt (arXiv 2405.18392).
    """
    decay = config.schedule.decay
    done = step / total - (1 - decay)
    if done <= 0 or decay == 0:
        return 1.0
    progress = min(1.0, done / decay)
    left = 1 - (math.sqrt(progress) if config.schedule.shape == "sqrt" else progress)
    return _between(1.0, config.min_lr_ratio, left)


def infinite(step: int, total: int, config: OptimConfig) -> float:
    """Cosine cool-down to a constant rate, then an exponential decay (arXiv 2403.08763, 2503.02844).

    The decay begins after step `anneal_from` of the run, at the rate of that step, and ends at
    `min_lr_ratio`. Before it the rate does not depend on the length of the run.
    """
    schedule = config.schedule
    begin = None if schedule.anneal_from is None else schedule.anneal_from - config.warmup_steps
    if begin is None or step <= begin:
        cooled = step / schedule.cooldown_steps if schedule.cooldown_steps else 1.0
        return _between(1.0, schedule.constant_ratio, _cosine(cooled))
    start = infinite(begin, total, config)
    progress = min(1.0, (step - begin) / max(1, total - begin))
    return start * (config.min_lr_ratio / start) ** progress


SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "inverse_sqrt": inverse_sqrt,
    "wsd": wsd,
    "infinite": infinite,
}


def make_schedule(config: OptimConfig, total_steps: int, inner_epochs: int = 1) -> Callable[[int], float]:
    """optimizer step → factor on the peak learning rate: linear warm-up, then `optim.schedule`.

    `total_steps` and the settings that are steps count steps of the run, each of `inner_epochs` optimizer
    steps. The factor depends on the optimizer step alone, so a run that is resumed with another length
    follows the schedule of that length. Raises ConfigError for a schedule that is neither in `SCHEDULES` nor
    a function that can be imported.
    """
    name = config.schedule.name
    shape = SCHEDULES.get(name) or find(name, "optim.schedule", SCHEDULES)
    settings = _in_optimizer_steps(config, inner_epochs)
    warm, total = settings.warmup_steps, total_steps * inner_epochs

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return shape(step - warm, max(1, total - warm), settings)

    return factor


def _in_optimizer_steps(config: OptimConfig, inner_epochs: int) -> OptimConfig:
    """The settings with steps of the run converted to optimizer steps."""
    schedule = config.schedule
    begin = None if schedule.anneal_from is None else schedule.anneal_from * inner_epochs
    cooldown = schedule.cooldown_steps * inner_epochs
    scaled = replace(schedule, anneal_from=begin, cooldown_steps=cooldown)
    return replace(config, schedule=scaled, warmup_steps=config.warmup_steps * inner_epochs)


def _between(high: float, low: float, share: float) -> float:
    return low + (high - low) * share


def _cosine(progress: float) -> float:
    """Half a cosine, from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
