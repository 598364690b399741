"""`rlpretrain compare`: a searched rate, a second stage from a method's model, the order of trainings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM

from rlpretrain.config import ConfigError, ModelConfig
from rlpretrain.experiments.budgets import last_row
from rlpretrain.experiments.compare import compare, logged, searches
from rlpretrain.experiments.curves import make_curve, read_logs
from rlpretrain.experiments.experiment import Job
from rlpretrain.experiments.jobs import all_jobs, stage_of, training_to_do
from rlpretrain.experiments.loading import load_experiment
from rlpretrain.experiments.search import chosen_values, read_trials
from tests.builders.configs import tiny_values
from tests.builders.experiments import small_evaluation
from tests.builders.processes import warm

RATES = [1e-6, 2e-3]
"""A rate that learns nothing in three steps, and one that learns."""
WSD = {"schedule": {"name": "wsd", "decay": 1.0}, "warmup_steps": 0}


def written(folder: Path, corpus: Path, **changes: Any) -> Path:
    """NTP with a searched rate, RLP, and RLP as a second stage of both."""
    values = tiny_values(corpus, folder / "unused") | {"optim": {"lr": 1e-3}, "threads": 1, "max_steps": 3}
    (folder / "rlp.yaml").write_text(yaml.safe_dump(values))
    held_out = (corpus / "held_out.jsonl").read_text().splitlines(keepends=True)
    (folder / "search.jsonl").write_text("".join(held_out[12:]))
    (folder / "held_out.jsonl").write_text("".join(held_out[:12]))
    second = {"config": "rlp.yaml", "set": {"max_steps": 1}}
    experiment = {
        "methods": {
            "then_rlp": {**second, "after": "ntp"},  # before those that it needs: order is not the file's
            "ntp": {
                "config": "rlp.yaml",
                "set": {"objective": "ntp"},
                "match": "tokens",
                "like": "rlp",
                "search": {"optim.lr": RATES},
            },
            "rlp": {"config": "rlp.yaml", "set": {"optim": WSD}},
            "steps": {
                "config": "rlp.yaml",
                "set": {"objective": "ntp", "max_steps": 9, "optim": WSD},
                "match": "steps",
                "like": "rlp",
            },
            "all_at_once": {
                "config": "rlp.yaml",
                "set": {"objective": "ntp"},
                "match": "tokens",
                "like": "then_rlp",
                "with_stages": True,
            },
            "rest": {
                "config": "rlp.yaml",
                "set": {"objective": "ntp"},
                "after": "ntp",
                "match": "flops",
                "like": "then_rlp",
                "with_stages": True,
            },
        },
        "evaluation": small_evaluation(folder / "held_out.jsonl")
        | {"search_data": {"path": str(folder / "search.jsonl"), "max_length": 64}, "own": False},
        "seeds": [0, 1],
        "jobs": 2,
        "output_dir": str(folder / "compared"),
    } | changes
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(experiment))
    return file


@pytest.fixture(scope="module")
def done(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished comparison and its results."""
    warm()
    folder = tmp_path_factory.mktemp("stages")
    file = written(folder, corpus)
    return file, compare(file)


def test_the_searched_rate_is_the_one_with_the_lowest_loss_on_the_search_documents(done):
    file, results = done
    search = results["methods"]["ntp"]["search"]
    losses = []
    for place, rate in enumerate(RATES):
        folder = file.parent / "compared" / f"ntp-0-try{place}"
        measured = json.loads((folder / "evaluation.json").read_text())
        assert measured["settings"]["evaluation"]["data"]["path"].endswith("search.jsonl")
        assert json.loads((folder / "wanted.json").read_text())["optim"]["lr"] == rate
        losses.append(np.average(measured["common"]["no_think_loss"], weights=measured["common"]["tokens"]))
    assert losses[1] < losses[0] - 0.01
    assert [trial["score"] for trial in search["tried"]] == pytest.approx(losses)
    assert search["chosen"] == {"optim.lr": RATES[1]}
    assert not (file.parent / "compared" / "ntp-1-try0").exists()  # the first seed alone tries
    for seed in (0, 1):
        wanted = json.loads((file.parent / "compared" / f"ntp-{seed}" / "wanted.json").read_text())
        assert wanted["optim"]["lr"] == RATES[1]
        stored = json.loads((file.parent / "compared" / f"ntp-{seed}" / "evaluation.json").read_text())
        assert stored["settings"]["evaluation"]["data"]["path"].endswith("held_out.jsonl")
    logs = [file.parent / "compared" / f"ntp-0-try{place}" for place in range(2)]
    spent = [last_row(folder)["num_flops"] for folder in logs]
    assert search["flops"] == sum(spent)
    console = Console(width=160)
    with console.capture() as shown:
        console.print(searches(results))
    assert "optim.lr 0.002" in shown.get()


