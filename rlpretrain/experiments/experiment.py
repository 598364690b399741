"""The experiment of `rlpretrain compare`: methods, stages, seeds, matched budgets, the common evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic.dataclasses import dataclass

from rlpretrain.config import (
    STRICT,
    ConfigError,
    Count,
    DataConfig,
    PathText,
    PretrainConfig,
    Seed,
    TaskSettings,
    headed,
)
from rlpretrain.config.engines import own_settings
from rlpretrain.config.io import HEADS, build, read_mapping
from rlpretrain.config.plain import LATER, unwrapped
from rlpretrain.objectives import config_of, parse_section

BASE = "base"
"""The name under which the base model is evaluated."""
UNLIMITED = 10**9
"""`max_steps` of a run that a budget ends."""
REPLACED = ("objective", "schedule", "average", "mixing")
"""Sections whose settings depend on their name."""
Fields = Annotated[dict[str, Any], LATER]
"""Fields of a run. Their types are known once the run's objective is."""


@dataclass(config=STRICT, kw_only=True)
class Method:
    """One row of the table."""

    config: PathText
    """YAML file of a run, relative to the experiment's."""
    set: Fields = field(default_factory=dict)
    """Fields that replace those of the file."""
    match: Literal["tokens", "flops", "steps"] | None = None
    """Train until the run of `like` with the same seed is matched: in tokens of documents, in floating-point
    operations, or in planned steps, with the same schedule.
    """
    like: str | None = None
    """The method whose budget is matched."""
    cost_from: str | None = None
    """With `match: flops`: a method with the same objective. Its operations per position convert the budget
    to the nearest number of steps. Without it the run ends with the step that reaches the budget.
    """
    own: str | None = None
    """The method's own number on held-out documents (`rlpretrain eval` lists them); its reward by default."""
    after: str | None = None
    """Start from the model that this other method trained with the same seed, as a second stage."""
    with_stages: bool = False
    """Let `match` count earlier stages (`after`) too, the method's own and those of `like`."""
    against: tuple[str, ...] = ()
    """Other methods, such as its controls, from which its paired differences are shown. Those from the base
    and from the first method always are.
    """
    search: dict[str, list[Any]] = field(default_factory=dict)
    """Values to try: dotted field to list, such as `optim.lr: [1.0e-5, 3.0e-5]`; of several fields all
    combinations. Each is trained with the first seed and evaluated on `evaluation.search_data`; the best is
    used with every seed.
    """
    search_by: str = "no_think_loss"
    """The number that is best: lowest if it is a loss, else highest."""


@dataclass(config=STRICT, kw_only=True)
class PassAtSettings:
    """Answers that are sampled to the prompts of the evaluation's documents, directly and after a thought."""

    ks: tuple[Count, ...] = (1,)
    """Every k of pass@k."""
    answers: Count | None = None
    """Answers per prompt; the largest k by default."""
    tokens: Count | None = None
    """Longest answer; twice the longest true one by default."""
    after: str = ""
    """Only what follows this text counts, as '####'."""
    until: str = ""
    """Only what precedes this text counts, as '}'."""
    stop: str = ""
    """Text that ends an answer, beside the end of text."""
    verifier: str | None = None
    """package.module:function that judges thought and answer together, as objective verified does."""
    by: str = ""
    """One of `evaluation.data.meta_columns`, such as the difficulty: the answers to the documents with each
    of its values are counted by themselves too.
    """


@dataclass(config=STRICT, kw_only=True)
class CommonEvaluation(TaskSettings):
    """How all models are compared: one objective, and the same positions, random seeds and tasks."""

    data: Annotated[DataConfig, headed("path")]
    """Held-out documents."""
    search_data: Annotated[DataConfig | None, headed("path")] = None
    """Documents by which a method's `search` chooses; others than `data`."""
    objective: Annotated[dict[str, Any], headed("name"), LATER] = field(
        default_factory=lambda: {"name": "rlp"}
    )
    """The objective that chooses positions and targets for all models."""
    documents: Count = 64
    """Number of documents, a random sample of the data."""
    sample_seed: Seed = 0
    """Seed of that sample."""
    positions: Count = 1
    """Positions per document, at most `objective.positions_per_document`."""
    thoughts: Count = 4
    """Sampled thoughts per position."""
    max_thought_tokens: Count = 2048
    """Longest thought of the common objective."""
    greedy: bool = False
    """Score a greedy thought at each position too."""
    own: bool = True
    """Evaluate each model by its own objective too."""
    pass_at: PassAtSettings | None = None
    """Sample answers too; the documents need `answer_column`."""


