"""What a user writes reaches the field it is for: text stays text, numbers are numbers, paths know `~`
(issue 15.19, 15.26).
"""

from __future__ import annotations

import ast
import dataclasses
import gc
import json
import typing
from pathlib import Path

import pytest
import yaml

from rlpretrain import cli
from rlpretrain.config import ConfigError, EngineConfig, PretrainConfig
from rlpretrain.config.io import build, load_config, to_dict
from rlpretrain.config.names import dotted, field_types, inner
from rlpretrain.experiments.loading import load_experiment
from rlpretrain.objectives import config_of, parse_section

WORDS = [
    "7864e12",
    "1234567",
    "0012",
    "1_000",
    "2024-01-01",
    "12:30",
    "yes",
    "off",
    "true",
    "1e5",
    ".5",
    "0x1f",
    "[think]",
    "# Answer",
    "a: b",
    "Note: {context}",
    "[1",
    "'",
    "-",
    "@x",
    "%d",
]
"""What YAML reads as something else than text, or not at all."""


def text_fields() -> list[str]:
    """The dotted names of all fields of a run that take any text."""
    found = []
    for name in dotted(PretrainConfig):
        owner: typing.Any = PretrainConfig
        for part in name.split("."):
            kind = inner(field_types(owner)[part])
            owner = kind
        # The first takes a list too. `mixing` needs sources beside it: tests/test_mixing_edges.py.
        if kind is str and name != "policy.lora.target_modules" and ".mixing." not in name:
            found.append(name)
    return found


def beside(name: str) -> list[str]:
    """The words that a field needs: those that choose an engine that has it, or a second model."""
    if name.startswith("reference.") and name != "reference.path":
        return ["--reference.path=x"]
    engines = ("hf", "vllm_server", "sglang_server", "ray") if name.startswith("engine.") else ()
    kinds = (kind for kind in engines if name.removeprefix("engine.") in EngineConfig(name=kind).__dict__)
    return [f"--engine.name={kind}" for kind in kinds][:1]


def at(config: PretrainConfig, name: str):
    found: typing.Any = to_dict(config)
    for part in name.split("."):
        found = found[part]
    return found


