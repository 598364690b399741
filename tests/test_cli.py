"""The command line, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rlpretrain import cli
from rlpretrain.corpora import dial
from rlpretrain.tracking.metrics import METRICS


@pytest.fixture
def config(values, tmp_path) -> str:
    """The small configuration as a YAML file."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def said(capsys) -> dict:
    """What a training run came to: its last line is short, and names the file with the numbers."""
    last = capsys.readouterr().out.splitlines()[-1]
    assert len(last) < 400 and "{" not in last
    result = json.loads(Path(last.rpartition("numbers: ")[2]).read_text())
    assert last.startswith(f"{result['steps']} steps") and f"model: {result['model']}" in last
    return result


def test_corpus(tmp_path, capsys):
    words = ["corpus", "dial", "--out", str(tmp_path), "--base", "30", "--train", "20", "--held-out", "6"]
    assert cli.main([*words, "--mix", "d1", "--depths", "2,3", "--held-out-depths", "2-4"]) == 0
    out = capsys.readouterr().out
    names = ("base", "train", "held_out")
    lines = {n: [json.loads(x) for x in (tmp_path / f"{n}.jsonl").read_text().splitlines()] for n in names}
    assert len(lines["base"]) == 30 and {row["depth"] for row in lines["train"]} == {2, 3}
    assert [row["depth"] for row in lines["held_out"]] == [2, 3, 4, 2, 3, 4]
    assert all(
        str(tmp_path / name) in out for name in ("base.jsonl", "train.jsonl", "held_out.jsonl", "model")
    )


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--mix", "b10"], "unknown mix 'b10': one of b9"),
        (["--depths", "4-1"], "depths are written 1-4 or 1,2,5, not '4-1'"),
        (["--held-out-depths", "0,1"], "depths are written"),
        (["--depths", "deep"], "depths are written"),
    ],
)
def test_corpus_errors(tmp_path, capsys, words, error):
    assert (
        cli.main(
            [
                "corpus",
                "dial",
                "--out",
                str(tmp_path),
                "--base",
                "1",
                "--train",
                "1",
                "--held-out",
                "1",
                *words,
            ]
        )
        == 2
    )
    assert capsys.readouterr().err.startswith(f"rlpretrain: {error}")


def test_train_with_fields_set_on_the_command_line(config, values, capsys):
    words = ["--optim.lr", "1e-4", "--max_steps=2", "--sampling.thoughts", "3", "--optim.betas", "[0.8, 0.9]"]
    assert cli.main(["train", config, *words, "--checkpoint.every", "1", "--baseline", "none"]) == 0
    result, folder = said(capsys), Path(values["output_dir"])
    assert result["steps"] == 2 and result["model"] == str(folder / "model") and result["stopped"] is None
    used = json.loads((folder / "run.json").read_text())["config"]
    assert (
        used["optim"]["lr"] == 1e-4
        and used["optim"]["betas"] == [0.8, 0.9]
        and used["sampling"]["thoughts"] == 3
    )
    assert used["baseline"]["name"] == "none" and used["baseline"]["frozen_every"] == 10
    assert used["optim"]["warmup_steps"] == 2  # from the file

    rows = (folder / "metrics.jsonl").read_text().splitlines()
    again = [*words, "--checkpoint.every", "1", "--baseline", "none", "--max_steps", "4"]
    assert cli.main(["train", config, *again]) == 2
    assert "holds another run" in capsys.readouterr().err
    assert cli.main(["train", config, *again, "--resume", "auto"]) == 0
    assert said(capsys)["steps"] == 4
    assert (folder / "metrics.jsonl").read_text().splitlines()[:2] == rows
    assert cli.main(["train", config, *again, "--max_steps", "5", "--resume"]) == 0  # auto is what it means
    assert said(capsys)["steps"] == 5


def test_train_goes_on_from_a_checkpoint_by_name(config, values, finished, tmp_path, capsys):
    words = ["--max_steps", "7", "--output_dir", str(tmp_path / "new"), "--checkpoint.every", "2"]
    assert cli.main(["train", config, *words, "--resume", str(finished / "checkpoint-4")]) == 0
    assert said(capsys)["steps"] == 7
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [5, 6, 7]


def test_fields(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["train", "--fields"]) == 0
    out = capsys.readouterr().out
    for field, default, meaning in (
        ("optim.lr", "1e-06", "Peak learning rate"),
        ("sampling.cut", "mask", "did not close itself"),
        ("data.path", "required", "File"),
        ("objective.target_length (rlp)", "1", "Tokens predicted after the thought"),
        ("objective.discount (rlp)", "1.0", "target token"),
    ):
        (line,) = [x for x in out.splitlines() if f" {field} " in x]
        assert default in line and meaning in line


