"""The configuration of a run: one dataclass per owner, the same names in YAML, on the command line and in
Python.

Defaults are what held in our own experiments (NOTES.md). `recipe: paper` sets the values of the RLP paper
(arXiv 2510.01265, table of hyper-parameters) wherever the user has not set them. "Our choice" marks what the
paper leaves open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field as _field
from dataclasses import is_dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from rlpretrain.config.base import STRICT, Amount, ConfigError, Count, PathText, Seed, Whole, headed
from rlpretrain.config.engines import EngineConfig, SamplingConfig
from rlpretrain.config.inputs import DataConfig, ModelConfig


@dataclass(config=STRICT, kw_only=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) instead of all weights. No dropout: sampled and trained
    log-probs must agree.
    """

    r: Count = 16
    """Rank."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The adapter is scaled by alpha / r."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Layers that get one: all-linear (all but the output head), or the ends of their names (q_proj,
    v_proj, ...).
    """
    use_dora: bool = False
    """Train the length of each weight column beside its direction (DoRA, arXiv 2402.09353)."""
    new_tokens: bool = True
    """Train the embeddings of thought delimiters that the tokenizer lacked."""
    sync: Literal["merged", "adapter"] = "merged"
    """What the engine gets: whole weights with the adapters merged in, or the adapters alone (vllm_local)."""


@dataclass(config=STRICT, kw_only=True)
class PolicyConfig:
    """How the model is trained."""

    backend: str = "auto"
    """auto (DeepSpeed where it is installed, else torch), torch, deepspeed, or package.module:Class, a policy
    of your own (rlpretrain/training/backends/base.py).
    """
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage."""
    deepspeed_config: PathText | None = None
    """A DeepSpeed JSON file; its values hold, except those that this library must own (batch sizes,
    accumulation).
    """
    lora: LoraConfig | None = None
    """Train adapters, not all weights; `{}` takes the defaults."""
    autocast: Literal["none", "bfloat16"] = "none"
    """Run the forward in bfloat16 over float32 weights (torch backend)."""


@dataclass(config=STRICT, kw_only=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: str = "adamw"
    """adamw, or package.module:factory, a function of (parameter groups, these settings) that gives a
    torch optimizer.
    """
    lr: Amount = 1e-6
    """Peak learning rate."""
    schedule: str = "constant"
    """Shape after warm-up: constant, cosine, linear (these two end at `min_lr_ratio` of the peak), or
    package.module:function of (step, number of steps, these settings), which gives the factor on `lr`.
    """
    min_lr_ratio: Amount = 0.0
    """Final learning rate over the peak."""
    warmup_steps: Whole = 10
    """Steps of linear warm-up; like `max_steps` they are steps of the run, each of `loss.inner_epochs`
    optimizer steps.
    """
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's. Our choice: the paper gives none for RLP."""
    weight_decay: Amount = 0.0
    """AdamW's, on matrices only."""
    clip_grad_norm: Amount = 1.0
    """Largest global gradient norm; 0 switches clipping off."""


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
    """Weight of -log p(target | context, thought), which keeps the reader honest. Not in the paper (0
    there).
    """
    reduction: Literal["auto", "thought_mean", "token_mean", "sum"] = "auto"
    """thought_mean: mean over a thought's tokens, then over thoughts (RLP). token_mean: mean over all thought
    tokens. sum: sum over a thought's tokens, then the mean over thoughts, which is the policy gradient
    itself. auto: what the objective's paper has: sum for `likelihood` with `direct: 1` (VeriFree, JEPO), else
    thought_mean.
    """
    importance_cap: Amount = 2.0
    """Truncation of exp(old - behaviour) for thoughts that another engine or an older policy sampled."""
    terms: Annotated[tuple[str, ...], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)] = ()
    """The terms of the loss: next_token, surrogate, direct, or package.module:Class, a subclass of
    training.losses.Loss. By default those of the objective, which are all three.
    """
    inner_epochs: Count = 1
    """Optimizer steps on one batch; advantages and old log-probs are frozen at the first. The schedule
    spans them all.
    """


@dataclass(config=STRICT, kw_only=True)
class BaselineConfig:
    """What log p(target | context) is measured against. Equal for all thoughts of a position, it cancels
    in RLP's advantage.
    """

    name: Literal["none", "self", "frozen", "ema"] = "self"
    """none: 0. self: the current model without a thought. frozen: the initial model. ema: its moving
    average (the paper).
    """
    decay: Annotated[float, Field(ge=0, le=1)] = 0.999
    """EMA decay per optimizer step."""
    frozen_every: Whole = 10
    """Steps between measurements of the gain against the initial model (`ig/frozen`); 0: never. Under LoRA
    the initial model is the trained one with its adapters off, else it is a copy that 0 saves.
    """
    cache_tokens: Annotated[int, Field(ge=0)] = 2**24
    """Log-probs of `frozen` to keep where documents come again, 4 bytes each; 0: none."""


@dataclass(config=STRICT, kw_only=True)
class EvalConfig:
    """Evaluation during training."""

    data: PathText | None = None
    """Held-out documents; none, no evaluation."""
    every: Whole = 100
    """Steps between evaluations; one more at the end. 0: only at the end."""
    documents: Count = 64
    """How many held-out documents."""
    thoughts: Count = 4
    """Sampled thoughts per position."""