@pytest.fixture
def file(values, tmp_path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_fields_that_take_text():
    assert {"model.path", "model.revision", "data.column", "data.answer_join", "output_dir"} <= set(
        text_fields()
    )


@pytest.mark.parametrize("word", WORDS)
def test_text_on_the_command_line_stays_text(file, word):
    for name in text_fields():
        assert at(load_config(file, ["--ntp_data=x", *beside(name), f"--{name}={word}"]), name) == word, name
    if ": " not in word:
        assert load_config(file, ["--model", word]).model.path == word  # a section by its head
    assert load_config(file, ["--revision", word]).model.revision == word
    assert load_config(file, [f"--revision={word}"]).model.revision == word  # a field of `model` beside it
    assert load_config(file, ["--model.tokenizer", "null"]).model.tokenizer is None
    assert (
        load_config(file, ["--data.column", f'"{word}"' if "'" in word else f"'{word}'"]).data.column == word
    )  # in quotes


@pytest.mark.parametrize("word", WORDS)
def test_text_of_an_objective_stays_text(file, word):
    loaded = load_config(
        file,
        ["--objective.marker", word, "--objective.close", word, "--objective.min_context", "3"],
        config_of,
    )
    _, config = parse_section(loaded.objective)
    assert (config.marker, config.close, config.min_context) == (word, word, 3)
    json.dumps(loaded.objective)  # and nothing else than plain values is left
    assert type(loaded.objective["marker"]) is str


@pytest.mark.parametrize("word", ["7864e12", "1234567", "0012", "2024-01-01", "yes", "12:30", "1e5"])
def test_text_in_a_file_stays_text(values, tmp_path, word):
    lines = yaml.safe_dump({k: v for k, v in values.items() if k not in ("model", "objective")})
    path = tmp_path / "c.yaml"
    path.write_text(
        f"{lines}\nmodel: {{path: base, revision: {word}}}\nobjective: {{marker: {word}, every: 8}}\n"
        f"ntp_data: {{path: x, meta_columns: [{word}, b]}}\n"
    )
    loaded = load_config(path, (), config_of)
    assert loaded.model.revision == word and loaded.ntp_data.meta_columns == (word, "b")
    assert (loaded.objective["marker"], loaded.objective["every"]) == (word, 8)


def test_text_in_an_experiment_stays_text(values, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "e.yaml").write_text(
        "methods:\n  a: {config: run.yaml, set: "
        "{objective: {marker: 0012, every: 4}, model: {revision: 7864e12}}}\n"
        "common: {objective: {close: 2024-01-01}, optim: {lr: 1e-4}, data: {column: yes}}\n"
        "evaluation: {data: {path: x, column: 12e3}, objective: {name: rlp, marker: 1_0}}\nseeds: [3]\n"
    )
    experiment = load_experiment(tmp_path / "e.yaml")
    from rlpretrain.experiments.experiment import Job

    config = Job(experiment=experiment, name="a", seed=3, where=tmp_path).config()
    assert (config.model.revision, config.data.column, config.optim.lr) == ("7864e12", "yes", 1e-4)
    assert (
        config.objective["marker"] == "0012"
        and config.objective["close"] == "2024-01-01"
        and config.objective["every"] == 4
    )
    assert experiment.evaluation.data.column == "12e3" and experiment.evaluation.objective["marker"] == "1_0"


def test_numbers_truths_and_nulls_are_read_as_before(file):
    words = [
        "--optim.lr",
        "1e-4",
        "--max_steps=10",
        "--stop.collapse",
        "no",
        "--policy.lora",
        "{r: 4}",
        "--epochs",
        "null",
        "--optim.betas",
        "[.8, .9]",
        "--engine.name",
        "vllm_server",
        "--engine.urls",
        "[http://a:1, http://b:2]",
        "--policy.lora.target_modules",
        "[q_proj, v_proj]",
        "--report_to",
        "tensorboard",
        "--sampling.top_p",
        "0.5",
        "--data.answer_join",
        "",
    ]
    config = load_config(file, words)
    assert (config.optim.lr, config.max_steps, config.stop.collapse, config.epochs) == (1e-4, 10, False, None)
    assert config.policy.lora is not None and config.policy.lora.r == 4
    assert config.policy.lora.target_modules == ("q_proj", "v_proj") and config.data.answer_join == ""
    assert config.optim.betas == (0.8, 0.9) and config.engine.urls == ("http://a:1", "http://b:2")
    options = [
        "--engine.name=vllm_local",
        "--engine.options",
        "{max_num_seqs: 4, enforce_eager: true, x: 1e-3}",
    ]
    assert load_config(file, options).engine.options == {"max_num_seqs": 4, "enforce_eager": True, "x": 1e-3}
    assert config.report_to == ("tensorboard",) and config.sampling.top_p == 0.5
    assert load_config(file, ["--objective", "{name: rlp, every: 3}"], config_of).objective == {
        "name": "rlp",
        "every": 3,
    }


@pytest.mark.parametrize("given", ["nan", ".nan", "inf", "-.inf", "1e999"])
@pytest.mark.parametrize(
    "name", ["optim.lr", "loss.policy_coef", "sampling.cut_penalty", "objective.clip", "stop.flops"]
)
def test_no_number_is_nan_or_infinite(file, name, given):
    with pytest.raises(ConfigError, match=name):
        parse_section(load_config(file, [f"--{name}={given}"], config_of).objective)


def test_no_number_is_nan_in_python_either(values):
    section, leaf = "loss", "ntp_coef"
    with pytest.raises(ConfigError, match=r"loss\.ntp_coef"):
        build(values | {section: {leaf: float("nan")}})
    with pytest.raises(ConfigError, match=r"objective\.discount"):
        parse_section({"name": "rlp", "discount": float("inf")})


@pytest.mark.parametrize(
    "name", ["seed", "max_steps", "sampling.thoughts", "optim.lr", "objective.every", "objective.clip"]
)
def test_a_truth_value_is_no_number(file, values, name):
    with pytest.raises(ConfigError, match=f"'{name}': expected a number, got true"):
        parse_section(load_config(file, [f"--{name}", "true"], config_of).objective)
    *section, leaf = name.split(".")
    with pytest.raises(ConfigError, match=f"'{name}': expected a number, got true"):
        changed = values | (
            {section[0]: {**values.get(section[0], {}), leaf: True}} if section else {leaf: True}
        )
        parse_section(build(changed).objective)


@pytest.mark.parametrize("seed", ["-1", "4294967296"])
def test_a_seed_that_not_all_libraries_take_is_refused(file, seed, corpus, capsys):
    with pytest.raises(ConfigError, match="'seed'"):
        load_config(file, ["--seed", seed])
    for words in (
        ["eval", str(corpus / "base"), "--data", "x"],
        ["inspect", str(corpus / "base"), "--text", "x"],
        ["prepare", str(corpus / "base"), "--data", "x", "--out", "y"],
        ["corpus", "dial", "--out", "y"],
    ):
        with pytest.raises(SystemExit):
            cli.main([*words, "--seed", seed])
        assert "a seed is a whole number from 0 to 4294967295" in capsys.readouterr().err


def path_fields() -> set[str]:
    """Fields whose sentence speaks of a folder or file of the user's."""
    return {
        "model.path",
        "model.tokenizer",
        "model.config_beside",
        "data.path",
        "policy.deepspeed_config",
        "engine.weights_dir",
        "engine.token_file",
        "ntp_data.path",
        "eval.data",
        "eval.include_path",
        "output_dir",
        "reference.path",
        "reference.tokenizer",
        "replay",
    }


def test_a_tilde_is_the_home_folder_in_every_path_field(file, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    for name in path_fields():
        assert (
            at(load_config(file, ["--ntp_data=x", *beside(name), f"--{name}", "~/x/*.jsonl"]), name)
            == "/home/ann/x/*.jsonl"
        ), name
    assert load_config(file, ["--ntp_data", "~/y"]).ntp_data.path == "/home/ann/y"
    assert load_config(file, ["--data", "hub/name"]).data.path == "hub/name"


class ParsesWhenCollected:
    """Garbage of a cycle whose finalizer parses Python, and makes the next such garbage."""

    left = 1000

    def __init__(self):
        self.itself = self

    def __del__(self):
        ast.parse("x = 1")
        ParsesWhenCollected.left -= 1
        if ParsesWhenCollected.left > 0:
            ParsesWhenCollected()


def test_the_fields_are_read_while_garbage_collections_parse_python():
    from rlpretrain.config import io

    before = gc.get_threshold()
    io._class_bodies.cache_clear()
    gc.set_threshold(50, 2, 2)
    ParsesWhenCollected()
    try:
        rows = io.describe(PretrainConfig)
    finally:
        gc.set_threshold(*before)
        began, ParsesWhenCollected.left = ParsesWhenCollected.left, 0
        gc.collect()
    assert began < 1000, "no collection ran: this test shows nothing"
    assert all(row.meaning for row in rows if row.name.startswith("engine."))


def test_every_field_that_speaks_of_a_path_is_one_of_them():
    from rlpretrain.config.io import describe

    speaks = {
        name
        for name, _, meaning in describe(PretrainConfig)
        if "folder" in meaning.lower() or "file" in meaning.lower()
    }
    others = {"data.column", "data.answer_column", "engine.transfer", "save_rollouts", "policy.lora"}
    assert {n for n in speaks if n in text_fields()} <= path_fields() | others


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("optim.learning_rate", "optim.lr"),
        ("learning_rate", "optim.lr"),
        ("batch_size", "positions_per_step"),
        ("num_generations", "sampling.thoughts"),
        ("max_completion_length", "sampling.max_thought_tokens"),
        ("sampling.max_new_tokens", "sampling.max_thought_tokens"),
        ("temperature", "sampling.temperature"),
        ("lr", "optim.lr"),
        ("objective.thoughts", "sampling.thoughts"),
        ("optim.ntp_coef", "loss.ntp_coef"),
        ("max_seq_length", "data.max_length"),
        ("num_train_epochs", "epochs"),
        ("lora_r", "policy.lora.r"),
    ],
)
def test_the_usual_name_of_another_library_suggests_ours(file, name, ours):
    with pytest.raises(ConfigError, match=f"unknown key '{name}': .*'{ours}'"):
        parse_section(load_config(file, [f"--{name}", "1"], config_of).objective)


