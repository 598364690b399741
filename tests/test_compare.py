"""`rlpretrain compare`: equal budgets, resumed comparisons, early errors, and the tables."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from rlpretrain.cli import main
from rlpretrain.config import ConfigError
from rlpretrain.evaluation.intervals import interval
from rlpretrain.experiments.compare import compare, differences, read_measurements, table
from rlpretrain.experiments.experiment import Job, overlay
from rlpretrain.experiments.jobs import evaluation_to_do, training_to_do
from rlpretrain.experiments.loading import load_experiment
from tests.builders.configs import tiny_values
from tests.builders.experiments import small_evaluation
from tests.builders.processes import warm


def written(folder: Path, corpus: Path, **changes: Any) -> Path:
    """An experiment file: rlp, and ntp with the same tokens and with the same operations."""
    values = tiny_values(corpus, folder / "unused") | {"optim": {"lr": 1e-3}, "threads": 1, "max_steps": 2}
    (folder / "rlp.yaml").write_text(yaml.safe_dump(values))
    ntp = {"config": "rlp.yaml", "set": {"objective": "ntp"}, "like": "rlp"}
    experiment = {
        "methods": {
            "rlp": {"config": "rlp.yaml"},
            "ntp_tokens": {**ntp, "match": "tokens"},
            "ntp_flops": {**ntp, "match": "flops"},
        },
        "evaluation": small_evaluation(corpus / "held_out.jsonl"),
        "seeds": [0, 1],
        "jobs": 2,
        "output_dir": str(folder / "compared"),
    } | changes
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(experiment))
    return file


@pytest.fixture(scope="module")
def done(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished comparison and its results. Copy the folder to change it."""
    warm()
    folder = tmp_path_factory.mktemp("compare")
    file = written(folder, corpus)
    return file, compare(file)


def log(file: Path, name: str) -> list[dict[str, float]]:
    return [
        json.loads(line)
        for line in (file.parent / "compared" / name / "metrics.jsonl").read_text().splitlines()
    ]


def test_budgets_match_to_a_step(done):
    file, results = done
    for seed in (0, 1):
        rlp, tokens, flops = (log(file, f"{name}-{seed}") for name in ("rlp", "ntp_tokens", "ntp_flops"))
        wanted, spent = rlp[-1]["num_input_tokens"], [row["num_input_tokens"] for row in tokens]
        assert spent[-1] >= wanted and all(n < wanted for n in spent[:-1])
        wanted, spent = rlp[-1]["num_flops"], [row["num_flops"] for row in flops]
        assert spent[-1] >= wanted and all(n < wanted for n in spent[:-1])
        assert len(flops) > len(tokens) > 0  # thinking costs operations, not documents
    row = results["methods"]["ntp_flops"]
    assert row["spent"]["flops"] == np.mean([log(file, f"ntp_flops-{s}")[-1]["num_flops"] for s in (0, 1)])
    assert all(why.startswith("budget") for why in row["stopped"])


def test_the_table_is_what_the_evaluations_hold(done):
    file, results = done
    for name in ("base", "rlp", "ntp_tokens"):
        parts = [
            json.loads((file.parent / "compared" / f"{name}-{s}" / "evaluation.json").read_text())
            for s in (0, 1)
        ]
        gains = np.array([p["common"]["gain_frozen"] for p in parts])
        mean, low, high = results["methods"][name]["gain_frozen"]
        assert gains.shape == (2, 12) and mean == pytest.approx(gains.mean()) and low <= mean <= high
        tokens = np.array([p["common"]["tokens"] for p in parts])
        losses = np.array([p["common"]["no_think_loss"] for p in parts])
        assert results["methods"][name]["no_think_loss"][0] == pytest.approx(
            (losses * tokens).sum() / tokens.sum()
        )
    rlp = results["methods"]["rlp"]
    assert rlp["own"]["number"] == "gain_frozen" and rlp["own"]["before"] != rlp["own"]["after"]
    assert rlp["own"]["after"][0] == pytest.approx(
        rlp["gain_frozen"][0]
    )  # its own objective is the common one here
    assert results["methods"]["ntp_tokens"]["own"]["number"] == "no_think_loss"
    with (file.parent / "compared" / "results.csv").open() as f:
        rows = {(r["method"], r["number"]): r for r in csv.DictReader(f)}
    assert float(rows["rlp", "gain_frozen"]["low"]) == rlp["gain_frozen"][1]
    assert float(rows["ntp_flops", "flops"]["mean"]) == results["methods"]["ntp_flops"]["spent"]["flops"]
    assert rlp["by_seed"]["gain_frozen"] == pytest.approx(
        [np.mean(p["common"]["gain_frozen"]) for p in evaluations(file, "rlp")]
    )
    assert float(rows["rlp", "gain_frozen"]["seed 1"]) == rlp["by_seed"]["gain_frozen"][1]
    written = json.loads((file.parent / "compared" / "results.json").read_text())
    assert written | {"plotted": True} == json.loads(json.dumps(results))
    assert (file.parent / "compared" / "results.svg").read_text().count("<svg") == 1


