"""`rlpretrain compare` with sampled answers: pass@k and verified@k of every model."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlpretrain.config import ConfigError, DataConfig
from rlpretrain.config.io import build
from rlpretrain.data.stream import read_all
from rlpretrain.evaluation.answers import AnswerRule, evaluate_answers
from rlpretrain.evaluation.pass_at_k import pass_at_k
from rlpretrain.experiments.compare import compare, differences, part_tables, tasks
from rlpretrain.objectives import load_objective
from rlpretrain.verdict import Verdict
from tests.builders.configs import tiny_values
from tests.builders.experiments import small_evaluation

NUMBERS = [f"{name}@{k}, thinking" for name in ("pass", "verified") for k in (1, 2)]


def short(question: str, trace: str, answer: str) -> Verdict:
    """Verified if the answer has an even number of letters; half of the steps are always right."""
    return Verdict(process=0.5, answer_right=True, verified=len(answer) % 2 == 0)


def written(folder: Path, corpus: Path, **pass_at: Any) -> Path:
    """Two trainings, of which one is a control that barely moves."""
    values = tiny_values(corpus, folder / "unused") | {"objective": "ntp", "threads": 1, "max_steps": 2}
    (folder / "ntp.yaml").write_text(yaml.safe_dump(values))
    texts = [json.loads(line)["text"] for line in (corpus / "held_out.jsonl").read_text().splitlines()]
    pairs = [text.partition(" shows ") for text in texts]
    rows = [{"question": f"{before} shows", "answer": after} for before, _, after in pairs]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(folder / "questions.jsonl"), "column": "question", "max_length": 64}
    data |= {"answer_column": "answer", "answer_join": " "}
    evaluation = small_evaluation(folder / "questions.jsonl")
    evaluation |= {"data": data, "objective": {"name": "rlp", "positions": "answer"}, "own": False}
    evaluation["pass_at"] = {"ks": [1, 2], "verifier": f"{__name__}:short", "tokens": 3} | pass_at
    methods = {"ntp": {"config": "ntp.yaml"}, "still": {"config": "ntp.yaml", "set": {"optim": {"lr": 1e-9}}}}
    experiment = {"methods": methods, "evaluation": evaluation, "seeds": [0, 1]}
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(experiment | {"output_dir": str(folder / "compared")}))
    return file


def test_every_model_samples_answers(corpus, tmp_path):
    file, said = written(tmp_path, corpus), []
    results = compare(file, say=said.append)
    folder = tmp_path / "compared"
    assert "parts" not in results
    assert set(results["tasks"]) >= {"base", "ntp", "still", "ntp - base", "still - base", "still - ntp"}
    assert {*NUMBERS, "pass@1, direct", "pass@2, direct", "process, thinking"} == set(results["tasks"]["ntp"])
    stored = json.loads((folder / "ntp-1" / "evaluation.json").read_text())["answers"]
    model = AutoModelForCausalLM.from_pretrained(folder / "ntp-1" / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "ntp-1" / "model")
    config = build(
        {"model": "x", "objective": {"name": "rlp", "positions": "answer"}}
        | {"data": yaml.safe_load(file.read_text())["evaluation"]["data"]}
        | {"sampling": {"max_thought_tokens": 6}}
    )
    documents = read_all(DataConfig(**_data(config)), tokenizer, limit=12, seed=0)
    answers = evaluate_answers(
        model,
        load_objective(config, tokenizer),
        documents,
        thinking=True,
        n=2,
        ks=(1, 2),
        seed=1,
        max_answer_tokens=3,
        rule=AnswerRule(),
        verifier=short,
    )
    assert stored["pass@2, thinking"]["examples"] == pass_at_k(answers.correct, 2).tolist()
    assert answers.verdicts is not None
    assert stored["verified@1, thinking"]["examples"] == pass_at_k(answers.verdicts.verified, 1).tolist()
    assert stored["process, thinking"]["value"] == pytest.approx(answers.verdicts.process.mean())
    means = [np.mean(of_seed(folder, "ntp", seed)["verified@1, thinking"]["examples"]) for seed in (0, 1)]
    assert results["tasks"]["ntp"]["verified@1, thinking"][0] == pytest.approx(np.mean(means))
    assert results["tasks_by_seed"]["ntp"]["verified@1, thinking"] == pytest.approx(means)
    console = Console(width=400)
    with console.capture() as shown:
        console.print(tasks(results))
    assert "verified@2, thinking" in shown.get()
    assert "verified@2, thinking" in (folder / "results.csv").read_text()
    again: list[str] = []
    assert compare(file, say=again.append) == results and not any("evaluated" in line for line in again)
    assert any("evaluated" in line for line in said)


def of_seed(folder: Path, name: str, seed: int) -> dict[str, Any]:
    return json.loads((folder / f"{name}-{seed}" / "evaluation.json").read_text())["answers"]


def test_answers_are_counted_for_each_value_of_a_column(corpus, tmp_path):
    file = written(tmp_path, corpus, by="kind")
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    kinds = ["k10", "k9", "k9"]
    lines = [json.dumps(row | {"kind": kinds[i % 3]}) + "\n" for i, row in enumerate(rows)]
    (tmp_path / "questions.jsonl").write_text("".join(lines))
    values = yaml.safe_load(file.read_text())
    values["evaluation"]["data"]["meta_columns"] = ["kind"]
    values["methods"]["ntp"]["against"] = ["still"]  # which comes after it
    file.write_text(yaml.safe_dump(values))
    results = compare(file, say=lambda line: None)
    for numbers in (results["tasks"], *results["parts"].values()):
        assert list(numbers)[3:] == ["ntp - base", "ntp - still", "still - base", "still - ntp"]
        there, back = (numbers[pair]["pass@1, direct"] for pair in ("ntp - still", "still - ntp"))
        assert there == pytest.approx([-back[0], -back[2], -back[1]])
    with (console := Console(width=200)).capture() as shown:
        console.print(differences(results))
    assert "ntp - still" in shown.get()
    parts, folder = results["parts"], tmp_path / "compared"
    assert list(parts) == ["k9", "k10"]  # as numbers, not as texts
    record = json.loads((folder / "ntp-0" / "evaluation.json").read_text())
    sizes = {part: record["parts"].count(part) for part in parts}
    assert sum(sizes.values()) == len(record["parts"]) and min(sizes.values()) > 0
    for name in ("base", "ntp", "still", "still - ntp"):
        weighted = sum(parts[part][name]["pass@1, direct"][0] * sizes[part] for part in parts)
        assert weighted / len(record["parts"]) == pytest.approx(results["tasks"][name]["pass@1, direct"][0])
    for seed in (0, 1):
        of_seed = json.loads((folder / f"ntp-{seed}" / "evaluation.json").read_text())
        assert of_seed["parts"] == record["parts"]
    examples = of_seed["answers"]["verified@1, thinking"]["examples"]
    own = [value for value, part in zip(examples, of_seed["parts"], strict=True) if part == "k10"]
    first = record["answers"]["verified@1, thinking"]["examples"]
    before = [value for value, part in zip(first, record["parts"], strict=True) if part == "k10"]
    by_seed = results["parts_by_seed"]["k10"]["ntp"]["verified@1, thinking"]
    assert by_seed == pytest.approx([np.mean(before), np.mean(own)])
    own += before
    lines = list(csv.reader((folder / "results.csv").read_text().splitlines()))
    (line,) = (line for line in lines if line[:2] == ["ntp", "k10: verified@1, thinking"])
    assert [float(value) for value in line[5:]] == pytest.approx(by_seed)
    assert parts["k10"]["ntp"]["verified@1, thinking"][0] == pytest.approx(np.mean(own))
    console = Console(width=400)
    with console.capture() as shown:
        for table in part_tables(parts, ["base", "ntp"]):
            console.print(table)
    assert "verified@2, thinking" in shown.get() and "k10" in shown.get()
    assert "k10: verified@2, thinking" in (folder / "results.csv").read_text()
    assert "verified@2, thinking" in (folder / "answers.svg").read_text()


@pytest.mark.parametrize("name", ["ntp", "base", "stil"])
def test_a_method_is_against_another_one(corpus, tmp_path, name):
    file = written(tmp_path, corpus)
    values = yaml.safe_load(file.read_text())
    values["methods"]["ntp"]["against"] = [name]
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=f"method ntp: against '{name}' is not another method"):
        compare(file, say=lambda line: None)


def test_a_column_with_too_many_values_is_refused_before_any_training(corpus, tmp_path):
    file = written(tmp_path, corpus, by="question")
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    many = [row | {"id": k} for k, row in enumerate(rows)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    values = yaml.safe_load(file.read_text())
    values["evaluation"]["data"]["meta_columns"] = ["id"]
    values["evaluation"]["pass_at"]["by"] = "id"
    values["evaluation"]["documents"] = len(many)
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=rf"column id has {len(many)} different values"):
        compare(file)
    assert not list((tmp_path / "compared").glob("ntp-*"))


def _data(config: Any) -> dict[str, Any]:
    fields = ("path", "column", "max_length", "answer_column", "answer_join")
    return {name: getattr(config.data, name) for name in fields}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"answers": 1}, "pass_at.answers is 1: pass@2 needs that many"),
        ({"verifier": "tests.nowhere:f"}, "evaluation.pass_at.verifier"),
        ({"ks": [0]}, "pass_at.ks"),
        ({"by": "kind"}, r"name it in evaluation\.data\.meta_columns"),
    ],
)
def test_settings_that_cannot_be_used_show_before_any_training(corpus, tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        compare(written(tmp_path, corpus, **changes))
    assert not list((tmp_path / "compared").glob("ntp-*"))


def test_answers_need_a_column(corpus, tmp_path):
    file = written(tmp_path, corpus)
    values = yaml.safe_load(file.read_text())
    del values["evaluation"]["data"]["answer_column"]
    values["evaluation"]["data"].pop("answer_join")
    values["evaluation"]["objective"] = {"name": "rlp", "positions": "random"}
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"set data\.answer_column there"):
        compare(file)
