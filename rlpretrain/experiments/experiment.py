"""What `rlpretrain compare` reads: several configurations, the seeds, the budgets they share, and how they
are judged.
"""

from __future__ import annotations

from dataclasses import dataclass as plain_dataclass
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic.dataclasses import dataclass

from rlpretrain.config import STRICT, ConfigError, Count, DataConfig, PathText, PretrainConfig, Seed, headed
from rlpretrain.config.engines import own_settings
from rlpretrain.config.io import HEADS, build, parse, read_mapping, section, to_dict
from rlpretrain.config.plain import LATER, unwrapped
from rlpretrain.objectives import config_of, parse_section
from rlpretrain.training.checkpoint import changes

BASE = "base"
ENDLESS = 10**9


Fields = Annotated[dict[str, Any], LATER]
"""Fields of a run: what they are is known once its objective is."""


@dataclass(config=STRICT, kw_only=True)
class Method:
    """One row of the table."""

    config: PathText
    """YAML file of a run, relative to the experiment's."""
    set: Fields = field(default_factory=dict)
    """Fields laid over it."""
    match: Literal["tokens", "flops"] | None = None
    """Train until as many tokens of documents, or floating-point operations, are spent as by `like` with
    the same seed.
    """
    like: str | None = None
    """The method whose budget it gets."""
    own: str | None = None
    """Its own number on held-out documents (`rlpretrain eval` has their meanings); by default what it is
    rewarded with.
    """


@dataclass(config=STRICT, kw_only=True)
class Judged:
    """How all models are compared: by one objective, at the same places, with the same random numbers."""

    data: Annotated[DataConfig, headed("path")]
    """Held-out documents."""
    objective: Annotated[dict[str, Any], headed("name"), LATER] = field(
        default_factory=lambda: {"name": "rlp"}
    )
    """Where to think and what to predict, for all."""
    documents: Count = 64
    """How many documents."""
    thoughts: Count = 4
    """Sampled thoughts per position."""
    max_thought_tokens: Count = 2048
    """Longest thought of the common objective."""


@dataclass(config=STRICT, kw_only=True)
class Experiment:
    """An experiment file."""

    methods: dict[str, Method] = field(default_factory=dict)
    """The rows: name to method."""
    evaluation: Judged
    """How they are compared."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Every method is trained once with each."""
    common: Fields = field(default_factory=dict)
    """Fields laid over every method's configuration, below its own `set`."""
    jobs: Count = 1
    """Trainings at a time, each a process of its own; with `ray`, the cluster decides."""
    ray: str | None = None
    """Ray cluster (local, auto, or an address) that runs them; its machines and this one must reach
    `output_dir`, model, data.
    """
    resources: dict[str, float] = field(default_factory=lambda: {"num_cpus": 1.0})
    """What a training takes of the cluster: num_cpus, num_gpus."""
    output_dir: PathText = "runs/compare"
    """Run folders, results.json, results.csv, results.svg."""


@plain_dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training and its evaluation; of the base, only that."""

    experiment: Experiment
    name: str
    seed: int
    where: Path  # folder of the experiment's file

    @property
    def method(self) -> Method | None:
        """None for the base."""
        return self.experiment.methods.get(self.name)

    @property
    def folder(self) -> Path:
        return Path(self.experiment.output_dir) / f"{self.name}-{self.seed}"

    def config(self, name: str | None = None) -> PretrainConfig:
        """The configuration of a method, this one's by default; ConfigError with its name."""
        method = self.experiment.methods[name or self.name]
        file = self.where / method.config
        try:
            values = laid_over(laid_over(read_mapping(file), self.experiment.common), method.set)
            values |= {"seed": self.seed, "output_dir": str(self.folder), "console": False}
            if method.match:
                values |= {"max_steps": ENDLESS}  # its budget ends it
            config = build(values, config_of)
            parse_section(config.objective)
        except ConfigError as error:
            raise ConfigError(f"method {name or self.name} ({file}): {error}") from None
        return config


def load_experiment(path: str | Path) -> Experiment:
    """A checked experiment; every configuration in it is built once, so that mistakes show before any
    training.
    """
    file = Path(path).expanduser()
    try:
        experiment = parse(Experiment, read_mapping(file))
    except ConfigError as error:
        raise ConfigError(f"{error} (in {file})") from None
    judged = experiment.evaluation
    judged = replace(judged, objective=section(judged.objective, config_of))
    experiment = replace(experiment, evaluation=judged)
    if not experiment.methods or not experiment.seeds:
        raise ConfigError(f"{file}: an experiment needs at least one method and one seed")
    if len(set(experiment.seeds)) < len(experiment.seeds):
        raise ConfigError(f"{file}: seeds {list(experiment.seeds)} holds one twice")
    bases: dict[str, Any] = {}
    for name, method in experiment.methods.items():
        if name == BASE or not name.replace("_", "").replace("-", "").replace(".", "").isalnum():
            raise ConfigError(
                f"method '{name}': its name must be of letters, digits, '.', '_' and '-', and not '{BASE}'"
            )
        if bool(method.match) != bool(method.like):
            raise ConfigError(f"method {name}: match and like go together (match: flops, like: rlp)")
        if method.like and (method.like not in experiment.methods or experiment.methods[method.like].match):
            raise ConfigError(
                f"method {name}: like '{method.like}' must be another method, without a budget to match"
            )
        config = Job(experiment=experiment, name=name, seed=experiment.seeds[0], where=file.parent).config()
        if method.match and config.optim.schedule != "constant":
            raise ConfigError(
                f"method {name}: its length follows from the budget, so optim.schedule must be constant"
            )
        bases[name] = to_dict(config.model) | {"quantization": "none"}  # the same weights, rounded or not
    first, *others = bases
    for name in others:
        if different := changes(bases[first], bases[name], "model"):
            raise ConfigError(
                f"methods {first} and {name} must begin with the same base: {'; '.join(different)}"
            )
    return experiment


def laid_over(values: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested values with others over them; an `objective` of another name replaces the whole section.

    An `engine` of another name keeps the settings that both engines have.

    >>> laid_over({"optim": {"lr": 1, "schedule": "cosine"}, "model": "a"}, {"optim": {"lr": 2}})
    {'optim': {'lr': 2, 'schedule': 'cosine'}, 'model': 'a'}
    """
    out = dict(values)
    for key, value in above.items():
        old = out.get(key)
        if key in HEADS:
            old, value = (unwrapped(v) for v in (old, value))
            old, value = ({HEADS[key]: v} if isinstance(v, str) else v for v in (old, value))
            if key == "objective" and value and old and value.get("name", old.get("name")) != old.get("name"):
                old = None
            if key == "engine" and isinstance(old, dict) and isinstance(value, dict) and "name" in value:
                old = own_settings(old | {"name": value["name"]})
        out[key] = laid_over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out


load = load_experiment  # the name it had before
