"""Progress of work that is not a run, and of the evaluations of a run."""

from __future__ import annotations

import time

import datasets

from rlpretrain import Pretrainer, models
from rlpretrain.config import PretrainConfig
from rlpretrain.config.io import build
from rlpretrain.data import indexed
from rlpretrain.data.stream import read_all
from rlpretrain.tracking import progress
from rlpretrain.tracking.console import Console
from tests.builders.configs import tiny_values


def test_lines_say_how_long_it_takes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    printed: list[str] = []
    lines = progress.Lines("evaluating", printed.append)
    for done in range(1, 11):
        now[0] += 20.0
        lines(done, 10)
    assert printed == [
        "evaluating: 2 of 10, 160 s left",
        "evaluating: 4 of 10, 120 s left",
        "evaluating: 6 of 10, 80 s left",
        "evaluating: 8 of 10, 40 s left",
    ]


def test_an_evaluation_of_a_run_tells_the_console(corpus, tmp_path, monkeypatch):
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(Console, "evaluating", lambda self, *numbers: calls.append(numbers))
    held_out = {"data": str(corpus / "held_out.jsonl"), "documents": 6, "every": 1, "thoughts": 2}
    Pretrainer(build(tiny_values(corpus, tmp_path / "run") | {"max_steps": 1, "eval": held_out})).train()
    assert calls == [(6, 6)]


def test_a_bar_for_the_terminal_is_removed_at_the_end(tmp_path):
    console = Console(PretrainConfig(model="m", data="d", output_dir=str(tmp_path)), 3, 0, first=True)
    console.progress.disable = False
    console.evaluating(1, 2)
    assert [task.description for task in console.progress.tasks] == ["rlp", "evaluating positions"]
    console.evaluating(2, 2)
    assert [task.description for task in console.progress.tasks] == ["rlp"]
    console.close()


def test_tokenizing_many_rows_shows_a_bar(corpus, tmp_path, monkeypatch, capfd):
    config = build(tiny_values(corpus, tmp_path))
    tokenizer = models.load_tokenizer(config.model)
    before = datasets.are_progress_bars_disabled()
    for many, max_length in ((10_000, 63), (100, 62)):  # another length: nothing is cached
        monkeypatch.setattr(indexed, "MANY_ROWS", many)
        config.data.max_length = max_length
        read_all(config.data, tokenizer)
        assert ("tokenizing" in capfd.readouterr().err) == (many == 100)
    assert datasets.are_progress_bars_disabled() == before