def test_methods_are_compared_by_paired_differences(done):
    """Issue 15 V: differences at the same rows with the same seeds."""
    file, results = done
    names = list(results["methods"])  # the base first
    assert list(results["differences"]) == [f"{b} - {a}" for k, a in enumerate(names) for b in names[k + 1 :]]
    first, second = ([p["common"] for p in evaluations(file, name)] for name in ("rlp", "ntp_tokens"))
    apart = np.array([p["gain_frozen"] for p in first]) - np.array([p["gain_frozen"] for p in second])
    mean, ends = interval(apart, rows=first[0]["rows"])
    found = results["differences"]["rlp - ntp_tokens"]
    assert found["gain_frozen"] == [mean, *ends]
    rlp, ntp = (results["methods"][n]["no_think_loss"][0] for n in ("rlp", "ntp_tokens"))
    assert found["no_think_loss"][0] == pytest.approx(rlp - ntp)
    with (file.parent / "compared" / "results.csv").open() as f:
        rows = {(r["method"], r["number"]): r for r in csv.DictReader(f)}
    assert float(rows["rlp - ntp_tokens", "gain_frozen"]["high"]) == ends[1]
    assert results["source_rows"] == 12 and first[0]["rows"] == second[0]["rows"]
    shown = Console(width=300, file=io.StringIO())
    shown.print(table(results))
    shown.print(differences(results))
    said = shown.file.getvalue()
    assert (
        "12 held-out documents of 12 rows" in said
        and "rlp - ntp_flops" in said
        and "rlp - ntp_tokens" not in said
    )


def evaluations(file: Path, name: str) -> list[dict[str, Any]]:
    """The evaluation of each seed of a method."""
    return [
        json.loads((file.parent / "compared" / f"{name}-{s}" / "evaluation.json").read_text()) for s in (0, 1)
    ]


def test_an_evaluation_without_source_rows_is_made_again(done, corpus, tmp_path):
    """An evaluation without `rows` cannot say which positions belong to one document."""
    job = Job(experiment=load_experiment(done[0]), name="rlp", seed=0, where=done[0].parent)
    assert evaluation_to_do(job) is None
    old = evaluations(done[0], "rlp")[0]
    del old["common"]["rows"]
    file = job.folder / "evaluation.json"
    kept = file.read_text()
    try:
        file.write_text(json.dumps(old))
        assert evaluation_to_do(job) == old["settings"]
    finally:
        file.write_text(kept)


def test_what_is_done_is_not_done_again(done, corpus, tmp_path):
    """Only an interrupted training and a missing evaluation run again, and the numbers stay the same."""
    file, results = done
    file = written(tmp_path, corpus, jobs=1)
    shutil.copytree(done[0].parent / "compared", tmp_path / "compared")
    for wanted in (tmp_path / "compared").glob("*/wanted.json"):  # the folder has another name now
        wanted.write_text(wanted.read_text().replace(str(done[0].parent), str(tmp_path)))
    record = tmp_path / "compared" / "rlp-1" / "run.json"
    record.write_text(record.read_text().replace('"status": "done"', '"status": "running"'))
    (tmp_path / "compared" / "ntp_flops-0" / "evaluation.json").unlink()
    said: list[str] = []
    again = compare(file, say=said.append)
    assert again["methods"] == results["methods"]
    assert {line for line in said if "done before" not in line} == {
        "rlp, seed 1: trained 2 steps",
        "ntp_flops, seed 0: evaluated",
    }
    assert len(said) == 8


