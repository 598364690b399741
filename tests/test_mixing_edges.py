"""Edges between sources learnt by short runs, and the section of the documents about them."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.mixtures import depths
from rlpretrain import cli
from rlpretrain.config import ConfigError
from rlpretrain.config.io import build, load_config
from rlpretrain.experiments.edges import compute_falls, mean_edges, plan, short_config
from rlpretrain.objectives import config_of
from rlpretrain.training import step_end
from rlpretrain.training.run import Run
from tests.builders.dial import compute
from tests.builders.mixing import SKILLS, mixed, rows_of, sources_of
from tests.builders.runs import ROOT, merged, trained

EXAMPLE = ROOT / "examples" / "mixtures" / "depths.yaml"

# Learnt edges


def test_edges_are_relative_falls_of_losses():
    losses = {
        "(base)": {"a": 3.0, "b": 4.0},
        "a": {"a": 1.0, "b": 3.5},
        "b": {"a": 3.5, "b": 2.0},
        "a+b": {"a": 1.5, "b": 1.5},
    }
    falls = {"a": {"a": 1, "b": 0.25}, "b": {"a": -0.25, "b": 1}}
    assert compute_falls(losses, ["a", "b"], pairs=False) == falls
    assert compute_falls(losses, ["a", "b"], pairs=True) == falls
    assert mean_edges([falls]) == {"edges": {"a": {"a": 1, "b": 0.25}, "b": {"a": 0, "b": 1}}}
    losses["a"]["a"] = 3.2
    with pytest.raises(ConfigError, match=r"the short run b, the held-out loss of 'a' is not a finite"):
        compute_falls(losses | {"b": {"a": math.nan, "b": 2.0}}, ["a", "b"], pairs=False)
    with pytest.raises(ConfigError, match=r"'a' did not lower its own held-out loss \(3.0000 before, 3.2000"):
        compute_falls(losses, ["a", "b"], pairs=False)


def test_several_seeds_give_means_and_intervals():
    """Student's t with two degrees of freedom is 4.303 at 95%."""
    falls = [
        {"a": {"a": 1.0, "b": x}, "b": {"a": y, "b": 1.0}} for x, y in ((0.2, -0.5), (0.3, 0.1), (0.4, 0.1))
    ]
    result = mean_edges(falls)
    assert result["edges"]["a"]["b"] == pytest.approx(0.3) and result["edges"]["b"]["a"] == 0.0
    half = 4.303 * 0.1 / 3**0.5
    assert result["intervals"]["a"]["b"] == pytest.approx([0.3 - half, 0.3 + half], abs=1e-3)
    low, high = result["intervals"]["b"]["a"]
    assert low + high == pytest.approx(-0.2) and low < -0.1 < high  # the mean before it is cut at 0
    assert result["intervals"]["a"]["a"] == [1.0, 1.0]


