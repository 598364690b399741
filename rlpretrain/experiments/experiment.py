"""The experiment file of `rlpretrain compare`: methods, seeds, matched budgets and the common evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass as plain_dataclass
from dataclasses import field, replace
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
from rlpretrain.config.io import HEADS, build, parse, read_mapping, section, to_dict
from rlpretrain.config.plain import LATER, unwrapped
from rlpretrain.objectives import config_of, parse_section
from rlpretrain.training.checkpoint import changes

BASE = "base"
"""The name under which the base model is evaluated."""
UNLIMITED = 10**9
"""`max_steps` of a run that a budget ends."""

Fields = Annotated[dict[str, Any], LATER]
"""Fields of a run. Their types are known once the run's objective is."""


@dataclass(config=STRICT, kw_only=True)
class Method:
    """One row of the table."""

    config: PathText
    """YAML file of a run, relative to the experiment's."""
    set: Fields = field(default_factory=dict)
    """Fields that replace those of the file."""
    match: Literal["tokens", "flops"] | None = None
    """Train until the run of `like` with the same seed is matched: in tokens of documents, or in
    floating-point operations.
    """
    like: str | None = None
    """The method whose budget is matched."""
    cost_from: str | None = None
    """With `match: flops`: a method with the same objective. Its operations per position convert the budget
    to the nearest number of steps. Without it the run ends with the step that reaches the budget.
    """
    own: str | None = None
    """The method's own number on held-out documents (`rlpretrain eval` lists them); its reward by default."""


@dataclass(config=STRICT, kw_only=True)
class CommonEvaluation(TaskSettings):
    """How all models are compared: one objective, and the same positions, random seeds and tasks."""

    data: Annotated[DataConfig, headed("path")]
    """Held-out documents."""
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
    """Run folders, results.json, results.csv, results.svg."""


@plain_dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training and its evaluation. The base model is only evaluated."""

    experiment: Experiment
    name: str
    seed: int
    where: Path  # folder of the experiment's file

    @property
    def method(self) -> Method | None:
        """None for the base model."""
        return self.experiment.methods.get(self.name)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.experiment.output_dir) / f"{self.name}-{self.seed}"

    def config(self, name: str | None = None) -> PretrainConfig:
        """The configuration of a method, by default this job's; ConfigError with the method's name."""
        method = self.experiment.methods[name or self.name]
        file = self.where / method.config
        try:
            values = overlay(overlay(read_mapping(file), self.experiment.common), method.set)
            values |= {"seed": self.seed, "output_dir": str(self.folder), "console": False}
            if method.match:
                values |= {"max_steps": UNLIMITED}
            config = build(values, config_of)
            parse_section(config.objective)
        except ConfigError as error:
            raise ConfigError(f"method {name or self.name} ({file}): {error}") from None
        return config


def load_experiment(path: str | Path) -> Experiment:
    """Read and check an experiment file; see `build_experiment`."""
    file = Path(path).expanduser()
    try:
        experiment = parse(Experiment, read_mapping(file))
    except ConfigError as error:
        raise ConfigError(f"{error} (in {file})") from None
    return _checked(experiment, file.parent, f"{file}: ")


def build_experiment(values: Mapping[str, Any], folder: str | Path) -> Experiment:
    """A checked experiment from nested values; `folder` is where its methods' files are.

    The configuration of every method is built once, so that a mistake in one is found before any training.
    """
    return _checked(parse(Experiment, values), Path(folder), "")


def _checked(experiment: Experiment, folder: Path, source: str) -> Experiment:
    evaluation = experiment.evaluation
    evaluation = replace(evaluation, objective=section(evaluation.objective, config_of))
    experiment = replace(experiment, evaluation=evaluation)
    if not experiment.methods or not experiment.seeds:
        raise ConfigError(f"{source}an experiment needs at least one method and one seed")
    if len(set(experiment.seeds)) < len(experiment.seeds):
        raise ConfigError(f"{source}seeds {list(experiment.seeds)} contains a seed twice")
    bases: dict[str, dict[str, Any]] = {}
    for name in experiment.methods:
        _check_method(experiment, name)
        job = Job(experiment=experiment, name=name, seed=experiment.seeds[0], where=folder)
        config = job.config()
        _check_budget(job, config)
        bases[name] = to_dict(config.model) | {"quantization": "none"}  # the weights before quantization
    first, *others = bases
    for name in others:
        if different := changes(bases[first], bases[name], "model"):
            raise ConfigError(
                f"methods {first} and {name} must start from the same base model: {'; '.join(different)}"
            )
    return experiment


def _check_method(experiment: Experiment, name: str) -> None:
    """What can be checked without the method's own configuration."""
    method = experiment.methods[name]
    if name == BASE or not name.replace("_", "").replace("-", "").replace(".", "").isalnum():
        raise ConfigError(
            f"method '{name}': a name consists of letters, digits, '.', '_' and '-', and is not '{BASE}'"
        )
    if bool(method.match) != bool(method.like):
        raise ConfigError(f"method {name}: match and like need each other (match: flops, like: rlp)")
    if method.like and (method.like not in experiment.methods or experiment.methods[method.like].match):
        raise ConfigError(f"method {name}: like '{method.like}' must be a method without `match`")
    if method.cost_from is None:
        return
    source = experiment.methods.get(method.cost_from)
    if method.match != "flops" or source is None or source.cost_from or method.cost_from == name:
        raise ConfigError(
            f"method {name}: cost_from '{method.cost_from}' needs match: flops, and must be another method "
            "without cost_from"
        )


def _check_budget(job: Job, config: PretrainConfig) -> None:
    """The length of a run whose budget is matched must follow from the budget alone."""
    method = job.experiment.methods[job.name]
    if method.cost_from:
        other = job.config(method.cost_from)
        if different := changes(other.objective, config.objective, "objective"):
            raise ConfigError(
                f"method {job.name}: cost_from '{method.cost_from}' must have the same objective: "
                f"{'; '.join(different)}"
            )
    elif method.match and config.optim.schedule != "constant":
        raise ConfigError(
            f"method {job.name}: its number of steps follows from the budget, so optim.schedule must be "
            "constant"
        )


def overlay(values: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with those of `above` in their place.

    An `objective` of another name replaces the whole section; an `engine` of another name keeps the settings
    that both engines have.

    >>> overlay({"optim": {"lr": 1, "schedule": "cosine"}, "model": "a"}, {"optim": {"lr": 2}})
    {'optim': {'lr': 2, 'schedule': 'cosine'}, 'model': 'a'}
    """
    merged = dict(values)
    for key, value in above.items():
        old = merged.get(key)
        if key in HEADS:
            old, value = (_as_section(key, side) for side in (old, value))
            if key == "objective" and value and old and value.get("name", old.get("name")) != old.get("name"):
                old = None
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


load = load_experiment  # the name it had before
