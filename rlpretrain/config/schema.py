"""The configuration of a run: one dataclass per owner, with the same names in YAML, CLI and Python.

Defaults are what held in our own experiments (NOTES.md). `recipe: paper` sets the values of the RLP paper
(arXiv 2510.01265, table of hyper-parameters) wherever the user has not set them. "Our choice" marks what the
paper leaves open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field as _field
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from rlpretrain.config.base import (
    STRICT,
    Amount,
    ConfigError,
    Count,
    PathText,
    Seed,
    Whole,
    as_fields,
    as_text,
    headed,
)
from rlpretrain.config.data import DataConfig
from rlpretrain.config.engines import EngineConfig, EngineSection
from rlpretrain.config.model import ModelConfig, ReferenceConfig
from rlpretrain.config.optim import AverageConfig, OptimConfig
from rlpretrain.config.policy import PolicyConfig
from rlpretrain.config.sampling import SamplingConfig


@dataclass(config=STRICT, kw_only=True)
class LossConfig:
    """The terms of the loss."""

    clip_low: Amount = 0.2
    """Ratio clipped below at 1 - clip_low. Our choice: the paper gives no value."""
    clip_high: Amount = 0.28
    """Ratio clipped above at 1 + clip_high. Our choice: the paper gives no value."""
    policy_coef: float = 1.0
    """Weight of the clipped surrogate; 0 leaves only next-token and reader terms (a control)."""
    ntp_coef: float = 0.3
    """Weight of the interleaved next-token loss on the documents. 0 in the paper."""
    reader_coef: float = 0.1
    """Weight of -log p(target | context, thought), which keeps the reader calibrated. 0 in the paper."""
    router_coef: Amount = 0.0
    """Weight of the loss that keeps the experts of a mixture evenly used (Switch, arXiv 2101.03961), over the
    tokens of documents and thoughts. A checkpoint's own is `router_aux_loss_coef` in its config.json.
    """
    reduction: Literal["auto", "thought_mean", "token_mean", "sum"] = "auto"
    """thought_mean: mean over a thought's tokens, then over thoughts (RLP).
    token_mean: mean over all thought tokens.
    sum: sum over a thought's tokens, then mean over thoughts, which is the policy gradient itself.
    auto: the paper's: sum for `likelihood` and `latro` with `direct: 1`, and for `sip`; else thought_mean.
    """
    importance_cap: Amount = 2.0
    """Upper limit of exp(old - behaviour) for thoughts that another engine or an older policy sampled."""
    terms: Annotated[tuple[str, ...], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)] = ()
    """The terms of the loss: next_token, surrogate, direct, or package.module:Class.
    A class is a subclass of training.losses.Loss. By default the objective's terms, which are all three.
    `router_coef` adds another.
    """
    inner_epochs: Count = 1
    """Optimizer steps on one batch, with the advantages and old log-probs of the first."""


@dataclass(config=STRICT, kw_only=True)
class BaselineConfig:
    """The no-think log-prob that is subtracted from log p(target | context, thought).

    It is the same for all thoughts of a position, so it cancels in RLP's advantage.
    """

    name: Literal["none", "self", "frozen", "ema"] = "self"
    """none: 0. self: the current model without a thought. frozen: the initial model.
    ema: a moving average of the current model (the paper).
    """
    decay: Annotated[float, Field(ge=0, le=1)] = 0.999
    """EMA decay per optimizer step."""
    frozen_every: Whole = 10
    """Steps between measurements of the gain against the initial model (`ig/frozen`); 0: never.
    The initial model is a copy in memory, which 0 avoids; under LoRA it is the model with its adapters off.
    """
    cache_tokens: Annotated[int, Field(ge=0)] = 2**24
    """Log-probs of `frozen` to cache when documents repeat, 4 bytes each; 0: none."""


@dataclass(config=STRICT, kw_only=True)
class TaskSettings:
    """Benchmarks through lm-eval."""

    tasks: Annotated[tuple[str, ...], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)] = ()
    """Tasks of lm-eval, or YAML files in its format, answered directly and after a thought."""
    include_path: PathText | None = None
    """Folder with YAML files of further tasks."""
    task_examples: Count | None = None
    """Examples of each task; all of them if not set."""
    task_batch: Count = 16
    """Rows of tasks that are scored at once. Four times as many thoughts are sampled at once."""


def _places(value: Any) -> Any:
    """Refuse what is neither a file nor files by name, in these words."""
    files = list(value.values()) if isinstance(value, Mapping) else [value]
    if value is None or all(isinstance(as_text(file), str) for file in files):
        return value
    raise PydanticCustomError("no_file", "expected a file, or {name of a source: file}")


@dataclass(config=STRICT, kw_only=True)
class EvalConfig(TaskSettings):
    """Evaluation during training."""

    data: Annotated[PathText | dict[str, PathText] | None, BeforeValidator(_places)] = None
    """Held-out documents; without them there is no evaluation but that of `tasks`. With `data.sources` also
    {name: file}: each file is read as its source is, and its numbers are logged as `eval/<name>/*` too.
    """
    every: Whole = 100
    """Steps between evaluations, with a further evaluation at the end. 0: only at the end."""
    documents: Count = 64
    """Number of held-out documents (of each file), the same random sample in every run."""
    positions: Count = 1
    """Positions per document, at most `objective.positions_per_document`."""
    thoughts: Count = 4
    """Sampled thoughts per position."""


@dataclass(config=STRICT, kw_only=True)
class CheckpointConfig:
    """What is kept on disk."""

    every: Whole = 100
    """Steps between checkpoints, with a further checkpoint at the end. 0: only the final model."""
    keep: Count = 3
    """Number of newest checkpoints to keep; the best checkpoint is kept too."""


@dataclass(config=STRICT, kw_only=True)
class StopConfig:
    """When to stop before the end."""

    collapse: bool = True
    """Stop when the collapse monitor fires, and return the best checkpoint."""
    patience: Whole = 0
    """Evaluations without a better gain before stopping; 0: never."""
    collapse_window: Count = 20
    """Steps over which the monitor averages."""
    collapse_no_think: float = 0.3
    """Nats by which the no-think loss may exceed its value at the start."""
    nonfinite: Count = 5
    """Skipped steps in a row (NaN or inf) after which the run stops."""
    input_tokens: Count | None = None
    """Tokens of documents after which the run ends; the step that reaches them is completed."""
    flops: Annotated[float, Field(gt=0)] | None = None
    """Floating-point operations (`num_flops`) after which the run ends."""


@dataclass(config=STRICT, kw_only=True)
class PretrainConfig:
    """A whole run. `model` and `data` can be plain strings, `objective` a name."""

    model: Annotated[ModelConfig, headed("path")]
    """The base checkpoint."""
    data: Annotated[DataConfig, headed("path")]
    """The documents."""
    objective: Annotated[dict[str, Any], headed("name")] = _field(default_factory=lambda: {"name": "rlp"})
    """`name` (a module of rlpretrain.objectives, or package.module:Class) and that objective's own fields."""
    sampling: SamplingConfig = _field(default_factory=SamplingConfig)
    """How thoughts are drawn."""
    engine: EngineSection = _field(default_factory=EngineConfig)
    """What samples them."""
    policy: PolicyConfig = _field(default_factory=PolicyConfig)
    """How the model is trained."""
    optim: OptimConfig = _field(default_factory=OptimConfig)
    """The optimizer and its schedule."""
    average: Annotated[AverageConfig | None, headed("kind")] = None
    """An average of the trained weights: evaluated beside them and saved as `output_dir`/averaged."""
    loss: LossConfig = _field(default_factory=LossConfig)
    """The terms of the loss."""
    baseline: Annotated[BaselineConfig, headed("name")] = _field(default_factory=BaselineConfig)
    """The no-think arm."""
    reference: Annotated[ReferenceConfig, headed("path")] = _field(default_factory=ReferenceConfig)
    """A second, frozen model, for objectives that need one."""
    eval: EvalConfig = _field(default_factory=EvalConfig)
    """Evaluation during training."""
    checkpoint: CheckpointConfig = _field(default_factory=CheckpointConfig)
    """What is kept on disk."""
    stop: StopConfig = _field(default_factory=StopConfig)
    """When to stop before the end."""
    ntp_data: Annotated[DataConfig | None, headed("path")] = None
    """A separate stream for the next-token loss; by default the documents of the groups are used."""
    recipe: Literal["default", "paper"] = "default"
    """paper: T .7, EMA .999, ntp_coef and reader_coef 0, G 16, lr 1e-6, wherever they are not set.
    For objective rlp it also sets the paper's kind of prompt (`objective.template: rlp`).
    """
    positions_per_step: Count = 512
    """Positions (groups) per optimizer step, over all ranks; documents, if the objective has no positions."""
    token_budget: Count = 16384
    """Tokens per micro-batch, padding included.
    A larger group is split: all of its parts are scored first, then trained.
    """
    packing: Literal["tree", "padded"] = "tree"
    """tree: tokens that contexts share go through the model once. padded: one row per thought.
    Models that do not support trees run padded, and the run says why.
    """
    max_steps: Count | None = None
    """Steps, each a batch and `loss.inner_epochs` optimizer steps on it; or give `epochs`."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the data, where `max_steps` is not given."""
    output_dir: PathText = "runs/rlp"
    """Folder of the run."""
    seed: Seed = 0
    """Seed of all random numbers."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    peak_flops: Annotated[float, Field(gt=0)] | None = None
    """Operations a second of one device in dense bfloat16, for `perf/mfu`; by default by the GPU's name."""
    threads: Count | None = None
    """Threads of torch; torch's own default if not set."""
    report_to: Annotated[
        tuple[Literal["tensorboard", "wandb", "trackio"], ...],
        BeforeValidator(lambda v: [v] if isinstance(v, str) else v),
    ] = ()
    """Trackers beside the console and metrics.jsonl; they also get five tables of thoughts in a run."""
    log_every: Count = 1
    """Steps between console lines."""
    console: bool = True
    """Progress bar and thought tables on the console."""
    save_rollouts: bool = False
    """Keep every step's groups and documents as parquet under output_dir/rollouts."""
    replay: PathText | None = None
    """Folder of a run or of its rollouts: train on the stored thoughts and sample nothing.
    `max_steps` is at most the number of stored steps.
    """
    push_to_hub: str | None = None
    """Hub id for the final model."""

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, given: Any) -> Any:
        """Apply `recipe: paper` where the user set nothing; one epoch if neither steps nor epochs are set."""
        values = as_fields(given)
        if values.get("recipe") == "paper" and not _is_copy(values):
            values = _under(values, PAPER_RECIPE)
            objective = values.get("objective", "rlp")
            objective = {"name": objective} if isinstance(objective, str) else objective
            if isinstance(objective, Mapping) and objective.get("name", "rlp") == "rlp":
                values["objective"] = {"template": "rlp", **objective}
        if values.get("max_steps") is None and values.get("epochs") is None:
            values["epochs"] = 1.0
        return values