@dataclass(config=STRICT, kw_only=True)
class CheckpointConfig:
    """What is kept on disk."""

    every: Whole = 100
    """Steps between checkpoints; one more at the end. 0: none, only the final model at the end."""
    keep: Count = 3
    """Newest checkpoints kept; the best one is kept beside them."""


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
    """Nats that the no-think loss may rise above the start."""
    nonfinite: Count = 5
    """Skipped steps in a row (NaN or inf) after which the run stops."""
    input_tokens: Count | None = None
    """Tokens of documents after which the run ends, the step that reaches them included."""
    flops: Annotated[float, Field(gt=0)] | None = None
    """Floating-point operations (`num_flops`) after which it ends."""


@dataclass(config=STRICT, kw_only=True)
class PretrainConfig:
    """A whole run. `model` and `data` may be given as plain strings, `objective` as a name."""

    model: Annotated[ModelConfig, headed("path")]
    """The base checkpoint."""
    data: Annotated[DataConfig, headed("path")]
    """The documents."""
    objective: Annotated[dict[str, Any], headed("name")] = _field(default_factory=lambda: {"name": "rlp"})
    """`name` (a module of rlpretrain.objectives, or package.module:Class) and that objective's own fields."""
    sampling: SamplingConfig = _field(default_factory=SamplingConfig)
    """How thoughts are drawn."""
    engine: Annotated[EngineConfig, headed("name")] = _field(default_factory=EngineConfig)
    """What samples them."""
    policy: PolicyConfig = _field(default_factory=PolicyConfig)
    """How the model is trained."""
    optim: OptimConfig = _field(default_factory=OptimConfig)
    """The optimizer and its schedule."""
    loss: LossConfig = _field(default_factory=LossConfig)
    """The terms of the loss."""
    baseline: Annotated[BaselineConfig, headed("name")] = _field(default_factory=BaselineConfig)
    """The no-think arm."""
    eval: EvalConfig = _field(default_factory=EvalConfig)
    """Evaluation during training."""
    checkpoint: CheckpointConfig = _field(default_factory=CheckpointConfig)
    """What is kept on disk."""
    stop: StopConfig = _field(default_factory=StopConfig)
    """When to stop before the end."""
    ntp_data: Annotated[DataConfig | None, headed("path")] = None
    """Other documents for the next-token loss; by default it is computed on the documents of the groups."""
    recipe: Literal["default", "paper"] = "default"
    """paper: T .7, EMA .999, ntp_coef and reader_coef 0, G 16, lr 1e-6, for objective rlp the paper's kind of
    prompt (`objective.template: rlp`), wherever not set.
    """
    positions_per_step: Count = 512
    """Positions (groups) per optimizer step, over all ranks. For an objective without positions: documents
    per step.
    """
    token_budget: Count = 16384
    """Tokens per micro-batch, padding included. Thoughts of a larger group are scored first, then trained,
    part by part.
    """
    packing: Literal["tree", "padded"] = "tree"
    """tree: what contexts share goes through the model once (models that cannot, run padded, and the run
    says why).
    """
    max_steps: Count | None = None
    """Steps, each a batch and `loss.inner_epochs` optimizer steps on it; or give `epochs`."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the data, where `max_steps` is not given."""
    output_dir: PathText = "runs/rlp"
    """Folder of the run."""
    seed: Seed = 0
    """Decides everything random."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: Count | None = None
    """torch threads; the machine's choice by default."""
    report_to: Annotated[
        tuple[Literal["tensorboard", "wandb", "trackio"], ...],
        BeforeValidator(lambda v: [v] if isinstance(v, str) else v),
    ] = ()
    """Trackers beside the console and metrics.jsonl; five times a run they get some thoughts too, as a
    table.
    """
    log_every: Count = 1
    """Steps between console lines."""
    console: bool = True
    """Progress bar and thought tables on the console."""
    save_rollouts: bool = False
    """Keep every step's groups and documents as parquet under output_dir/rollouts."""
    replay: PathText | None = None
    """Folder of a run that kept its rollouts, or of these alone: they are trained on, nothing is sampled.
    `max_steps` is at most the number of steps it holds.
    """
    push_to_hub: str | None = None
    """Hub id for the final model."""

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, given: Any) -> Any:
        """`recipe: paper` under what the user set; one epoch where neither steps nor epochs are given."""
        values = dict(given if isinstance(given, Mapping) else given.kwargs or {})
        if values.get("recipe") == "paper":
            values = _under(values, PAPER_RECIPE)
            objective = values.get("objective", "rlp")
            objective = {"name": objective} if isinstance(objective, str) else dict(objective)
            if objective.get("name", "rlp") == "rlp":
                values["objective"] = {"template": "rlp"} | objective
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
"""arXiv 2510.01265v2, hyper-parameters: what `recipe: paper` sets where the user did not."""


def _under(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`defaults` wherever `values` says nothing."""
    merged = dict(defaults) | dict(values)
    for key, below in defaults.items():
        given = values.get(key)
        if is_dataclass(given):
            raise ConfigError(
                f"recipe: paper needs '{key}' as plain values, not a {type(given).__name__}: what is set "
                "would be unknown"
            )
        given = {"name": given} if isinstance(given, str) else given
        if isinstance(below, Mapping) and isinstance(given, Mapping):
            merged[key] = _under(given, below)
    return merged
