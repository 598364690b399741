"""Trainings and evaluations on the dial corpus, for the benchmarks that vary the demo's recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.demo import HERE
from examples.demo import numbers as demo_numbers
from rlpretrain import Pretrainer
from rlpretrain.config.io import build, read_mapping
from rlpretrain.data.stream import read_all
from rlpretrain.evaluation.evaluate import evaluate
from rlpretrain.experiments.compare import Measurements
from rlpretrain.experiments.experiment import overlay
from rlpretrain.models import load_model, load_tokenizer
from rlpretrain.objectives import load_objective


def train(recipe: str, *, model: Path, data: Path, output_dir: Path, **fields: Any) -> dict[str, Any]:
    """One run of an example configuration with some fields replaced (nested ones as `section__field`)."""
    fixed = {"model": str(model), "data": str(data), "output_dir": str(output_dir), "console": False}
    values = overlay(read_mapping(HERE / recipe), fixed)
    for name, value in fields.items():
        section, _, field = name.partition("__")
        values = overlay(values, {section: {field: value} if field else value})
    return Pretrainer(build(values)).train()


def evaluation(model: Path, frozen: Path, data: Path, seed: int, controls: bool) -> dict[str, Any]:
    """Numbers per held-out problem: at the answer, two sampled thoughts and the greedy one."""
    config = build(
        {
            "model": str(model),
            "data": {"path": str(data), "meta_columns": ["depth"]},
            "objective": {"name": "rlp", "positions": "after", "marker": "shows"},
            "sampling": {"max_thought_tokens": 32},
        }
    )
    tokenizer = load_tokenizer(config.model)
    result = evaluate(
        load_model(config.model),
        load_objective(config, tokenizer),
        read_all(config.data, tokenizer),
        frozen=load_model(build({"model": str(frozen), "data": "-"}).model),
        thoughts=2,
        seed=seed,
        controls=controls,
        pad_id=tokenizer.pad_token_id,
    )
    values = result.values | {"no_think_loss": result.losses, "tokens": result.tokens}
    positions = {"depth": result.meta("depth"), "rows": result.rows}
    return positions | {name: array.tolist() for name, array in values.items()}


def numbers(parts: Sequence[dict[str, Any]], depths: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """Means over the problems of these depths and over the evaluations `parts`, as the demo gives them."""
    depth = parts[0]["depth"]
    rows = parts[0].get("rows", [str(place) for place in range(len(depth))])  # older evaluations have none
    columns = {*names, "tokens"}
    by_part = [{name: part[name] for name in columns} for part in parts]
    return demo_numbers(Measurements(by_part, rows, {"depth": depth}).where("depth", depths), names)