PAPER_RECIPE: dict[str, Any] = {
    "sampling": {"thoughts": 16, "temperature": 0.7, "max_thought_tokens": 2048},
    "loss": {"ntp_coef": 0.0, "reader_coef": 0.0},
    "baseline": {"name": "ema", "decay": 0.999},
    "optim": {"lr": 1e-6, "schedule": "constant"},
    "positions_per_step": 512,
}
"""Hyper-parameters of arXiv 2510.01265v2, which `recipe: paper` sets where the user did not."""


def _is_copy(values: Mapping[str, Any]) -> bool:
    """Whether `dataclasses.replace` gave the values: all fields, whose sections were built before."""
    return values.keys() >= {each.name for each in fields(PretrainConfig)} and is_dataclass(values["loss"])


def _under(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, with `defaults` for the keys that it lacks."""
    merged = dict(defaults) | dict(values)
    for key, default in defaults.items():
        given = values.get(key)
        if is_dataclass(given):
            raise ConfigError(
                f"recipe: paper needs '{key}' as plain values, not a {type(given).__name__}, which does not "
                "say which of its fields were set"
            )
        given = {"name": given} if isinstance(given, str) else given
        if isinstance(default, Mapping) and isinstance(given, Mapping):
            merged[key] = _under(given, default)
    return merged