def test_a_cost_per_position_gives_the_nearest_number_of_steps(corpus, tmp_path):
    """A position costs 10 operations in `ntp_tokens`, so a step of 4 costs 40: 115 pay for 3 steps."""
    ntp = {"config": "rlp.yaml", "set": {"objective": "ntp", "positions_per_step": 2}, "like": "rlp"}
    by_cost = {**ntp, "match": "flops", "cost_from": "ntp_tokens"}
    methods = {
        "rlp": {"config": "rlp.yaml"},
        "ntp_tokens": {**ntp, "match": "tokens"},
        "ntp_compute": {**by_cost, "set": {"objective": "ntp", "positions_per_step": 4}},
    }
    file = written(tmp_path, corpus, methods=methods, seeds=[0])
    for name, row in {
        "rlp": {"step": 2, "num_flops": 115.0},
        "ntp_tokens": {"step": 3, "num_flops": 60.0},
    }.items():
        (tmp_path / "compared" / f"{name}-0").mkdir(parents=True)
        (tmp_path / "compared" / f"{name}-0" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    job = Job(experiment=load_experiment(file), name="ntp_compute", seed=0, where=tmp_path)
    config = training_to_do(job)
    assert config is not None and config.max_steps == 3 and config.stop.flops is None


def test_only_the_common_evaluation_with_greedy_thoughts_and_columns(done, corpus, tmp_path):
    evaluation = {
        "data": {"path": str(corpus / "held_out.jsonl"), "max_length": 64, "meta_columns": ["depth"]},
        "documents": 12,
        "thoughts": 2,
        "objective": {"name": "rlp", "positions": "after", "marker": "shows"},
        "max_thought_tokens": 6,
        "greedy": True,
        "own": False,
    }
    file = written(
        tmp_path, corpus, methods={"rlp": {"config": "rlp.yaml"}}, seeds=[0], evaluation=evaluation, jobs=1
    )
    shutil.copytree(done[0].parent / "compared", tmp_path / "compared")
    for wanted in (tmp_path / "compared").glob("*/wanted.json"):
        wanted.write_text(wanted.read_text().replace(str(done[0].parent), str(tmp_path)))
    results = compare(file)
    assert "own" not in results["methods"]["rlp"] and results["methods"]["rlp"]["spent"]
    measured = read_measurements(load_experiment(file))["rlp"]
    before = evaluations(done[0], "rlp")[0]["common"]
    assert measured.array("gain_frozen").tolist() == [before["gain_frozen"]]  # the same thoughts
    assert measured.has("think_greedy") and len(measured.meta["depth"]) == 12
    part = measured.where("depth", ["2"])
    chosen = [
        gain
        for gain, depth in zip(before["gain_frozen"], measured.meta["depth"], strict=True)
        if depth == "2"
    ]
    assert part.array("gain_frozen").tolist() == [chosen] and len(part.rows) == len(chosen) > 0


def test_other_settings_are_refused_not_mixed(done, corpus, tmp_path):
    file = written(
        tmp_path, corpus, output_dir=str(done[0].parent / "compared"), common={"optim": {"lr": 2e-3}}, jobs=1
    )
    with pytest.raises(ConfigError, match=r"has other settings: optim.lr was 0.001, is 0.002"):
        compare(file)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": {}}, "at least one method"),
        ({"seeds": []}, "at least one method and one seed"),
        ({"seeds": [1, 1]}, "contains a seed twice"),
        ({"sedes": [1]}, "did you mean 'seeds'"),
        ({"methods": {"base": {"config": "rlp.yaml"}}}, "not 'base'"),
        ({"methods": {"a/b": {"config": "rlp.yaml"}}}, "consists of letters, digits"),
        ({"methods": {"a": {"config": "nothing.yaml"}}}, "method a .*cannot be read"),
        (
            {"methods": {"a": {"config": "rlp.yaml", "set": {"optm": {"lr": 1}}}}},
            "method a .*did you mean 'optim'",
        ),
        (
            {"methods": {"a": {"config": "rlp.yaml", "set": {"objective": {"clipp": 1}}}}},
            "did you mean 'clip'",
        ),
        ({"methods": {"a": {"config": "rlp.yaml", "match": "flops"}}}, "match and like need each other"),
        ({"methods": {"a": {"config": "rlp.yaml", "after": "b"}}}, "after 'b' is not a method"),
        (
            {
                "methods": {
                    "a": {"config": "rlp.yaml", "after": "b"},
                    "b": {"config": "rlp.yaml", "after": "a"},
                }
            },
            "waits for itself: a needs b needs a",
        ),
        (
            {"methods": {"a": {"config": "rlp.yaml", "search": {"optim.lr": [1.0]}}}},
            "search needs evaluation.search_data",
        ),
        (
            {"methods": {"a": {"config": "rlp.yaml", "search": {"objective.clip": [1.0]}}}},
            "search cannot vary objective.clip",
        ),
        ({"methods": {"a": {"config": "rlp.yaml", "search": {"optim.lr": []}}}}, "optim.lr has no values"),
        (
            {"methods": {"a": {"config": "rlp.yaml", "match": "flops", "like": "b"}}},
            "must be a method without",
        ),
        (
            {
                "methods": {
                    "a": {"config": "rlp.yaml"},
                    "b": {"config": "rlp.yaml", "match": "tokens", "like": "a", "cost_from": "a"},
                }
            },
            "cost_from 'a' needs match: flops",
        ),
        (
            {
                "methods": {
                    "a": {"config": "rlp.yaml"},
                    "b": {
                        "config": "rlp.yaml",
                        "set": {"objective": "ntp"},
                        "match": "flops",
                        "like": "a",
                        "cost_from": "a",
                    },
                }
            },
            "cost_from 'a' must have the same objective",
        ),
        (
            {
                "methods": {
                    "a": {"config": "rlp.yaml"},
                    "b": {"config": "rlp.yaml", "match": "flops", "like": "a"},
                },
                "common": {"optim": {"schedule": "cosine"}},
            },
            "must not depend on it, and cosine does: use constant, or match: steps",
        ),
        (
            {
                "methods": {
                    "a": {"config": "rlp.yaml"},
                    "b": {
                        "config": "rlp.yaml",
                        "set": {"optim": {"schedule": {"name": "wsd", "decay": 0.5}}},
                        "match": "steps",
                        "like": "a",
                    },
                },
                "common": {"optim": {"schedule": "wsd"}},
            },
            "same schedule as a: optim.schedule.decay was 0.2, is 0.5",
        ),
        (
            {
                "methods": {
                    "a": {"config": "rlp.yaml"},
                    "b": {"config": "rlp.yaml", "set": {"model": "other"}},
                }
            },
            "same base model: model.path was .* is 'other'",
        ),
    ],
)
def test_mistakes_show_before_any_training(corpus, tmp_path, changes, said, capsys):
    file = written(tmp_path, corpus, **changes)
    with pytest.raises(ConfigError, match=said):
        load_experiment(file)
    assert main(["compare", str(file)]) == 2
    assert "rlpretrain: " in capsys.readouterr().err
    assert not (tmp_path / "compared").exists()