def test_the_same_steps_with_the_same_schedule_and_curves_over_both(done):
    file, _ = done
    for seed in (0, 1):
        rlp, ntp = (
            [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            for folder in (file.parent / "compared" / f"{name}-{seed}" for name in ("rlp", "steps"))
        )
        rates = [row["learning_rate"] for row in ntp]
        assert rates == [row["learning_rate"] for row in rlp]
        assert rates == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    folders = [file.parent / "compared" / f"steps-{seed}" for seed in (0, 1)]
    logs = read_logs(folders)
    curve = make_curve(logs, "ntp/loss")
    assert curve is not None and make_curve(logs, "eval/no_think_loss") is None
    assert curve.values.tolist() == [[row["ntp/loss"] for row in log] for log in logs]
    tokens = [[row["num_input_tokens"] for row in log] for log in logs]
    assert curve.along["num_input_tokens"].tolist() == np.mean(tokens, 0).tolist()
    assert curve.along["step"].tolist() == [1, 2, 3]
    drawn = (file.parent / "compared" / "curves.svg").read_text()
    assert "tokens of documents" in drawn and "next-token loss (nats)" in drawn


def test_a_second_stage_starts_from_the_first_ones_model_and_is_measured_against_the_base(done, corpus):
    file, results = done
    wanted = json.loads((file.parent / "compared" / "then_rlp-1" / "wanted.json").read_text())
    assert wanted["model"]["path"] == str(file.parent / "compared" / "ntp-1" / "model")

    def weights(path: Path) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(path)
        return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])

    base = json.loads((file.parent / "compared" / "rlp-1" / "wanted.json").read_text())["model"]["path"]
    first, second = (weights(file.parent / "compared" / name / "model") for name in ("ntp-1", "then_rlp-1"))
    assert 0 < (second - first).norm() < (second - weights(Path(base))).norm()
    assert set(results["methods"]) == {*("base", "then_rlp", "ntp", "rlp", "steps", "all_at_once", "rest")}
    assert "then_rlp - ntp" in results["differences"]


def test_a_budget_can_count_earlier_stages(done):
    file, results = done
    folder = file.parent / "compared"
    for seed in (0, 1):
        ntp, then, whole, rest = (
            json.loads((folder / f"{name}-{seed}" / "metrics.jsonl").read_text().splitlines()[-1])
            for name in ("ntp", "then_rlp", "all_at_once", "rest")
        )
        wanted = json.loads((folder / f"all_at_once-{seed}" / "wanted.json").read_text())
        assert wanted["stop"]["input_tokens"] == ntp["num_input_tokens"] + then["num_input_tokens"]
        assert whole["num_input_tokens"] >= wanted["stop"]["input_tokens"] > ntp["num_input_tokens"]
        wanted = json.loads((folder / f"rest-{seed}" / "wanted.json").read_text())
        assert wanted["stop"]["flops"] == pytest.approx(then["num_flops"])
        assert rest["num_flops"] >= wanted["stop"]["flops"] > 0
    spent = results["methods"]["then_rlp"]["spent"]
    own = results["methods"]["ntp"]["spent"]["flops"] + spent["flops"]
    assert spent["flops_with_stages"] == pytest.approx(own)
    assert "flops_with_stages" not in results["methods"]["rlp"]["spent"]


def test_a_budget_that_the_stages_have_spent_is_refused(done):
    file, _ = done
    experiment = load_experiment(file)
    rest = replace(experiment.methods["rest"], after="then_rlp", like="ntp")
    experiment = replace(experiment, methods=experiment.methods | {"rest": rest})
    with pytest.raises(
        ConfigError, match=r"have spent .* flops, and the budget, that of ntp with its stages"
    ):
        training_to_do(Job(experiment=experiment, name="rest", seed=0, where=file.parent))


def test_counting_stages_needs_a_budget(corpus, tmp_path):
    file = written(tmp_path, corpus)
    values = yaml.safe_load(file.read_text())
    values["methods"]["rlp"]["with_stages"] = True
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match="with_stages needs match: flops or match: tokens"):
        load_experiment(file)


def test_models_trained_from_scratch_are_evaluated_not_new_ones(corpus, tmp_path):
    """Also by tasks, and as the start of a second stage; only the base is random weights."""
    values = tiny_values(corpus, tmp_path / "unused") | {
        "objective": "ntp",
        "optim": {"lr": 1e-2},
        "threads": 1,
    }
    values |= {"model": {"path": str(corpus / "base"), "from_scratch": True}, "max_steps": 3}
    (tmp_path / "ntp.yaml").write_text(yaml.safe_dump(values))
    experiment = {
        "methods": {"ntp": {"config": "ntp.yaml"}, "again": {"config": "ntp.yaml", "after": "ntp"}},
        "evaluation": small_evaluation(corpus / "held_out.jsonl") | {"own": False},
        "output_dir": str(tmp_path / "compared"),
        "seeds": [0],
    }
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(experiment))
    compare(file)
    losses = {}
    for name in ("base", "ntp", "again"):
        folder = tmp_path / "compared" / f"{name}-0"
        losses[name] = np.mean(
            json.loads((folder / "evaluation.json").read_text())["common"]["no_think_loss"]
        )
        if name != "base":
            wanted = json.loads((folder / "run.json").read_text())["config"]["model"]["from_scratch"]
            assert wanted is (name == "ntp")
    assert losses["base"] - losses["ntp"] > 0.1 and losses["ntp"] - losses["again"] > 0.1
    saved = ModelConfig(path=str(corpus / "base"), from_scratch=True, quantization="none").saved_at("x")
    assert saved == ModelConfig(path="x")


