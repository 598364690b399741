"""Reading an experiment file, and every check that needs neither a model nor documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlpretrain.config import ConfigError, PretrainConfig
from rlpretrain.config.io import parse, read_mapping, section, to_dict
from rlpretrain.config.lines import place_of
from rlpretrain.experiments.experiment import BASE, Experiment, Job, combinations, needed
from rlpretrain.objectives import config_of
from rlpretrain.training.same_settings import changes

NOT_SEARCHED = ("objective", "model", "data", "seed", "output_dir")
"""Fields, and sections of them, that `search` does not vary."""


def load_experiment(path: str | Path) -> Experiment:
    """Read and check an experiment file; see `build_experiment`."""
    file = Path(path).expanduser()
    values = read_mapping(file)
    try:
        experiment = parse(Experiment, values)
    except ConfigError as error:
        raise ConfigError(f"{error} (in {place_of(str(error), file)})") from None
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
        for values in combinations(experiment.methods[name]):
            job.config(extra=values)
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
    if method.with_stages and method.match not in ("tokens", "flops"):
        raise ConfigError(f"method {name}: with_stages needs match: flops or match: tokens")
    if method.like and (method.like not in experiment.methods or experiment.methods[method.like].match):
        raise ConfigError(f"method {name}: like '{method.like}' must be a method without `match`")
    if method.after is not None and method.after not in experiment.methods:
        raise ConfigError(f"method {name}: after '{method.after}' is not a method of this experiment")
    if unknown := sorted({*method.against} - {*experiment.methods} | {name} & {*method.against}):
        raise ConfigError(f"method {name}: against '{unknown[0]}' is not another method of this experiment")
    _check_search(experiment, name)
    _check_order(experiment, (name,))
    if method.cost_from is None:
        return
    source = experiment.methods.get(method.cost_from)
    if method.match != "flops" or source is None or source.cost_from or method.cost_from == name:
        raise ConfigError(
            f"method {name}: cost_from '{method.cost_from}' needs match: flops, and must be another method "
            "without cost_from"
        )


def _check_search(experiment: Experiment, name: str) -> None:
    method, evaluation = experiment.methods[name], experiment.evaluation
    if not method.search:
        return
    for field_name, values in method.search.items():
        if field_name.split(".")[0] in NOT_SEARCHED:
            raise ConfigError(
                f"method {name}: search cannot vary {field_name}; {', '.join(NOT_SEARCHED)} are those of the "
                "method. Write a method for each"
            )
        if not values:
            raise ConfigError(f"method {name}: search of {field_name} has no values")
    if evaluation.search_data is None or evaluation.search_data == evaluation.data:
        raise ConfigError(
            f"method {name}: search needs evaluation.search_data, documents that evaluation.data does not "
            "have; values that were chosen on the held-out documents would flatter the method"
        )


def _check_order(experiment: Experiment, path: tuple[str, ...]) -> None:
    """No method waits for itself."""
    for name in needed(experiment.methods[path[-1]]):
        if name in path:
            raise ConfigError(f"method {name} waits for itself: {' needs '.join((*path, name))}")
        if name in experiment.methods:
            _check_order(experiment, (*path, name))


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
    elif method.match == "steps":
        assert method.like is not None, "_check_method has looked"
        other = job.config(method.like)
        rates, wanted = (_schedule_of(each) for each in (config, other))
        if different := changes(wanted, rates, "optim"):
            raise ConfigError(
                f"method {job.name}: match: steps is for runs with the same schedule as {method.like}: "
                f"{'; '.join(different)}"
            )
    elif method.match and config.optim.schedule.needs_length:
        raise ConfigError(
            f"method {job.name}: its number of steps follows from the budget, so optim.schedule must not "
            f"depend on it, and {config.optim.schedule.name} does: use constant, or match: steps"
        )


def _schedule_of(config: PretrainConfig) -> dict[str, Any]:
    """The settings of the learning rate, without its peak."""
    optim = to_dict(config.optim)
    return {name: optim[name] for name in ("schedule", "min_lr_ratio", "warmup_steps")}


load = load_experiment  # the name it had before
