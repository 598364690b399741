"""The grid file of `rlpretrain ratios`, and the experiment that trains it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from rlpretrain.config import STRICT, Amount, ConfigError, Count, PathText, PretrainConfig, Seed
from rlpretrain.config.data import TextConfig
from rlpretrain.config.io import build, parse, read_mapping, to_dict
from rlpretrain.config.lines import place_of
from rlpretrain.evaluation.places import held_out_data
from rlpretrain.experiments.experiment import UNLIMITED, Experiment, Fields, overlay
from rlpretrain.experiments.loading import build_experiment
from rlpretrain.objectives import config_of

GROUPS = ("general", "domain")


def _read_group(value: Any) -> Any:
    """A group as {source: share}; the sources of a list have equal shares."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        return dict.fromkeys(value, 1.0)
    return value


Shares = Annotated[dict[str, Annotated[float, Field(gt=0)]], BeforeValidator(_read_group)]


@dataclass(config=STRICT, kw_only=True)
class Grid:
    """A grid file."""

    config: PathText
    """YAML file of a run with `data.sources` and `eval.data: {name: file}`, relative to the grid's.
    `eval.every` sets at which steps the held-out losses are measured.
    """
    general: Shares
    """Sources of the text that the base model was trained on, the replay: a name, a list of names, or
    {name: share in the group}.
    """
    domain: Shares
    """Sources of the new text, in the same forms."""
    ratios: tuple[Annotated[float, Field(ge=0, le=1)], ...] = (0.0, 0.1, 0.25, 0.5, 0.75)
    """Shares of the domain in all weights. Each is trained with every seed and variant."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Seeds of the runs."""
    tokens: Count | None = None
    """Tokens of documents that each run reads, to a step. Without it a run has the steps of its
    configuration, and runs whose documents differ in length differ in tokens.
    """
    tolerance: Amount = 0.05
    """Nats per token by which the general loss may exceed that of the base model."""
    variants: dict[str, Fields] = field(default_factory=dict)
    """Name to fields of a run that replace others, such as {rewarm: {optim: {lr: 1.0e-4}}}: each is a grid of
    its own. None: one grid with the configuration as it is.
    """
    set: Fields = field(default_factory=dict)
    """Fields that replace those of the configuration in all runs."""
    documents: Count = 128
    """Held-out documents of each source, a random sample; it replaces `eval.documents`."""
    draws: Annotated[int, Field(ge=200)] = 2000
    """Resampled data sets behind the intervals."""
    jobs: Count = 1
    """Trainings at a time, each in its own process; with `ray`, the cluster decides."""
    ray: str | None = None
    """Ray cluster that runs the trainings, as in an experiment of `rlpretrain compare`."""
    resources: dict[str, float] = field(default_factory=lambda: {"num_cpus": 1.0})
    """Ray resources of one training."""
    output_dir: PathText = "runs/ratios"
    """Run folders, ratios.json, ratios.md, ratios.svg."""

    @property
    def sources(self) -> dict[str, dict[str, float]]:
        """Group to {source: share}; the shares of a group sum to 1."""
        groups = {"general": self.general, "domain": self.domain}
        return {
            group: {name: share / sum(shares.values()) for name, share in shares.items()}
            for group, shares in groups.items()
        }

    @property
    def names(self) -> tuple[str, ...]:
        """The variants; "" is that of a grid without any."""
        return tuple(self.variants) or ("",)


def load_grid(path: str | Path) -> tuple[Grid, Experiment]:
    """Read and check a grid file; returns it with the experiment that trains it."""
    file = Path(path).expanduser()
    values = read_mapping(file)
    try:
        grid = parse(Grid, values)
        return grid, make_experiment(grid, file.parent)
    except ConfigError as error:
        raise ConfigError(f"{error} (in {place_of(str(error), file)})") from None


def method_of(variant: str, ratio: float) -> str:
    """The name of the runs with a variant and a ratio.

    >>> method_of("", 0.25), method_of("rewarm", 0)
    ('r0.25', 'rewarm-r0')
    """
    return f"{variant}-r{ratio:g}".removeprefix("-")


def make_experiment(grid: Grid, folder: Path) -> Experiment:
    """The experiment of a grid: a method for each variant and ratio. ConfigError if it cannot be trained."""
    _check_ratios(grid)
    values = overlay(read_mapping(folder / grid.config), grid.set)
    held_out = _check_variants(grid, values)
    methods = {
        method_of(variant, ratio): {
            "config": grid.config,
            "set": overlay(overlay(grid.set, grid.variants.get(variant, {})), _fields_of(grid, ratio)),
        }
        for variant in grid.names
        for ratio in grid.ratios
    }
    _check_lengths(grid, values)
    return build_experiment(
        {
            "methods": methods,
            "evaluation": {
                "data": {"sources": held_out},
                "objective": {"name": "ntp"},
                "documents": grid.documents,
                "own": False,
            },
            "seeds": list(grid.seeds),
            "jobs": grid.jobs,
            "ray": grid.ray,
            "resources": grid.resources,
            "output_dir": grid.output_dir,
        },
        folder,
    )