def test_the_command_learns_edges_and_goes_on(values, corpus, tmp_path, capsys, monkeypatch):
    """SIGTERM ends it inside its second run. Then its losses are those of a run made by hand."""
    file, out, runs = tmp_path / "run.yaml", tmp_path / "edges.json", tmp_path / "edges.runs"
    run = mixed(values, corpus, optim={"lr": 1e-2, "warmup_steps": 1})
    run["data"] = run["data"] | {"mixing": SKILLS | {"edges": str(out)}}
    file.write_text(yaml.safe_dump(run))
    command = ["mix", "edges", str(file), "--steps", "6", "--out", str(out), "--pairs"]
    assert cli.main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "read+think" in said and "3 short runs of 6 steps, 4 evaluations; nothing was trained" in said
    assert not out.exists() and not runs.exists()

    log, sent = step_end._log, []

    def end_the_second(run_: Run, row: Any, batch: Any) -> None:
        log(run_, row, batch)
        if run_.folder.name == "think.run" and run_.step == 3 and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    monkeypatch.setattr(step_end, "_log", end_the_second)
    assert cli.main(command) == 130
    assert "what is done is kept, the same command goes on there" in capsys.readouterr().err
    done = {path.name: path.stat().st_mtime_ns for path in runs.glob("*.json")}
    assert set(done) == {"(base).json", "read.json"} and (runs / "think.run" / "checkpoint-4").is_dir()
    assert cli.main(command) == 0
    assert done == {name: (runs / name).stat().st_mtime_ns for name in done}
    assert "4 of 4: read+think: held-out loss of read" in capsys.readouterr().out
    result = json.loads(out.read_text())

    sources = sources_of(corpus, think=1.0, read=0.0)
    by_hand = merged(run, data={"sources": sources, "max_length": 64}, objective="ntp", average=None)
    by_hand = merged(by_hand, max_steps=6, eval=run["eval"] | {"every": 0}, output_dir=str(tmp_path / "hand"))
    trained(by_hand)
    row = rows_of(tmp_path / "hand")[-1]
    (of_seed,) = result["seeds"]
    assert of_seed["losses"]["think"] == {n: row[f"eval/{n}/no_think_loss"] for n in ("think", "read")}
    assert of_seed["trained_tokens"]["think"] == row["source/think/tokens"]
    loss = of_seed["losses"]
    own_fall = loss["(base)"]["read"] - loss["read"]["read"]
    fall = loss["read"]["read"] - loss["read+think"]["read"]
    assert result["edges"]["think"]["read"] == pytest.approx(max(0.0, fall) / own_fall)
    assert not list(runs.glob("*.run"))  # models and logs of the short runs

    assert cli.main([*command, "--seeds", "2"]) == 0  # the first seed's runs are there
    said = capsys.readouterr().out
    assert done == {name: (runs / name).stat().st_mtime_ns for name in done}
    assert "8 of 8: seed 1, read+think: held-out loss of read" in said and "mean of 2 seeds" in said
    two = json.loads(out.read_text())
    assert [of["seed"] for of in two["seeds"]] == [0, 1] and two["seeds"][0] == of_seed
    assert two["seeds"][1]["losses"]["think"] != of_seed["losses"]["think"]
    low, high = two["intervals"]["think"]["read"]
    assert low < high and not list(runs.glob("**/*.run"))

    kept = (runs / "read.json").read_text()
    (runs / "read.json").write_text("{}")
    assert cli.main(command) == 2 and "read.json is damaged" in capsys.readouterr().err
    (runs / "read.json").write_text(kept)
    assert cli.main([*command, "--optim.lr", "0.005"]) == 2
    assert "is of a run with other settings: optim.lr was 0.01, is 0.005" in capsys.readouterr().err


def test_configurations_without_edges_are_refused(values, corpus, tmp_path, capsys):
    def refused(message: str, *words: str, **changes: Any) -> None:
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(merged(mixed(values, corpus), **changes)))
        command = ["mix", "edges", str(file), "--steps", "6", "--out", str(tmp_path / "e.json"), "--dry-run"]
        assert cli.main([*command, *words]) == 2
        assert message in capsys.readouterr().err

    held_out = {"data": {"think": str(corpus / "held_out.jsonl")}, "every": 2}
    refused("eval.data has no read", eval=held_out)
    refused("between several data.sources: name at least two", data=values["data"], eval={"data": None})
    refused("optim.warmup_steps 9 leave no step of --steps 6", "--optim.warmup_steps", "9")