@dataclass(config=STRICT, kw_only=True)
class Experiment:
    """An experiment file."""

    methods: dict[str, Method] = field(default_factory=dict)
    """The rows: name to method."""
    evaluation: CommonEvaluation
    """How they are compared."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Every method is trained once with each."""
    common: Fields = field(default_factory=dict)
    """Fields that replace those of every method's file; a method's own `set` comes after."""
    jobs: Count = 1
    """Trainings at a time, each in its own process; with `ray`, the cluster decides."""
    ray: str | None = None
    """Ray cluster (local, auto, or an address) that runs the trainings. All of its machines and this one must
    reach `output_dir`, the model and the data.
    """
    resources: dict[str, float] = field(default_factory=lambda: {"num_cpus": 1.0})
    """Ray resources of one training: num_cpus, num_gpus."""
    output_dir: PathText = "runs/compare"
    """Run folders, results.json, results.csv, results.svg, curves.svg; with `pass_at.by` answers.svg."""


@plain_dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training and its evaluation. The base model is only evaluated."""

    experiment: Experiment
    name: str
    seed: int
    where: Path  # folder of the experiment's file
    trial: int | None = None  # place in `combinations`: a training that `search` compares

    @property
    def method(self) -> Method | None:
        """None for the base model."""
        return self.experiment.methods.get(self.name)

    @property
    def folder(self) -> Path:
        """The run folder."""
        trial = "" if self.trial is None else f"-try{self.trial}"
        return Path(self.experiment.output_dir) / f"{self.name}-{self.seed}{trial}"

    def config(self, name: str | None = None, extra: Mapping[str, Any] | None = None) -> PretrainConfig:
        """The configuration of a method, by default this job's, from the base model.

        `extra` has dotted fields that replace others. ConfigError with the method's name.
        """
        method = self.experiment.methods[name or self.name]
        file = self.where / method.config
        try:
            values = overlay(overlay(read_mapping(file), self.experiment.common), method.set)
            values |= {"seed": self.seed, "output_dir": str(self.folder), "console": False}
            if method.match:
                values |= {"max_steps": UNLIMITED}
            for dotted, value in (extra or {}).items():
                values = overlay(values, nested(dotted, value))
            config = build(values, config_of)
            parse_section(config.objective)
        except ConfigError as error:
            raise ConfigError(f"method {name or self.name} ({file}): {error}") from None
        return config


def needed(method: Method) -> list[str]:
    """The methods whose runs must end before the method's begins."""
    return [name for name in (method.like, method.cost_from, method.after) if name]


def combinations(method: Method) -> list[dict[str, Any]]:
    """What `search` tries: dotted field to value, in the order of its lists.

    >>> combinations(Method(config="a.yaml", search={"optim.lr": [1, 2], "max_steps": [5]}))
    [{'optim.lr': 1, 'max_steps': 5}, {'optim.lr': 2, 'max_steps': 5}]
    """
    if not method.search:
        return []
    return [
        dict(zip(method.search, values, strict=True)) for values in itertools.product(*method.search.values())
    ]


def nested(dotted: str, value: Any) -> dict[str, Any]:
    """The value under its dotted name.

    >>> nested("optim.lr", 1)
    {'optim': {'lr': 1}}
    """
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def overlay(values: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with those of `above` in their place.

    An `objective`, `schedule`, `average` or `mixing` of another name replaces the whole section; an `engine`
    of another name keeps the settings that both engines have.

    >>> overlay({"optim": {"lr": 1, "schedule": "cosine"}, "model": "a"}, {"optim": {"lr": 2}})
    {'optim': {'lr': 2, 'schedule': 'cosine'}, 'model': 'a'}
    """
    merged = dict(values)
    for key, value in above.items():
        old = merged.get(key)
        if key in HEADS:
            old, value = (_as_section(key, side) for side in (old, value))
            if key in REPLACED and isinstance(old, dict) and isinstance(value, dict):
                head = HEADS[key]
                old = old if value.get(head, old.get(head)) == old.get(head) else None
        if key == "engine" and isinstance(old, dict) and isinstance(value, dict) and "name" in value:
            old = own_settings(old | {"name": value["name"]})
        if isinstance(old, dict) and isinstance(value, dict):
            value = overlay(old, value)
        merged[key] = value
    return merged


def _as_section(key: str, value: Any) -> Any:
    """A section that was written as one string, as a mapping."""
    value = unwrapped(value)
    return {HEADS[key]: value} if isinstance(value, str) else value