def test_an_unknown_number_names_those_there_are(done, corpus, tmp_path):
    method = {"config": "rlp.yaml", "own": "lenght"}
    file = written(
        tmp_path, corpus, methods={"rlp": method}, output_dir=str(tmp_path / "compared"), seeds=[0]
    )
    shutil.copytree(done[0].parent / "compared", tmp_path / "compared")
    for wanted in (tmp_path / "compared").glob("*/wanted.json"):
        wanted.write_text(wanted.read_text().replace(str(done[0].parent), str(tmp_path)))
    with pytest.raises(ConfigError, match="own 'lenght' is not one of its numbers: .*length"):
        compare(file)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {
                "methods": {
                    "fine": {"config": "rlp.yaml"},
                    "bad": {"config": "rlp.yaml", "set": {"objective": {"marker": "nowhere"}}},
                }
            },
            "method bad: .*nowhere",
        ),
        (
            {
                "methods": {
                    "bad": {
                        "config": "rlp.yaml",
                        "set": {
                            "policy": {"zero_stage": 3, "lora": {"r": 2}},
                            "model": {"quantization": "4bit"},
                        },
                    }
                }
            },
            "method bad: .*ZeRO 3",
        ),
        (
            {
                "evaluation": {
                    "data": "held_out",
                    "objective": {"name": "rlp", "positions": "after", "marker": "nowhere"},
                }
            },
            "evaluation: .*nowhere",
        ),
        ({"evaluation": {"data": "nothing.jsonl"}}, "nothing.jsonl"),
    ],
)
def test_what_a_tokenizer_or_held_out_file_shows_is_known_before_any_training(
    corpus, tmp_path, changes, said
):
    if changes.get("evaluation", {}).get("data") == "held_out":
        changes["evaluation"]["data"] = str(corpus / "held_out.jsonl")
    file = written(tmp_path, corpus, **changes)
    with pytest.raises(ConfigError, match=said):
        compare(file)
    assert not (tmp_path / "compared").exists()