def _fields_of(grid: Grid, ratio: float) -> dict[str, Any]:
    """The fields of a run that make it a point of the grid."""
    parts = {"general": 1 - ratio, "domain": ratio}
    weights = {
        name: {"weight": parts[group] * share}
        for group, shares in grid.sources.items()
        for name, share in shares.items()
    }
    stop: dict[str, Any] = {"collapse": False, "patience": 0}  # all runs read as much
    length: dict[str, Any] = {}
    if grid.tokens is not None:
        stop["input_tokens"], length["max_steps"] = grid.tokens, UNLIMITED
    return {"data": {"sources": weights}, "eval": {"documents": grid.documents}, "stop": stop, **length}


def _check_ratios(grid: Grid) -> None:
    if sorted(set(grid.ratios)) != list(grid.ratios):
        raise ConfigError(f"ratios {list(grid.ratios)} must ascend, each only once")
    if len({method_of("", ratio) for ratio in grid.ratios}) < len(grid.ratios):
        raise ConfigError(f"ratios {list(grid.ratios)} are told apart by six digits: make them differ there")
    if len(grid.ratios) < 2:
        raise ConfigError("a grid needs at least two ratios; a law with an interval needs five")
    if not grid.general or not grid.domain:
        raise ConfigError("a grid needs sources in both groups, general and domain")
    if both := sorted(grid.general.keys() & grid.domain.keys()):
        raise ConfigError(f"source '{both[0]}' is in both groups, general and domain")


def _check_variants(grid: Grid, values: dict[str, Any]) -> dict[str, Any]:
    """The section of each held-out file, the same in all variants; ConfigError that names a variant."""
    sections: dict[str, Any] = {}
    for variant in grid.names:
        try:
            config = build(overlay(values, grid.variants.get(variant, {})), config_of)
            held_out = _check_sources(grid, config)
            if sections and held_out != sections:
                raise ConfigError("its held-out text differs from the first variant's: all need the same")
        except ConfigError as error:
            raise ConfigError(f"variant '{variant}': {error}" if variant else f"{error}") from None
        sections = held_out
    return sections


def _check_sources(grid: Grid, config: PretrainConfig) -> dict[str, Any]:
    """The section of each held-out file; ConfigError where the groups are not the sources of the run."""
    named = {*grid.general, *grid.domain}
    sources = config.data.sources
    if config.data.mixing is not None:
        raise ConfigError(
            f"{grid.config} has data.mixing, which would change a ratio on the way: set "
            "{data: {mixing: null}}"
        )
    if unknown := sorted(named - sources.keys()):
        known = ", ".join(sources) or "there are none"
        raise ConfigError(f"'{unknown[0]}' is none of data.sources of {grid.config} ({known})")
    if left := sorted(sources.keys() - named):
        raise ConfigError(
            f"source '{left[0]}' of {grid.config} is in no group: add it to general or domain, or remove it"
        )
    if config.data.weights_count != "tokens":
        raise ConfigError(
            f"data.weights_count is {config.data.weights_count} in {grid.config}, and a ratio is a share of "
            "tokens: leave it out"
        )
    ends = [name for name in named if sources[name].exhausted != "repeat"]
    if ends:
        raise ConfigError(
            f"source '{ends[0]}' has exhausted: {sources[ends[0]].exhausted}, which would change a ratio on "
            "the way: use repeat"
        )
    held_out = held_out_data(config) if isinstance(config.eval.data, Mapping) else {}
    if missing := sorted(named - held_out.keys()):
        raise ConfigError(
            f"source '{missing[0]}' has no held-out file: set eval.data in {grid.config} as "
            f"{{{missing[0]}: FILE, ...}}"
        )
    if not config.eval.every:
        raise ConfigError(f"eval.every is 0 in {grid.config}: losses over tokens need evaluations on the way")
    texts = [each.name for each in fields(TextConfig)]
    return {name: {text: to_dict(data)[text] for text in texts} for name, data in held_out.items()}


def _check_lengths(grid: Grid, values: dict[str, Any]) -> None:
    """Runs that end at a number of tokens need a schedule that does not depend on the number of steps."""
    if grid.tokens is None:
        return
    for variant in grid.names:
        optim = build(overlay(values, grid.variants.get(variant, {})), config_of).optim
        if optim.schedule.needs_length:
            raise ConfigError(
                f"variant '{variant}': with `tokens` the number of steps is not known before, and "
                f"optim.schedule {optim.schedule.name} depends on it: use constant, or leave out `tokens`"
            )
