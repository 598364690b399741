"""The numbers of lm-eval's tasks: directly and after a thought, and paired differences over examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlpretrain.evaluation.intervals import interval

WAYS = ("direct", "thinking")


@dataclass(frozen=True, slots=True)
class TaskNumber:
    """One metric of one task."""

    value: float
    stderr: float | None
    """lm-eval's standard error; None where it has none."""
    examples: np.ndarray | None = None
    """[E] the metric of each example in the task's order; None if the metric is no mean over examples."""

    @property
    def interval(self) -> list[float] | None:
        """The 95% interval over examples, or else the normal interval of `stderr`."""
        if self.examples is not None:
            return interval(self.examples)[1]
        if self.stderr is None:
            return None
        return [self.value - 1.96 * self.stderr, self.value + 1.96 * self.stderr]

    def minus(self, other: TaskNumber) -> list[float]:
        """[difference, low, high]: paired over examples; the ends are NaN where that is not possible."""
        if self.examples is None or other.examples is None or len(self.examples) != len(other.examples):
            return [self.value - other.value, math.nan, math.nan]
        mean, ends = interval(self.examples - other.examples)
        return [mean, *ends]


Numbers = dict[str, TaskNumber]
"""By "task/metric"."""


@dataclass(frozen=True, slots=True)
class TaskResults:
    """The numbers of one model on the same examples: `direct`, and `thinking` where there is a thought."""

    direct: Numbers
    thinking: Numbers = field(default_factory=dict)
    thoughts: dict[str, float] = field(default_factory=dict)
    """Of the sampled thoughts: how many, tokens per thought, share unclosed, contexts that were cut."""

    def metrics(self) -> dict[str, float]:
        """All numbers by "task/metric/way", and "thoughts/..."."""
        values = {
            f"{name}/{way}": number.value for way in WAYS for name, number in getattr(self, way).items()
        }
        return values | {f"thoughts/{name}": value for name, value in self.thoughts.items()}

    def as_dict(self, base: TaskResults | None = None) -> dict[str, Any]:
        """All numbers for a JSON file; with `base`, its numbers and the differences from it."""
        out: dict[str, Any] = {}
        for name, direct in self.direct.items():
            row: dict[str, Any] = {"direct": _plain(direct)}
            if thinking := self.thinking.get(name):
                row |= {"thinking": _plain(thinking), "thinking - direct": thinking.minus(direct)}
            for way in WAYS if base is not None else ():
                mine, before = getattr(self, way).get(name), getattr(base, way).get(name)
                if mine is not None and before is not None:
                    row |= {f"base {way}": _plain(before), f"{way} - base": mine.minus(before)}
            out[name] = row
        return {"tasks": out, "thoughts": self.thoughts} | (
            {"base thoughts": base.thoughts} if base is not None else {}
        )


def read_numbers(results: Mapping[str, Any]) -> Numbers:
    """The numbers in what `lm_eval.evaluator.evaluate` returns, by "task/metric".

    A metric keeps lm-eval's name, with its filter unless that is `none`.
    """
    numbers: Numbers = {}
    for task, values in results["results"].items():
        samples = sorted(results.get("samples", {}).get(task, ()), key=lambda sample: sample["doc_id"])
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not _is_number(value):
                continue
            stderr = values.get(f"{metric}_stderr,{filter_name}")
            name = f"{task}/{metric}" if filter_name == "none" else f"{task}/{metric},{filter_name}"
            numbers[name] = TaskNumber(
                float(value),
                float(stderr) if _is_number(stderr) else None,
                _examples(samples, metric, filter_name, float(value)),
            )
    return numbers


def _examples(
    samples: Sequence[Mapping[str, Any]], metric: str, filter_name: str, value: float
) -> np.ndarray | None:
    """[E] a metric of each example, if `value` is the mean of these."""
    of_filter = [sample.get(metric) for sample in samples if sample["filter"] == filter_name]
    if not of_filter or not all(_is_number(example) for example in of_filter):
        return None
    examples = np.array(of_filter, float)
    return examples if np.isclose(examples.mean(), value, rtol=1e-6, atol=1e-9) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.number | np.bool_)


def _plain(number: TaskNumber) -> dict[str, Any]:
    return {"value": number.value, "stderr": number.stderr, "interval": number.interval}
