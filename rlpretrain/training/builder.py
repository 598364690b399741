"""Build the parts of a run from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlpretrain import models
from rlpretrain.config import PretrainConfig
from rlpretrain.data.document_source import SourceInputs
from rlpretrain.data.fingerprints import fingerprint
from rlpretrain.data.stream import open_source
from rlpretrain.evaluation.evaluate import held_out
from rlpretrain.evaluation.harness import Tasks, load_tasks
from rlpretrain.models import adapters, lengths
from rlpretrain.models.compilation import compile_layers
from rlpretrain.models.routers import experts_per_token
from rlpretrain.objectives import Objective, delimiters, load_objective, parse_section
from rlpretrain.prompts import AddedTokens, table_size
from rlpretrain.ranks import Ranks, join
from rlpretrain.rollouts.batches import BatchSource
from rlpretrain.rollouts.drawing import inspect_documents
from rlpretrain.rollouts.engines import SyncProbe, make_engine, write_start
from rlpretrain.rollouts.replay import ReplaySource, rollouts_in
from rlpretrain.scoring import attention
from rlpretrain.scoring.checks import check_model
from rlpretrain.scoring.packing import Layout
from rlpretrain.scoring.reference_model import check_vocabulary, load_reference
from rlpretrain.scoring.references import Baseline, Frozen, Reference, make_reference, make_references
from rlpretrain.scoring.target_baseline import TargetBaseline
from rlpretrain.tracking.peaks import find_peak
from rlpretrain.training import checkpoint, outputs
from rlpretrain.training.averaging import WeightAverage, check_average
from rlpretrain.training.backends import Policy, make_policy
from rlpretrain.training.learner import PolicyLearner, make_learner
from rlpretrain.training.mixing import OnlineMixing, make_mixing
from rlpretrain.training.planning import check_reference, check_settings, count_steps, documents_repeat
from rlpretrain.types import Document
from rollout.store import Recorded, Store
from rollout.types import WeightSource


@dataclass(kw_only=True, eq=False)
class Parts:
    """The parts of a run before its first step; `build_parts` constructs them."""

    config: PretrainConfig
    ranks: Ranks
    folder: Path
    resumed_from: Path | None
    """The checkpoint that the run resumes from."""

    delimiters: AddedTokens | None
    added: list[str]
    """The tokens of `delimiters` that the tokenizer lacked."""
    tokenizer: Any
    objective: Objective
    held_out: list[Document] | None
    tasks: Tasks | None
    """The benchmarks of `eval.tasks`."""
    dropped: int
    """Documents that were left out as too short."""
    total_steps: int

    frozen: Frozen | None
    """The initial model, where something is measured against it."""
    reference: Reference | None
    """Log-probs of trunk and thoughts under the reference model, where the objective needs them."""
    baseline: Baseline
    target_baseline: TargetBaseline | None
    """Log-probs of the targets under the baseline's model, where the objective needs them."""
    policy: Policy
    average: WeightAverage | None
    engine_weights: WeightSource
    """What the engine gets at a sync: the weights, or the adapter."""
    engine: Any
    probe: SyncProbe | None
    """Checks after each sync that an engine with its own copy has the policy's weights."""
    source: BatchSource | ReplaySource
    mixing: OnlineMixing | None
    """Sets the weights of the sources by their losses."""
    store: Store | None
    layout: Layout
    learner: PolicyLearner | None
    """The trained model, where the objective needs it."""
    padded_because: str | None
    """Why rows are padded where trees were asked for."""
    half: bool
    """Whether log-probs are computed in half precision."""
    parameters: int
    peak: float | None
    """The most operations a second of a rank's device, for perf/mfu; None where it is not known."""


