"""What `rlpretrain init` is asked, and what it chooses for the documents: columns and the longest one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlpretrain.config import ConfigError, DataConfig, ModelConfig
from rlpretrain.data.opening import column_names, first_rows
from rlpretrain.models.loading import load_tokenizer
from rlpretrain.tools.commented import FirstConfig

SAMPLED_ROWS = 500
"""Rows whose length is measured."""
PAIRS = (("question", "answer"), ("prompt", "completion"), ("prompt", "response"), ("problem", "solution"))
"""Columns that are taken for a prompt and its answer where there is no column `text`."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user says; None is chosen here."""

    model: str
    data: str
    objective: str = "rlp"
    column: str | None = None
    answer_column: str | None = None
    held_out: str | None = None
    output_dir: str = "runs/first"
    device: str | None = None
    """cpu or cuda; by default what this machine has."""
    gib: float | None = None
    """Memory of a device in GiB; needed for a GPU that is not here."""
    processes: int = 1
    """GPUs, or processes on a CPU."""
    steps: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the configuration, nested; they replace what is chosen here."""


def describe_data(first: FirstConfig, request: Request, most: int) -> None:
    """Columns, the longest document, and the held-out file."""
    given = {
        name: value for name, value in request.fields.get("data", {}).items() if name in ("name", "split")
    }
    column, answer = choose_columns(column_names(DataConfig(path=request.data, **given)), request)
    first.set("data.path", request.data)
    first.set("data.column", column)
    if answer:
        first.set("data.answer_column", answer, "the thought comes between prompt and answer")
    data = DataConfig(path=request.data, column=column, answer_column=answer, **given)
    length, why = _choose_length(data, ModelConfig(path=request.model), most)
    first.set("data.max_length", length, why)
    if request.held_out:
        first_rows(DataConfig(path=request.held_out, column=column, answer_column=answer), 1)
        first.set("eval.data", request.held_out, "documents that are not trained on")
        first.set("eval.every", 100)
    else:
        first.notes.append(
            "no held-out documents: with `eval: {data: FILE}` the run measures gain, controls and retention"
        )


def choose_columns(names: list[str], request: Request) -> tuple[str, str | None]:
    """(column, answer column) of the request, else the usual ones; ConfigError if they cannot be guessed."""
    for setting, name in (("--column", request.column), ("--answer-column", request.answer_column)):
        if name is not None and name not in names:
            raise ConfigError(
                f"{setting} {name}: {request.data} has no such column; it has {', '.join(names)}"
            )
    if request.column:
        return request.column, request.answer_column
    if request.answer_column is None and "text" in names:
        return "text", None
    for prompt, answer in PAIRS:
        if prompt in names and request.answer_column in (None, answer) and answer in names:
            return prompt, answer
    if len(names) == 1:
        return names[0], None
    raise ConfigError(f"which column of {request.data} has the text? --column NAME, of {', '.join(names)}")


def _choose_length(data: DataConfig, model: ModelConfig, most: int) -> tuple[int, str]:
    """(data.max_length, why): it holds 95% of the sampled documents, if `most` tokens are enough."""
    columns = [data.column, *([data.answer_column] if data.answer_column else [])]
    rows = [[row[column] for column in columns] for row in first_rows(data, SAMPLED_ROWS)]
    for name, cell in ((name, cell) for row in rows for name, cell in zip(columns, row, strict=True)):
        if cell is not None and not isinstance(cell, str):
            raise ConfigError(
                f"column '{name}' of {data.path} holds {type(cell).__name__}, not text: choose another "
                "(--column), or write chat messages as text, or as a prompt and an answer, first"
            )
    try:
        tokenizer = load_tokenizer(model)
    except Exception:  # a hub id on a machine without a network
        return most, "the tokenizer is not here, so documents were not measured"
    texts = [data.answer_join.join(cell or "" for cell in row) for row in rows]
    lengths = sorted(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
    wanted = lengths[int(0.95 * (len(lengths) - 1))] + 2
    length = 64
    while length < wanted and length < most:
        length *= 2
    share = sum(size + 2 <= length for size in lengths) / len(lengths)
    longer = "left out" if data.answer_column else "split"
    return length, f"{share:.0%} of the first {len(lengths)} documents fit; longer ones are {longer}"