def test_a_failure_names_its_training(corpus, tmp_path):
    """The documents of one method are read only when that method is trained."""
    bad = {"config": "rlp.yaml", "set": {"data": {"path": str(tmp_path / "nothing.jsonl")}}}
    file = written(tmp_path, corpus, methods={"bad": bad}, seeds=[3])
    with pytest.raises(ConfigError, match="bad, seed 3: .*nothing"):
        compare(file)


def test_on_ray_it_gives_the_same(done, corpus, tmp_path):
    ray = pytest.importorskip("ray")
    file = written(tmp_path, corpus, ray="local", seeds=[0], methods={"rlp": {"config": "rlp.yaml"}})
    try:
        row = compare(file)["methods"]["rlp"]
    finally:
        ray.shutdown()
    there = json.loads((tmp_path / "compared" / "rlp-0" / "evaluation.json").read_text())
    here = json.loads((done[0].parent / "compared" / "rlp-0" / "evaluation.json").read_text())
    assert there["common"] == here["common"] and row["steps"] == [2]


def test_laying_over():
    below = {
        "objective": {"name": "rlp", "clip": 3.0},
        "optim": {"lr": 1.0, "schedule": "cosine"},
        "data": {"path": "a", "x": 1},
    }
    assert overlay(below, {"objective": {"clip": 2.0}})["objective"] == {"name": "rlp", "clip": 2.0}
    assert overlay(below, {"objective": {"name": "rpt", "strip": True}})["objective"] == {
        "name": "rpt",
        "strip": True,
    }
    assert overlay(below, {"objective": "ntp"})["objective"] == {"name": "ntp"}
    assert overlay({"objective": "rlp"}, {"objective": {"clip": 1.0}})["objective"] == {
        "name": "rlp",
        "clip": 1.0,
    }
    wsd = {"optim": {"schedule": {"name": "wsd", "decay": 0.5}}}
    assert overlay(wsd, {"optim": {"schedule": "linear"}}) == {"optim": {"schedule": {"name": "linear"}}}
    assert overlay(wsd, {"optim": {"schedule": {"shape": "sqrt"}}})["optim"]["schedule"] == {
        "name": "wsd",
        "decay": 0.5,
        "shape": "sqrt",
    }
    assert overlay({"average": "sma"}, {"average": {"kind": "ema", "decay": 0.9}})["average"] == {
        "kind": "ema",
        "decay": 0.9,
    }
    assert overlay(below, {"data": "b"})["data"] == {"path": "b", "x": 1}
    assert overlay(below, {"optim": {"lr": 2.0}})["optim"] == {"lr": 2.0, "schedule": "cosine"}
    assert below["optim"] == {"lr": 1.0, "schedule": "cosine"}