def build_parts(config: PretrainConfig, resume: str | bool | None) -> Parts:
    """Check the configuration, load the model and construct everything that the steps of a run need.

    Raises ConfigError for settings that cannot work together, for data or models that cannot be used, and for
    a folder that holds another run.
    """
    ranks, folder = join(config.device), Path(config.output_dir)
    owner, _ = parse_section(config.objective)
    check_settings(config, owner, ranks.size)
    outputs.check(config)
    resumed_from = checkpoint.open_folder(folder, resume, ranks)
    if config.threads:
        torch.set_num_threads(config.threads)
    tasks = load_tasks(config.eval.tasks, config.eval.include_path) if config.eval.tasks else None
    tags = delimiters(config.objective)
    if config.reference.path:
        check_vocabulary(config, tags)
    model, tokenizer, added = models.load_with_tokenizer(config.model, tags, config.seed)
    check_model(model.to(ranks.device))
    padded_because = attention.install(model) if config.packing == "tree" else None  # while weights are whole
    experts = experts_per_token(model) if config.loss.router_coef else None
    if ranks.first:
        models.try_saving(model, tokenizer, config.model)
    objective = load_objective(config, tokenizer)
    check_reference(config, objective)
    place: dict[str, Any] = {"rank": ranks.rank, "world_size": ranks.size, "seed": config.seed}
    replayed = None
    if config.replay:
        stored = Store(rollouts_in(config.replay), ranks.rank)
        replayed = ReplaySource(stored, config.max_steps, fingerprint(tokenizer))
    stream = None
    if replayed is None:
        inputs = SourceInputs(
            config=config.data,
            tokenizer=tokenizer,
            min_length=objective.min_length,
            per_step=config.positions_per_step,
            thinks=objective.has_positions,
            **place,
        )
        stream = open_source(inputs)
        inspect_documents(objective, inputs)
    documents = held_out(config, tokenizer, objective, ranks.size)
    others = None
    if config.ntp_data:
        others = open_source(SourceInputs(config=config.ntp_data, tokenizer=tokenizer, **place), "ntp_data")
    lengths.check_run(model, objective, stream, others, documents)
    second = load_reference(config, tags, model, ranks.device) if config.reference.path else None
    if second is not None:
        lengths.check_run(second, objective, stream, others, documents, of="reference.path: ")
    total_steps = count_steps(config, objective, stream, replayed)
    check_average(config.average, total_steps)

    start = write_start(config, model, tokenizer, ranks, changed=bool(added) or config.model.from_scratch)
    scores_or_teaches = bool({"reference", "teacher"} & objective.needs)
    needs_initial = (scores_or_teaches and second is None) or "initial" in objective.needs
    measures_frozen = owner.has_positions and bool(config.baseline.frozen_every or documents)
    repeats = documents_repeat(config, objective, stream, total_steps)
    frozen, baseline = make_references(config, model, measures_frozen or needs_initial, repeats, ranks)
    lora = config.policy.lora
    if lora:
        adapters.add_lora(model, lora, tokenizer.convert_tokens_to_ids(added) if lora.new_tokens else ())
    policy = make_policy(
        model,
        config.policy,
        config.optim,
        total_steps,
        ranks,
        config.sampling.temperature,
        config.loss.inner_epochs,
    )
    policy.scorer.experts = experts
    scores_again = repeats or config.loss.inner_epochs > 1 or "batch" in objective.needs
    reference = make_reference(config, objective.needs, frozen, second, policy, scores_again)
    if replayed is not None:
        engine, source = Recorded(replayed.facts), replayed
    else:
        shares = policy.shares_weights
        engine = make_engine(config, model, tokenizer, objective, ranks, shares=shares, start=start)
        assert stream is not None, "only a replay has no documents of its own"
        source = BatchSource(
            objective,
            stream,
            engine,
            policy,
            seed=config.seed,
            rank=ranks.rank,
            size=ranks.size,
            ntp_stream=others,
            token_budget=config.token_budget,
            in_flight=config.engine.in_flight,
            steps=total_steps,
        )
    probed = engine.info.needs_probe
    if reference is not None and config.packing == "tree" and padded_because is None:
        padded_because = attention.install(reference.frozen.model)
        if reference.initial is not None:
            attention.install(reference.initial.frozen.model)
    layout = _layout(
        config, objective, tokenizer, frozen, tree=config.packing == "tree" and padded_because is None
    )
    target_baseline = None
    if "target_baseline" in objective.needs:
        if layout.tree and isinstance(baseline, Frozen):
            attention.install(baseline.model)
        autocast = getattr(policy, "autocast", False)
        target_baseline = TargetBaseline(baseline, objective, layout, autocast=autocast)
    if config.model.compile:
        scorers = (frozen, baseline, reference and reference.frozen)
        scored = [model, *(scorer.model for scorer in scorers if isinstance(scorer, Frozen))]
        for each in {id(m): m for m in scored}.values():
            compile_layers(each)
    return Parts(
        config=config,
        ranks=ranks,
        folder=folder,
        resumed_from=resumed_from,
        delimiters=tags,
        added=added,
        tokenizer=tokenizer,
        objective=objective,
        held_out=documents,
        tasks=tasks,
        dropped=stream.dropped if stream is not None else 0,
        total_steps=total_steps,
        frozen=frozen,
        reference=reference,
        baseline=baseline,
        target_baseline=target_baseline,
        policy=policy,
        average=WeightAverage(config.average, policy) if config.average else None,
        engine_weights=policy.adapter if lora and lora.sync == "adapter" else policy.weights,
        engine=engine,
        probe=SyncProbe(config, engine, policy, table_size(tokenizer)) if probed else None,
        source=source,
        mixing=make_mixing(config, stream, total_steps),
        store=Store(folder / "rollouts", ranks.rank) if config.save_rollouts else None,
        layout=layout,
        learner=make_learner(objective, policy, layout, config.seed),
        padded_because=padded_because,
        half=config.model.dtype != "float32" or config.policy.autocast != "none",
        parameters=models.count_parameters(policy.model),
        peak=find_peak(ranks.device, config.peak_flops),
    )


def _layout(
    config: PretrainConfig, objective: Objective, tokenizer: Any, frozen: Frozen | None, tree: bool
) -> Layout:
    """How micro-batches are laid out."""
    sampling = config.sampling
    return Layout(
        config.token_budget,
        sampling.cut,
        sampling.cut_penalty,
        objective.setting.reduction,
        tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        tree,
        "target" in objective.needs,
        whole_arms=bool(frozen and frozen.keep),
    )
