"""`rlpretrain eval --pass-at`: how often one of k sampled answers is right, directly and after a thought."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlpretrain.commands.arguments import count
from rlpretrain.config import ConfigError, ModelConfig, PretrainConfig

if TYPE_CHECKING:
    from rlpretrain.evaluation.answers import Answers

WAYS = {"direct": "direct", "thinking": "after a thought"}
"""The ways to answer, each with the heading of its column."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for pass@k."""
    group = parser.add_argument_group(
        "pass@k", "answers are sampled and compared with the true ones of --answer-column"
    )
    group.add_argument(
        "--pass-at", type=counts, metavar="K,...", help="every k of pass@k, for instance 1,4,8"
    )
    group.add_argument("--answers", type=count, help="answers per prompt; the largest k by default")
    group.add_argument("--answer-column", help="column with the answer to the prompt of --column")
    group.add_argument("--answer-join", help="text between prompt and answer; a line break by default")
    group.add_argument("--answer-tokens", type=count, help="longest answer; twice the longest true one")
    group.add_argument("--answer-stop", default="", help="text that ends an answer, beside the end of text")
    group.add_argument("--answer-after", default="", help="only what follows this text counts, as '####'")
    group.add_argument(
        "--verifier",
        metavar="MODULE:FUNCTION",
        help="judge thought and answer together, as objective verified does",
    )
    group.add_argument("--answer-until", default="", help="only what precedes this text counts, as '}'")


def counts(text: str) -> list[int]:
    """Whole numbers from 1 on, separated by commas."""
    return [count(number.strip()) for number in text.split(",")]


def evaluate_pass_at(
    args: argparse.Namespace, config: PretrainConfig, base_model: ModelConfig | None
) -> dict[str, Any]:
    """Sample and judge answers, print the table, and return all numbers for the JSON file.

    `base_model` is the untouched base, whose numbers are shown beside.
    """
    from rlpretrain.tracking.tables import show

    if not config.data.answer_column:
        raise ConfigError("--pass-at needs documents with answers: set --answer-column")
    # The base first, in case that it cannot be loaded.
    base = _answers_of(args, replace(config, model=base_model)) if base_model else {}
    mine = _answers_of(args, config)
    show(table(mine, base))
    found = numbers(mine, base) | {"base": base_model and base_model.path}
    if args.by:
        parts = by_column(mine, args.by)
        show(by_table(parts, args.by))
        found["by"] = {value: numbers(part, {}) for value, part in parts.items()}
    return {"pass_at": found}


def by_column(found: dict[str, Answers], column: str) -> dict[str, dict[str, Answers]]:
    """The answers of each value of a column, in the order in which the values first occur."""
    any_answers = next(iter(found.values()))
    values = [str((document.meta or {}).get(column)) for document in any_answers.documents]
    parts = {}
    for value in dict.fromkeys(values):
        keep = [other == value for other in values]
        parts[value] = {way: answers.where(keep) for way, answers in found.items()}
    return parts


def by_table(parts: dict[str, dict[str, Answers]], column: str) -> Any:
    """A row for each value of a column, with every number of each way to answer."""
    from rich.table import Table

    rows = {}
    for value, part in parts.items():
        cells = {"prompts": str(len(next(iter(part.values())).documents))}
        for way, answers in part.items():
            numbers_of_way = answers.summary()
            shares = [name for name in numbers_of_way if f"{name}_ci" in numbers_of_way]
            cells |= {f"{name}, {WAYS[way]}": f"{numbers_of_way[name]:.3f}" for name in shares}
        rows[value] = cells
    shown = Table(column, *next(iter(rows.values())), title=f"by {column}")
    for value, cells in rows.items():
        shown.add_row(value, *cells.values())
    return shown


def numbers(mine: dict[str, Answers], base: dict[str, Answers]) -> dict[str, Any]:
    """All numbers of the model and its base, and their paired differences."""
    out: dict[str, Any] = {way: answers.summary() for way, answers in mine.items()}
    out |= {f"base {way}": answers.summary() for way, answers in base.items()}
    for name, (after, before) in _pairs(mine, base).items():
        out[name] = {f"pass@{k}": after.minus(before, k) for k in after.ks}
    return out