def test_metrics(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["metrics"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in METRICS)


def test_eval(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    words = [
        "eval",
        str(corpus / "base"),
        "--data",
        str(corpus / "held_out.jsonl"),
        "--by",
        "depth",
        "--documents",
        "12",
        "--thoughts",
        "2",
        "--max-thought-tokens",
        "4",
        "--objective",
        "{name: rlp, positions: after, marker: shows}",
        "--device",
        "cpu",
    ]
    assert cli.main([*words, "--json", str(tmp_path / "out.json")]) == 0
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "out.json").read_text())
    rows = [json.loads(line) for line in (corpus / "held_out.jsonl").read_text().splitlines()]
    assert [d["depth"] for d in rows[:12]] == [1, 2, 3, 4, 5, 6] * 2
    assert set(results) <= {"all", "1", "2", "3", "4", "5", "6"} and len(results) > 2
    names = {
        "think_sampled",
        "think_greedy",
        "direct",
        "gain",
        "gain_frozen",
        "empty",
        "shuffled",
        "other",
        "no_think_loss",
        "unclosed",
        "length",
    }
    assert results["all"].keys() == names | {f"{name}_ci" for name in names}
    assert results["all"]["gain"] == results["all"]["gain_frozen"]
    assert all(name in out for name in names) and "all (12)" in out
    assert f"{results['all']['no_think_loss']:.3f} [{results['all']['no_think_loss_ci'][0]:.3f}" in out
    assert list(tmp_path.glob("*.tmp")) == []

    assert cli.main([*words, "--frozen", str(corpus / "base"), "--json", str(tmp_path / "twin.json")]) == 0
    twin = json.loads((tmp_path / "twin.json").read_text())
    assert twin["all"]["gain"] == pytest.approx(results["all"]["gain"], abs=1e-5)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["train"], "which configuration?"),
        (["train", "nowhere.yaml"], "no such config file: nowhere.yaml (it comes first: "),
        (["train", "{config}", "--sampling.thoughts", "1"], "sampling.thoughts is 1"),
        (["train", "{config}", "--sed", "1"], "unknown key 'sed': did you mean 'seed'?"),
        (["train", "{config}", "--res", "auto"], "unknown key 'res'"),  # not an abbreviation
        (["train", "{config}", "--model", "{tmp}/gone"], "no tokenizer in '{tmp}/gone': no such folder"),
        (["eval", "{base}"], "no documents to evaluate on: give --data FILE"),
        (["eval", "{base}", "--data", "{tmp}/gone.jsonl"], "no such file or folder: {tmp}/gone.jsonl"),
        (
            ["eval", "{base}", "--data", "{data}", "--by", "colour"],
            "{data} has no column 'colour'; its columns: text",
        ),
        (
            ["eval", "{base}", "--data", "{data}", "--objective", "{{name: rlp"],
            "--objective {{name: rlp is not YAML",
        ),
        (["eval", "{base}", "--data", "{data}", "--objective", "{{name: rl}}"], "unknown objective 'rl'"),
        (
            ["eval", "{base}", "--data", "{data}", "--json", "{tmp}/gone/x.json"],
            "--json {tmp}/gone/x.json: there is no such",
        ),
        (["eval", "{base}", "--data", "{data}", "--dtype", "float8"], "'model.dtype'"),
        (
            ["eval", "{base}", "--data", "{data}", "--documents", "1", "--max-thought-tokens", "4"],
            "thoughts of another",
        ),
        (["eval", "{base}", "--data", "{data}", "--thoughts", "0"], "'eval.thoughts'"),
        (
            ["eval", "{base}", "--data", "{data}", "--max-thought-tokens", "999"],
            "the model has 256 positions, but",
        ),
    ],
)
def test_errors_are_one_line_without_a_traceback(config, corpus, tmp_path, capsys, words, error):
    places = {"config": config, "tmp": tmp_path, "base": corpus / "base", "data": corpus / "held_out.jsonl"}
    assert cli.main([word.format(**places) for word in words]) == 2
    out = capsys.readouterr().err
    assert (
        out.startswith(f"rlpretrain: {error.format(**places)}")
        and out.count("\n") == 1
        and "Traceback" not in out
    )


def test_a_config_that_is_not_yaml(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    for text, error in (
        ("model: [", "is not YAML"),
        ("- a\n- b\n", "must hold a mapping of keys, found list"),
    ):
        path.write_text(text)
        assert cli.main(["train", str(path)]) == 2
        assert error in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["trian"], ["corpus", "dial"], ["metrics", "--all"], ["eval"]])
def test_wrong_usage_exits_with_the_usage(words, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(words)
    assert error.value.code == 2 and "usage: rlpretrain" in capsys.readouterr().err


def test_the_dials_words_are_the_models(corpus):
    assert len(dial.tokenizer()) == len(dial.WORDS) == dial.model_config().vocab_size


def test_as_a_module(monkeypatch, capsys):
    """`python -m rlpretrain`; and an objective may be given by its name alone."""
    import runpy

    from rlpretrain.commands.arguments import objective_section

    monkeypatch.setattr("sys.argv", ["rlpretrain", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("rlpretrain", run_name="__main__")
    assert not end.value.code and "inspect" in capsys.readouterr().out
    assert objective_section("rlp") == {"name": "rlp"} and objective_section("{clip: 1}") == {"clip": 1}
