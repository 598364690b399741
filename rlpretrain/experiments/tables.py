"""The tables of `rlpretrain compare`, as rich tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlpretrain.experiments.answer_parts import Parts, numbers_shown
from rlpretrain.experiments.results import HEADINGS
from rlpretrain.experiments.search import describe_values


def table(results: dict[str, Any]) -> Any:
    """Every method with its own number, the common numbers and what it cost (with its earlier stages)."""
    from rich.table import Table

    title = (
        f"{results['documents']} held-out documents of {results['source_rows']} rows, "
        f"seeds {results['seeds']}; 95% intervals over rows and seeds"
    )
    columns = ("", "its own number", "base", "after", *HEADINGS.values(), "tokens", "TFLOP")
    methods = Table(*columns, title=title)
    for name, row in results["methods"].items():
        own_cells = ("", "", "")
        if own := row.get("own"):
            own_cells = (own["number"], cell(own["before"]), cell(own["after"]))
        cost_cells = ("", "")
        if spent := row.get("spent"):
            total = spent.get("flops_with_stages")
            flops = f"{spent['flops'] / 1e12:.2f}" + (f" ({total / 1e12:.2f})" if total else "")
            cost_cells = (f"{spent['input_tokens'] / 1e6:.3f} M", flops)
        numbers = [cell(row.get(number)) for number in HEADINGS]
        methods.add_row(name, *own_cells, *numbers, *cost_cells)
    return methods


def differences(results: dict[str, Any]) -> Any:
    """Paired differences of each method from the base model, the first method and those it is against."""
    from rich.table import Table

    title = "at the same rows, with the same seeds; 95% intervals"
    pairs = Table("paired differences", *HEADINGS.values(), title=title)
    for pair in results["shown_differences"]:
        row = results["differences"][pair]
        pairs.add_row(pair, *(cell(row.get(number)) for number in HEADINGS))
    return pairs


def searches(results: dict[str, Any]) -> Any:
    """What each search tried on its own documents, and what it chose; None if no method searched."""
    from rich.table import Table

    rows = {name: row["search"] for name, row in results["methods"].items() if "search" in row}
    if not rows:
        return None
    shown = Table("search", "by", "values", "score", "", title="chosen on evaluation.search_data")
    for name, search in rows.items():
        for trial in search["tried"]:
            mark = "chosen" if trial["values"] == search["chosen"] else ""
            shown.add_row(name, search["by"], describe_values(trial["values"]), f"{trial['score']:.3f}", mark)
    return shown


def logged(results: dict[str, Any]) -> Any:
    """What the runs measured themselves at their last evaluation; None if they did not."""
    from rich.table import Table

    rows = {name: row["logged"] for name, row in results["methods"].items() if "logged" in row}
    if not rows:
        return None
    numbers = list(dict.fromkeys(number for row in rows.values() for number in row))
    shown = Table("eval.data", *numbers, title="logged at the end of the runs; 95% intervals over seeds")
    for name, row in rows.items():
        shown.add_row(name, *(cell(row[number][:3] if number in row else None) for number in numbers))
    return shown


def tasks(results: dict[str, Any]) -> Any:
    """The numbers on lm-eval's tasks, and pass@k: a row for each model and each paired difference."""
    from rich.table import Table

    numbers = results["tasks"]
    columns = next(iter(numbers.values()))
    shown = Table("tasks", *columns, title="answers; 95% intervals over examples and seeds")
    for name, row in numbers.items():
        shown.add_row(name, *(cell(row[column]) for column in columns))
    return shown


def part_tables(parts: Parts, models: Sequence[str]) -> list[Any]:
    """A rich table for each number that `numbers_shown` names: a row a model, a column a part."""
    from rich.table import Table

    tables = []
    for number in numbers_shown(parts):
        table = Table(number, *parts, title="95% intervals over documents and seeds")
        for name in models:
            table.add_row(name, *(cell(numbers[name][number]) for numbers in parts.values()))
        tables.append(table)
    return tables


def cell(values: Sequence[float | None] | None) -> str:
    """Mean and interval; empty where there is no mean."""
    if values is None or values[0] is None:
        return ""
    mean, *ends = values
    return f"{mean:.2f}" if None in ends else f"{mean:.2f} [{ends[0]:.2f}, {ends[1]:.2f}]"