def test_files_of_others_are_left_alone(values, corpus, tmp_path, capsys):
    """A dry run says so too."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(mixed(values, corpus)))

    def refused(out: Path, message: str) -> None:
        assert cli.main(["mix", "edges", str(file), "--steps", "20", "--out", str(out), "--dry-run"]) == 2
        assert message in capsys.readouterr().err

    refused(file, "exists and has no learnt edges: choose another name")
    refused(tmp_path / "edges.runs", "the folder of the short runs has this name: end it with .json")
    (tmp_path / "mine.runs" / "think.run").mkdir(parents=True)
    refused(tmp_path / "mine.json", "mine.runs exists and is not of this command")
    assert (tmp_path / "mine.runs" / "think.run").is_dir()


def test_a_recipe_and_terms_of_thoughts_do_not_reach_short_runs(values, corpus):
    run = mixed(values, corpus, recipe="paper", loss={"terms": ["surrogate"], "ntp_coef": 0.3})
    config = build(run, config_of)
    short = short_config(config, plan(config, 20, pairs=False)[1], 20, Path("x"))
    assert short.recipe == "paper" and replace(config, max_steps=3).sampling == config.sampling
    assert short.objective == {"name": "ntp"} and short.loss.terms == () and short.optim == config.optim


# Documents and examples


def test_the_section_of_the_documents_runs(values, corpus, tmp_path, monkeypatch, capsys):
    """docs/mixtures.md: the YAML as it is printed, the command before it, and the function after it."""
    text = (ROOT / "docs" / "mixtures.md").read_text().split("## Shares that follow the losses")[1]
    printed = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.S)[0])
    (function,) = re.findall(r"```python\n(.*?)```", text, re.S)
    (own,) = re.findall(r"`mixing: ({.*?}})`", text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("my_mix.py").write_text(function)
    for name in printed["data"]["sources"]:
        shutil.copy(corpus / "train.jsonl", f"{name}.jsonl")
        shutil.copy(corpus / "held_out.jsonl", f"held_{name}.jsonl")
    rest = {key: value for key, value in values.items() if key not in ("data", "max_steps", "objective")}
    file = Path("run.yaml")
    file.write_text(yaml.safe_dump(rest | printed | {"objective": "ntp"}))
    quick = ["--data.mixing.every", "2", "--eval.every", "2", "--eval.documents", "4", "--max_steps", "3"]
    assert cli.main(["mix", "edges", "run.yaml", "--steps", "3", "--out", "edges.json", *quick]) == 0
    assert cli.main(["train", "run.yaml", "--dry-run"]) == 0
    assert "change every 100 steps, by skill_it" in capsys.readouterr().out
    assert cli.main(["train", "run.yaml", *quick]) == 0
    rows = rows_of(values["output_dir"])
    shares = [[row[f"source/{name}/weight"] for name in ("web", "math", "notes")] for row in rows]
    assert shares[0] == shares[1] == pytest.approx([0.7, 0.2, 0.1])
    assert shares[2] != shares[1]

    own_run = ["--data.mixing", own.replace("{name", "{every: 2, name"), "--output_dir", "own"]
    assert cli.main(["train", "run.yaml", *quick[2:], *own_run]) == 0
    rows = rows_of("own")
    powers = [rows[1][f"eval/{name}/no_think_loss"] ** 2 for name in ("web", "math", "notes")]
    expected = [power / sum(powers) for power in powers]
    assert [rows[2][f"source/{name}/weight"] for name in ("web", "math", "notes")] == pytest.approx(expected)

    assert cli.main(["report", values["output_dir"]]) == 0
    page = (Path(values["output_dir"]) / "report.html").read_text()
    assert "share of each source" in page and "source/notes/weight from 0.1 to" in page


def test_a_file_or_a_mapping_of_edges_on_the_command_line(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")

    def edges(word: str) -> Any:
        return load_config(EXAMPLE, ["--data.mixing.edges", word]).data.mixing.edges

    assert edges("{}") == {} and edges("{depth1: {depth2: 0.5}}") == {"depth1": {"depth2": 0.5}}
    assert edges("~/a.json") == "/home/ann/a.json" and edges("1e5") == "1e5" and edges("a: b") == "a: b"
    files = load_config(EXAMPLE, ["--eval.data", "{depth1: a.jsonl}", "--data.mixing", "null"]).eval.data
    assert files == {"depth1": "a.jsonl"}


def test_the_example_is_a_whole_configuration():
    """Its commands too, as the file gives them."""
    assert load_config(EXAMPLE).data.mixing.name == "skill_it"
    lines = [line for line in EXAMPLE.read_text().splitlines() if "rlpretrain train" in line]
    for line, rule in zip(lines, ("skill_it", "stratified", "skill_it", None), strict=True):
        words = (
            shlex.split(line, comments=True)
            if not line.startswith("#")
            else shlex.split(line[1:], comments=True)
        )
        mixing = load_config(EXAMPLE, words[3:]).data.mixing
        assert (mixing and mixing.name) == rule


def test_the_sources_of_the_example(tmp_path):
    """Each row is a problem of its depth with its answer, worked out from the words."""
    assert depths.main(["--out", str(tmp_path), "--train", "6", "--held-out", "3"]) == 0
    for depth in (1, 2, 3):
        for name, count in ((f"depth{depth}", 6), (f"held_depth{depth}", 3)):
            rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
            assert len(rows) == count
            for row in rows:
                *words, shows = row["question"].split()
                assert shows == "shows" and len(words) == 3 + 2 * depth
                assert row["answer"] == f"{compute(words)} ."