def test_what_the_runs_measured_themselves_is_in_the_results(corpus, tmp_path):
    values = tiny_values(corpus, tmp_path / "unused") | {"objective": "ntp", "optim": {"lr": 1e-2}}
    held_out = str(corpus / "held_out.jsonl")
    values |= {"eval": {"data": {"held": held_out, "same": held_out}, "every": 2, "documents": 6}}
    values |= {"data": {"sources": {"held": values["data"], "same": values["data"]}}, "max_steps": 3}
    (tmp_path / "ntp.yaml").write_text(yaml.safe_dump(values))
    experiment = {
        "methods": {
            "plain": {"config": "ntp.yaml"},
            "averaged": {"config": "ntp.yaml", "set": {"average": "sma"}},
        },
        "evaluation": small_evaluation(corpus / "held_out.jsonl") | {"own": False, "objective": "ntp"},
        "output_dir": str(tmp_path / "compared"),
        "seeds": [0, 1],
    }
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(experiment))
    results = compare(file)
    numbers = {name: row.get("logged") for name, row in results["methods"].items()}
    last = [last_row(tmp_path / "compared" / f"averaged-{seed}") for seed in (0, 1)]
    assert numbers["base"] is None
    assert {"eval/no_think_loss", "eval/held/no_think_loss"} <= set(numbers["plain"])
    assert set(numbers["averaged"]) - set(numbers["plain"]) >= {"eval_averaged/same/no_think_loss"}
    for name, (mean, low, high, *by_seed) in numbers["averaged"].items():
        assert by_seed == [row[name] for row in last]
        assert mean == pytest.approx(np.mean(by_seed))
        half = 12.706 * np.std(by_seed, ddof=1) / np.sqrt(2)
        assert [low, high] == pytest.approx([mean - half, mean + half], rel=1e-3)
    console = Console(width=400)
    with console.capture() as shown:
        console.print(logged(results))
    assert "eval_averaged/no_think_loss" in shown.get()
    drawn = (tmp_path / "compared" / "curves.svg").read_text()
    assert "held-out loss of held (nats)" in drawn and "held-out loss of same (nats)" in drawn
    assert "averaged,eval_averaged/no_think_loss," in (tmp_path / "compared" / "results.csv").read_text()


def test_a_training_starts_after_those_that_it_needs(done):
    file, _ = done
    experiment = load_experiment(file)
    stages = {job.folder.name: stage_of(job) for job in all_jobs(experiment, file.parent)}
    assert stages["rlp-0"] == stages["base-1"] == 0
    assert stages["ntp-0-try0"] == stages["ntp-0-try1"] == 1
    assert stages["ntp-0"] == stages["ntp-1"] == 2
    assert stages["then_rlp-0"] == 3


def test_what_is_done_is_not_done_again_and_other_values_are_refused(done, corpus, tmp_path):
    file, _ = done
    experiment = load_experiment(file)
    for job in all_jobs(experiment, file.parent):
        assert job.method is None or training_to_do(job) is None
    other = written(tmp_path, corpus, output_dir=str(file.parent / "compared"))
    values = yaml.safe_load(other.read_text())
    values["methods"]["ntp"]["search"] = {"optim.lr": [RATES[0], 1e-3]}
    other.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"ntp-0-try1 has other settings: optim.lr was 0.002, is 0.001"):
        compare(other)


def test_a_number_that_nothing_has_is_named(done):
    file, _ = done
    values = yaml.safe_load(file.read_text())
    values["methods"]["ntp"]["search_by"] = "perplexity"
    changed = file.with_name("changed.yaml")
    changed.write_text(yaml.safe_dump(values))
    experiment = load_experiment(changed)
    with pytest.raises(ConfigError, match="search_by 'perplexity' is not one of .*gain_frozen"):
        training_to_do(Job(experiment=experiment, name="ntp", seed=0, where=file.parent))


def test_positions_without_a_value_do_not_decide_a_search(done, tmp_path):
    """A number may be missing at single positions; the mean is over the others, as in every table."""
    file, _ = done
    experiment = replace(load_experiment(file), output_dir=str(tmp_path))
    ntp = replace(experiment.methods["ntp"], search_by="gain_frozen")
    experiment = replace(experiment, methods=experiment.methods | {"ntp": ntp})
    for place, gains in enumerate(([1.0, None, 3.0], [1.5, 1.5, 1.5])):
        folder = tmp_path / f"ntp-0-try{place}"
        folder.mkdir()
        common = {"gain_frozen": gains, "rows": ["0", "1", "2"]}
        (folder / "evaluation.json").write_text(json.dumps({"common": common}))
    job = Job(experiment=experiment, name="ntp", seed=0, where=file.parent)
    assert [trial["score"] for trial in read_trials(job)] == [2.0, 1.5]
    assert chosen_values(job) == {"optim.lr": RATES[0]}
