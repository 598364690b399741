"""pass@k and verified@k of the models of an experiment, on the common evaluation's documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlpretrain.config import ConfigError, PretrainConfig
from rlpretrain.evaluation.answers import AnswerRule, evaluate_answers
from rlpretrain.evaluation.task_results import WAYS
from rlpretrain.experiments.evaluated_model import load_evaluated
from rlpretrain.experiments.experiment import CommonEvaluation, Job
from rlpretrain.experiments.held_out import read_held_out
from rlpretrain.objectives import load_objective
from rlpretrain.tracking.progress import bar
from rlpretrain.types import Document
from rlpretrain.verdict import Verifier, find_verifier

MOST_PARTS = 40


def check_answers(evaluation: CommonEvaluation) -> None:
    """Raise ConfigError for settings of `evaluation.pass_at` that cannot be used."""
    settings = evaluation.pass_at
    if settings is None:
        return
    if not evaluation.data.answer_column:
        raise ConfigError("evaluation.pass_at needs documents with answers: set data.answer_column there")
    if settings.answers is not None and settings.answers < max(settings.ks):
        raise ConfigError(
            f"evaluation.pass_at.answers is {settings.answers}: pass@{max(settings.ks)} needs that many"
        )
    for name in ("data", "search_data"):
        data = getattr(evaluation, name)
        if settings.by and data is not None and settings.by not in data.meta_columns:
            raise ConfigError(
                f"evaluation.pass_at.by is '{settings.by}', which is not kept beside the documents: name it "
                f"in evaluation.{name}.meta_columns"
            )
    _verifier(settings.verifier)


def check_parts(evaluation: CommonEvaluation, documents: Sequence[Document]) -> None:
    """Raise ConfigError if `pass_at.by` splits the documents into more parts than a table has columns for."""
    by = evaluation.pass_at.by if evaluation.pass_at else ""
    values = {str((document.meta or {})[by]) for document in documents} if by else set()
    if len(values) > MOST_PARTS:
        raise ConfigError(
            f"evaluation.pass_at.by: column {by} has {len(values)} different values in the held-out "
            f"documents; at most {MOST_PARTS} can be told apart"
        )


def sample_answers(job: Job, config: PretrainConfig, path: str) -> dict[str, Any]:
    """The record of the answers of the model at `path`: {"answers": numbers, "parts": values}.

    `config` has the common objective. The numbers are as `tasks.answer_tasks` returns them: each is the mean
    over documents of what `examples` has. `parts` has the documents' values of `pass_at.by`, in the order of
    the examples; it is missing without `by`.
    """
    evaluation = job.experiment.evaluation
    settings = evaluation.pass_at
    assert settings is not None, "the experiment asks for it"
    model, tokenizer = load_evaluated(job, config, path)
    objective = load_objective(config, tokenizer)
    documents = read_held_out(
        evaluation.data, tokenizer, limit=evaluation.documents, seed=evaluation.sample_seed
    )
    verifier = _verifier(settings.verifier)
    found: dict[str, Any] = {}
    parts: list[str] = []
    for way in WAYS if objective.has_positions else WAYS[:1]:
        with bar(f"sampling answers, {way} ({job.name}, seed {job.seed})") as progress:
            answers = evaluate_answers(
                model,
                objective,
                documents,
                thinking=way == "thinking",
                n=settings.answers or max(settings.ks),
                ks=settings.ks,
                seed=job.seed,
                max_answer_tokens=settings.tokens,
                rule=AnswerRule(settings.after, settings.until, settings.stop),
                verifier=verifier,
                progress=progress,
            )
        for name, values in answers.by_position().items():
            found[f"{name}, {way}"] = {"value": float(values.mean()), "examples": values.tolist()}
        if settings.by:
            parts = [str((document.meta or {})[settings.by]) for document in answers.documents]
    return {"answers": found} | ({"parts": parts} if settings.by else {})


def _verifier(name: str | None) -> Verifier | None:
    """The verifier; ConfigError if there is none of that name."""
    return find_verifier(name, "evaluation.pass_at.verifier") if name else None
