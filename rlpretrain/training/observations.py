"""Numbers of a step for the log: means over its micro-batches, and the tokens and operations it spent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rlpretrain.models.spending import Reads, Size, size_of
from rlpretrain.objectives import Objective
from rlpretrain.scoring.references import Frozen
from rlpretrain.tracking.throughput import StepWork
from rlpretrain.training.losses import LossInputs, LossOutput
from rlpretrain.types import Batch

if TYPE_CHECKING:
    from rlpretrain.training.run import Run


def observe(run: Run, inputs: LossInputs, output: LossOutput, own: Tensor) -> None:
    """Collect the numbers of a micro-batch; `own` [B, T] are the policy's no-think log-probs."""
    scores, micro, epochs = inputs.scores, inputs.micro, run.config.loss.inner_epochs
    run.note(loss=output.loss.detach() / epochs)  # the mean over inner epochs
    for name, value in output.metrics.items():
        run.note(**{name: value / epochs if name.endswith("loss") else value})
    rewards = scores.counted.new_zeros(0) if inputs.thoughts is None else inputs.thoughts.rewards
    run.metrics.observe(micro, scores, rewards, own)
    weights, run.objective.weights_used = run.objective.weights_used, None
    is_own = getattr(run.objective.ntp_weights, "__func__", None) is not Objective.ntp_weights
    if micro.documents and is_own and weights is not None:
        run.metrics.add_weights(weights.detach(), scores.trunk_logps.detach())
    if run.frozen is None or not run.measures_frozen():
        return
    frozen = scores.baseline_logps if run.frozen is run.baseline else run.frozen.logps(micro)
    joint_baseline = (frozen * micro.target_mask).sum(-1)
    joint_target = (scores.target_logps.detach() * micro.target_mask[:, None]).sum(-1)
    if micro.target_mask.any():
        run.metrics.add("ig/frozen", (joint_target - joint_baseline[:, None])[micro.counted])


@dataclass(frozen=True, slots=True)
class _Reader:
    """A model, what it read in the step, and where: on this rank's device, and in training."""

    model: Any
    reads: Reads
    on_rank: bool = True
    in_training: bool = True


def account(run: Run, batch: Batch) -> None:
    """Add the tokens and operations of a step to the run's totals, and set `run.work`. All ranks call it."""
    policy, in_process = run.policy, run.config.engine.in_process
    readers = [
        _Reader(policy.model, policy.scorer.reads),
        _Reader(policy.model, run.early, in_training=False),
        _Reader(policy.model, run.source.reads, on_rank=in_process, in_training=False),
    ]
    scorers = (run.frozen, run.baseline, run.reference and run.reference.frozen)
    frozen_models = {id(b): b for b in scorers if isinstance(b, Frozen)}
    readers += [_Reader(b.model, b.scorer.reads) for b in frozen_models.values()]
    if run.objective.proxy is not None:
        readers.append(_Reader(run.objective.proxy.model, run.objective.proxy.reads, in_training=False))
    trained = policy.scorer.reads.trained_tokens
    tokens = operations = on_ranks = in_training = 0.0
    for reader in readers:
        taken = reader.reads.take()
        cost = _size_of(run, reader.model).operations(taken)
        tokens += taken.tokens + taken.trained_tokens
        operations += cost
        on_ranks += cost * reader.on_rank
        in_training += cost * reader.in_training
    documents = float(sum(len(document.token_ids) for document in batch.documents))
    documents, tokens, *work = run.ranks.sum([documents, tokens, trained, operations, on_ranks, in_training])
    run.work = StepWork(*work)
    run.spent.add(documents, tokens, run.work.operations)
    if run.reference and run.reference.cache:
        cached, asked = run.reference.take_counts()
        run.metrics.add("reference/cached_frac", cached / max(asked, 1), asked)


def _size_of(run: Run, model: Any) -> Size:
    """The size of a model, computed once."""
    if id(model) not in run.sizes:
        run.sizes[id(model)] = size_of(model)
    return run.sizes[id(model)]
