"""Sections `optim` and `average`: the optimizer, its learning rate, and the average of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from dataclasses import field as _field
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from rlpretrain.config.base import STRICT, Amount, Count, Whole, headed

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(config=STRICT, kw_only=True)
class ScheduleConfig:
    """The learning rate after warm-up; docs/schedules.md has the formulas.

    A setting of another schedule is refused unless it has its default value.
    """

    name: Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd", "infinite"] | str = "constant"
    """constant, linear, cosine, inverse_sqrt, wsd, infinite, or package.module:function.
    A function of (optimizer step after warm-up, number of such steps, the settings of `optim`) returns the
    factor on `lr`.
    """
    decay: Share = 0.2
    """wsd: the last share of the steps after warm-up, in which the rate decays to `min_lr_ratio`."""
    shape: Literal["linear", "sqrt"] = "linear"
    """wsd: shape of that decay. sqrt: 1 - sqrt(progress)."""
    cooldown_steps: Whole = 0
    """infinite: steps of the cosine from the peak to `constant_ratio`."""
    constant_ratio: Annotated[float, Field(gt=0, le=1)] = 0.125
    """infinite: the constant rate over the peak."""
    anneal_from: Whole | None = None
    """infinite: the step after which the rate falls exponentially to `min_lr_ratio` at the end; null: never.
    A run that is resumed from a checkpoint may set it to that step or to a later one.
    """

    def __eq__(self, other: object) -> bool:
        """A schedule equals its name if all of its settings have their defaults: it was a text before."""
        if isinstance(other, str):
            other = ScheduleConfig(name=other)
        return isinstance(other, ScheduleConfig) and asdict(self) == asdict(other)

    __hash__ = None  # type: ignore[assignment]

    @model_validator(mode="before")
    @classmethod
    def _only_its_own(cls, given: Any) -> Any:
        values = _plain(given)
        name = str(values.get("name", "constant"))
        if name in SCHEDULES:  # a user's function may use all of them
            _refuse_foreign(cls, values, SETTINGS_OF_SCHEDULES, f"schedule {name}")
        return given

    @property
    def needs_length(self) -> bool:
        """Whether the rate before the last step depends on the number of steps."""
        if self.name == "infinite":
            return self.anneal_from is not None
        return self.name not in ("constant", "inverse_sqrt")


SCHEDULES = ("constant", "linear", "cosine", "inverse_sqrt", "wsd", "infinite")
SETTINGS_OF_SCHEDULES = {
    "decay": "schedule wsd",
    "shape": "schedule wsd",
    "cooldown_steps": "schedule infinite",
    "constant_ratio": "schedule infinite",
    "anneal_from": "schedule infinite",
}
"""The schedule that uses a setting."""


@dataclass(config=STRICT, kw_only=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: str = "adamw"
    """adamw, muon, adamw_8bit (bitsandbytes), any other class of torch.optim in lower case (sgd, adafactor),
    or package.module:factory.
    muon trains the matrices of the body, and AdamW the rest. A factory is a function of (parameter groups,
    these settings) that returns a torch optimizer.
    """
    options: dict[str, Any] = _field(default_factory=dict)
    """Further arguments of that class, such as `{momentum: 0.9}` for sgd; those of Muon, for muon."""
    lr: Amount = 1e-6
    """Peak learning rate."""
    schedule: Annotated[ScheduleConfig, headed("name")] = _field(default_factory=ScheduleConfig)
    """The learning rate after warm-up: the name of a schedule, or a section with its settings."""
    min_lr_ratio: Amount = 0.0
    """Final learning rate over the peak; constant and inverse_sqrt have none."""
    warmup_steps: Whole = 10
    """Steps of linear warm-up.
    As in `max_steps`, a step of the run has `loss.inner_epochs` optimizer steps.
    """
    betas: tuple[float, float] = (0.9, 0.95)
    """Betas of the optimizers that have them. Our choice: the paper gives none for RLP."""
    weight_decay: Amount = 0.0
    """Weight decay, on matrices only."""
    clip_grad_norm: Amount = 1.0
    """Largest global gradient norm; 0 switches clipping off."""

    @model_validator(mode="after")
    def _ends_agree(self) -> OptimConfig:
        schedule, floor = self.schedule, self.min_lr_ratio
        if schedule.name != "infinite" or schedule.anneal_from is None:
            return self
        if not 0 < floor <= schedule.constant_ratio:
            raise ValueError(
                "an exponential decay ends above 0 and starts at constant_ratio "
                f"{schedule.constant_ratio:g}: with schedule.anneal_from, min_lr_ratio must lie between them "
                f"and is {floor:g}"
            )
        if schedule.anneal_from < self.warmup_steps:
            raise ValueError(
                f"schedule.anneal_from {schedule.anneal_from} lies in the warm-up ({self.warmup_steps} steps)"
            )
        return self


@dataclass(config=STRICT, kw_only=True)
class AverageConfig:
    """An average of the trained weights, in float32; thoughts are always sampled by the weights themselves.

    The weights after step s count if s is at least `start` and divisible by `every`. A skipped step does not
    count.
    """

    kind: Literal["sma", "ema", "last_k"] = "ema"
    """sma: the mean of all that count. ema: a moving average, which starts with the first that counts.
    last_k: the mean of the `last` latest.
    """
    every: Count = 1
    """Steps between weights that count."""
    start: Whole = 0
    """The first step whose weights may count."""
    decay: Share = 0.999
    """ema: the average keeps this share of itself each time."""
    last: Count = 5
    """last_k: how many count. As many copies are kept in CPU memory and in each checkpoint."""
    device: Literal["policy", "cpu"] = "policy"
    """Where sma and ema are kept: on the device of the weights, or in CPU memory."""

    @model_validator(mode="before")
    @classmethod
    def _only_its_own(cls, given: Any) -> Any:
        values = _plain(given)
        kind = str(values.get("kind", "ema"))
        owners = {"decay": "average ema", "last": "average last_k"}
        if kind in ("sma", "ema", "last_k"):  # pydantic refuses others
            _refuse_foreign(cls, values, owners, f"average {kind}")
        return given


def _plain(given: Any) -> dict[str, Any]:
    """The values of a section before they are checked."""
    return dict(given if isinstance(given, Mapping) else getattr(given, "kwargs", None) or {})


def _refuse_foreign(owner: Any, values: Mapping[str, Any], owners: Mapping[str, str], name: str) -> None:
    """Raise ValueError for settings of another variant of a section that are not at their defaults."""
    defaults = {field.name: field.default for field in fields(owner)}
    foreign = [
        f"{key} is a setting of {owners[key]}, not of {name}"
        for key, value in values.items()
        if owners.get(key, name) != name and value != defaults[key]
    ]
    if foreign:
        raise ValueError("; ".join(foreign))
