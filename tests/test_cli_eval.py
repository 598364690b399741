"""`rlpretrain eval`: of a run, of two models, of a random sample, split by any column, and interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rlpretrain import cli, models
from rlpretrain.commands.evaluation_tables import split
from rlpretrain.config.io import build
from rlpretrain.data.stream import read_all
from rlpretrain.evaluation import evaluate as evaluate_module
from rlpretrain.evaluation.record import Evaluation
from rlpretrain.types import Document
from tests.builders.configs import tiny_values


def numbers(folder: Path, *words: str) -> dict:
    """What the command writes with --json."""
    file = folder / "numbers.json"
    assert cli.main(["eval", *words, "--device", "cpu", "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_a_run_gives_model_objective_lengths_and_frozen_base(finished, corpus, tmp_path):
    """The short command equals the long one, and options come before the run's settings."""
    data = ("--data", str(corpus / "held_out.jsonl"), "--documents", "6", "--thoughts", "2")
    of_run = numbers(tmp_path, str(finished), *data)
    spelled = numbers(
        tmp_path,
        str(finished / "model"),
        *data,
        "--frozen",
        str(corpus / "base"),
        "--objective",
        "{name: rlp, positions: after, marker: shows}",
        "--max-thought-tokens",
        "6",
        "--max-length",
        "64",
    )
    assert of_run == spelled
    assert of_run["all"]["length"] <= 6 and of_run["all"]["gain_frozen"] != of_run["all"]["gain"]
    change = of_run["all"]["no_think_change"]
    base = numbers(tmp_path, str(corpus / "base"), *data, "--max-thought-tokens", "6")
    assert change == pytest.approx(of_run["all"]["no_think_loss"] - base["all"]["no_think_loss"], abs=1e-5)
    short = numbers(tmp_path, str(finished), *data, "--max-thought-tokens", "1")
    assert short["all"]["length"] == 1


def test_a_run_without_a_model_is_an_error(finished, tmp_path, capsys):
    folder = tmp_path / "unfinished"
    folder.mkdir()
    (folder / "run.json").write_text((finished / "run.json").read_text())
    assert cli.main(["eval", str(folder), "--data", "x"]) == 2
    assert "is a run without a trained model" in capsys.readouterr().err


def test_differences_are_paired(finished, corpus, tmp_path):
    data = ("--data", str(corpus / "held_out.jsonl"), "--documents", "10", "--thoughts", "2", "--no-greedy")
    found = numbers(tmp_path, str(finished), *data, "--against", str(corpus / "base"))
    for name in ("gain_frozen", "direct", "no_think_loss"):
        difference = found["all"][name] - found["against"][name]
        assert found["difference"][name] == pytest.approx(difference, abs=1e-6)
        low, high = found["difference"][f"{name}_ci"]
        assert low - 1e-9 <= difference <= high + 1e-9
    with_itself = numbers(tmp_path, str(finished), *data, "--against", str(finished))
    assert with_itself["difference"]["gain_frozen_ci"] == [0, 0]


def test_a_random_sample_in_the_order_of_the_data(corpus, tmp_path):
    config = build(tiny_values(corpus, tmp_path))
    tokenizer = models.load_tokenizer(config.model)
    whole = read_all(config.data, tokenizer)
    samples = [[d.id for d in read_all(config.data, tokenizer, limit=40, seed=seed)] for seed in range(3)]
    order = {document.id: i for i, document in enumerate(whole)}
    for sample in samples:
        places = [order[id_] for id_ in sample]
        assert places == sorted(set(places)) and len(places) == 40
        assert 60 < np.mean(places) < 140  # of 200: the first 40 have a mean of 19.5
    assert samples[0] != samples[1] and samples[0] == [
        d.id for d in read_all(config.data, tokenizer, limit=40, seed=0)
    ]
    assert read_all(config.data, tokenizer, limit=500, seed=4) == whole


def test_ctrl_c_prints_what_is_done(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(evaluate_module.ROWS, "cpu", 4)
    score_part, calls = evaluate_module._evaluate_part, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score_part(*args)

    monkeypatch.setattr(evaluate_module, "_evaluate_part", interrupted)
    file = tmp_path / "out.json"
    words = ["eval", str(corpus / "base"), "--data", str(corpus / "held_out.jsonl"), "--documents", "12"]
    words += ["--thoughts", "2", "--max-thought-tokens", "3", "--device", "cpu", "--json", str(file)]
    assert cli.main(words) == 130
    printed = capsys.readouterr()
    assert "interrupted: 4 positions are done" in printed.err and "all (4)" in printed.out
    assert json.loads(file.read_text())["all"]["gain"] is not None


def part(values: list) -> Evaluation:
    documents = [Document(str(i), (1, 2), meta={"x": value}) for i, value in enumerate(values)]
    ones = np.arange(float(len(values)))
    return Evaluation({"gain": ones}, documents, ones, ones, [None] * len(values))  # type: ignore[list-item]


def test_a_column_of_many_numbers_is_split_at_its_quartiles():
    parts = split(part([i / 2 for i in range(40)]), "x")
    assert list(parts) == [
        "0 to below 4.875",
        "4.875 to below 9.75",
        "9.75 to below 14.625",
        "14.625 to 19.5",
    ]
    assert [len(p.documents) for p in parts.values()] == [10] * 4
    assert [p.values["gain"][0] for p in parts.values()] == [0, 10, 20, 30]


def test_a_column_of_many_texts_keeps_the_most_frequent():
    names = [f"name {i}" for i in range(20)] + ["often"] * 5
    parts = split(part(names), "x")
    assert next(iter(parts)) == "often" and len(parts) == 12
    assert sum(len(p.documents) for p in parts.values()) == len(names)
    assert len(parts["others"].documents) == 10


def test_help_has_every_default(capsys):
    with pytest.raises(SystemExit):
        cli.main(["eval", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("(default: 4)", "(default: 512)", "(default: 2048)", "(default: float32)", "{name: rlp})"):
        assert words in text