def table(mine: dict[str, Answers], base: dict[str, Answers]) -> Any:
    """The table: a row for each k, and columns as in `numbers`."""
    from rich.table import Table

    summaries = {WAYS[way]: answers.summary() for way, answers in mine.items()}
    summaries |= {f"base: {WAYS[way]}": answers.summary() for way, answers in base.items()}
    pairs = _pairs(mine, base)
    any_answers = mine["direct"]
    title = (
        f"{len(any_answers.documents)} prompts, {any_answers.correct.shape[1]} answers each; 95% intervals"
    )
    shown = Table("", *summaries, *pairs, title=title)
    for k in any_answers.ks:
        name = f"pass@{k}"
        cells = [_cell([found[name], *found[f"{name}_ci"]], "") for found in summaries.values()]
        cells += [_cell(after.minus(before, k), "+") for after, before in pairs.values()]
        shown.add_row(name, *cells)
    for name in _verdict_names(summaries.values()):
        cells = [
            _cell([found[name], *found[f"{name}_ci"]], "") if name in found else ""
            for found in summaries.values()
        ]
        shown.add_row(name, *cells)
    for name in ("unfinished", "unclosed", "length"):
        shown.add_row(name, *(f"{found[name]:.2f}" if name in found else "" for found in summaries.values()))
    return shown


def _verdict_names(summaries: Iterable[dict[str, Any]]) -> list[str]:
    """The numbers of a verifier, if there was one."""
    names = dict.fromkeys(name for found in summaries for name in found)
    return [name for name in names if f"{name}_ci" in names and not name.startswith("pass@")]


def _pairs(mine: dict[str, Answers], base: dict[str, Answers]) -> dict[str, tuple[Answers, Answers]]:
    """What is compared position by position."""
    pairs = {}
    if "thinking" in mine:
        pairs["thinking - direct"] = (mine["thinking"], mine["direct"])
    return pairs | {f"{way} - base": (mine[way], base[way]) for way in base if way in mine}


def _answers_of(args: argparse.Namespace, config: PretrainConfig) -> dict[str, Answers]:
    """The answers of one model, by way."""
    from rich.progress import MofNCompleteColumn, Progress

    from rlpretrain import models
    from rlpretrain.data.stream import read_all
    from rlpretrain.evaluation.answers import AnswerRule, evaluate_answers
    from rlpretrain.objectives import delimiters, load_objective
    from rlpretrain.ranks import join
    from rlpretrain.verdict import find_verifier

    verifier = find_verifier(args.verifier, "--verifier") if args.verifier else None
    tags = delimiters(config.objective)
    model, tokenizer, _ = models.load_with_tokenizer(config.model, tags, config.seed)
    model = model.to(join(args.device).device)
    objective = load_objective(config, tokenizer)
    documents = read_all(config.data, tokenizer, limit=args.documents, seed=config.seed)
    found = {}
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as bar:
        for way in WAYS if objective.has_positions else ("direct",):
            line = bar.add_task(f"{config.model.path}: answers {WAYS[way]}", total=None)
            found[way] = evaluate_answers(
                model,
                objective,
                documents,
                thinking=way == "thinking",
                n=args.answers or max(args.pass_at),
                ks=args.pass_at,
                seed=config.seed,
                max_answer_tokens=args.answer_tokens,
                rule=AnswerRule(args.answer_after, args.answer_until, args.answer_stop),
                verifier=verifier,
                progress=lambda done, total, line=line: bar.update(line, completed=done, total=total),
            )
    return found


def _cell(values: Sequence[float], sign: str) -> str:
    mean, *ends = values
    text = f"{mean:{sign}.3f}"
    return text if math.isnan(ends[0]) else f"{text} [{ends[0]:.3f}, {ends[1]:.3f}]"
