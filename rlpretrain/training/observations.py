"""Numbers of a step for the log: means over its micro-batches, and the tokens and operations it spent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from rlpretrain import models
from rlpretrain.models.spending import Reads, Size, size_of
from rlpretrain.scoring.references import Frozen
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
    if run.frozen is None or not run.measures_frozen():
        return
    frozen = scores.baseline_logps if run.frozen is run.baseline else run.frozen.logps(micro)
    joint_baseline = (frozen * micro.target_mask).sum(-1)
    joint_target = (scores.target_logps.detach() * micro.target_mask[:, None]).sum(-1)
    if micro.target_mask.any():
        run.metrics.add("ig/frozen", (joint_target - joint_baseline[:, None])[micro.counted])


def account(run: Run, batch: Batch) -> None:
    """Add the tokens and floating-point operations of a step to the run's totals. All ranks call it."""
    readers: list[tuple[Any, Reads]] = [
        (run.policy.model, run.policy.scorer.reads),
        (run.policy.model, run.source.reads),
    ]
    frozen_models = {id(b): b for b in (run.frozen, run.baseline) if isinstance(b, Frozen)}
    readers += [(b.model, b.scorer.reads) for b in frozen_models.values()]
    if run.objective.proxy is not None:
        readers.append((run.objective.proxy.model, run.objective.proxy.reads))
    documents = float(sum(len(document.token_ids) for document in batch.documents))
    tokens = operations = 0.0
    for model, reads in readers:
        taken = reads.take()
        tokens += taken.tokens + taken.trained_tokens
        operations += _size_of(run, model).operations(taken)
    run.spent.add(*run.ranks.sum([documents, tokens, operations]))


def _size_of(run: Run, model: Any) -> Size:
    """The size of a model, computed once."""
    if id(model) not in run.sizes:
        run.sizes[id(model)] = size_of(model, models.count_parameters(model))
    return run.sizes[id(model)]