def test_every_alias_names_a_field():
    from rlpretrain.config.names import ALIASES

    assert set(ALIASES.values()) <= set(dotted(PretrainConfig))
    tops = {f.name for f in dataclasses.fields(PretrainConfig)}
    assert not set(ALIASES) & tops


def test_an_error_in_a_file_names_the_file_and_the_line(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    for text, said in (
        ("model: a\ndata: [\n", f"{path} is not YAML: line 3, column 1"),
        ("model: a\ndata: b\nmax_steps: many\n", f"(in {path}, line 3)"),
        ("model: a\ndata: b\noptim: {lrr: 3}\n", f"'optim.lrr': did you mean 'lr'? (in {path}, line 3)"),
        ("data: b\n\noptim:\n  # rate\n  lr: -1\nmodel: a\n", f"(in {path}, line 5)"),
        ("model: a\n", f"'data' is required (in {path})"),  # it has no line
        ("data:\n  max_length: 3\n  paths: x\nmodel: a\n", f"(in {path}, line 1)"),
        ("model: a\ndata: b\nloss: {clip: 1}\nmix:\n", f"(in {path}, line 3)"),  # the first of two
    ):
        path.write_text(text)
        assert cli.main(["train", str(path)]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1 and "unicode string" not in error
    path.write_text("methods: {a: {config: x.yaml, sett: {}}}\nevaluation: {data: x}\n")
    assert cli.main(["compare", str(path)]) == 2
    assert f"(in {path}, line 1)" in capsys.readouterr().err
    path.write_text("model: a\noptim: {lr: -1}\ndata: b\n")
    assert cli.main(["train", str(path), "--optim.lr", "-2"]) == 2
    assert f"(in {path}, or in its overrides)" in capsys.readouterr().err
    path.write_bytes(b"model: \xff\xfe")
    assert cli.main(["train", str(path)]) == 2
    assert f"{path} cannot be read" in capsys.readouterr().err


def test_an_objective_is_given_by_name_yaml_or_file(tmp_path, values):
    """issue 15.19: `eval`, `inspect` and `prepare` take `--objective FILE`."""
    from rlpretrain.commands.arguments import objective_section

    section = {"name": "rlp", "marker": "0012", "every": 4}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values | {"objective": section}))
    (tmp_path / "section.yml").write_text("name: rlp\nmarker: 0012\nevery: 4\n")
    (tmp_path / "short.yaml").write_text("model: a\ndata: b\nobjective: rpt\n")
    for given in (
        str(tmp_path / "run.yaml"),
        str(tmp_path / "section.yml"),
        "{name: rlp, marker: 0012, every: 4}",
    ):
        assert objective_section(given) == section
    assert objective_section(str(tmp_path / "short.yaml")) == objective_section("rpt") == {"name": "rpt"}
    mine = "tests.builders.my_objective:LengthObjective"
    assert objective_section(mine) == {"name": mine}
    (tmp_path / "none.yaml").write_text("model: a\ndata: b\n")
    for given, said in (
        (str(tmp_path / "gone.yaml"), "there is no such file"),
        ("3", "objective '3'"),
        ("[rlp]", "a name, "),
        (str(tmp_path / "none.yaml"), "no objective section"),
        ("rlpp", "did you mean 'rlp'"),
    ):
        with pytest.raises(ConfigError, match=said):
            objective_section(given)


def test_evaluation_every_0_steps_is_one_at_the_end(corpus, values):
    """issue 15.26: what `checkpoint.every: 0` means of checkpoints, `eval.every: 0` means of evaluations."""
    from rlpretrain import Pretrainer

    evaluation = {"data": str(corpus / "held_out.jsonl"), "documents": 4, "thoughts": 2, "every": 0}
    Pretrainer(build(values | {"eval": evaluation, "max_steps": 2})).train()
    rows = [
        json.loads(line) for line in (Path(values["output_dir"]) / "metrics.jsonl").read_text().splitlines()
    ]
    assert ["eval/gain" in row for row in rows] == [False, True]
    assert not list(Path(values["output_dir"]).glob("checkpoint-*"))
