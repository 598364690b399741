"""Bad input gets a clear error: what happened, where, and what to change. A run that is killed does no
harm.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlpretrain import Pretrainer, cli
from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.corpora import dial
from rlpretrain.files import CannotWrite
from rlpretrain.ranks import Ranks
from rlpretrain.rollouts import drawing
from rlpretrain.training import checkpoint
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from tests.builders.processes import python
from tests.builders.runs import merged, same, trained
from tests.builders.tiny import tiny_model, word_tokenizer


def start(values, resume=None, **changes) -> Run:
    """A run that is set up and not begun."""
    run = Run(build(merged(values, **changes)), resume)
    run.close()
    return run


def jsonl(path: Path, texts) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


# the configuration


@pytest.mark.parametrize(
    ("change", "key", "near"),
    [
        ({"max_step": 3}, "max_step", "max_steps"),
        ({"revison": "main"}, "revison", "revision"),  # a field of `model` may stand at the top
        ({"optim": {"learning": 1.0, "weight_deca": 0.1}}, "optim.weight_deca", "weight_decay"),
        ({"ntp_data": {"path": "x", "colum": "text"}}, "ntp_data.colum", "column"),
        ({"objective": {"name": "rlp", "marke": "shows"}}, "objective.marke", "marker"),
    ],
)
def test_a_misspelt_key_is_named_with_the_nearest_one(values, change, key, near):
    with pytest.raises(ConfigError, match=f"unknown key '{key}': did you mean '{near}'"):
        start(values, **change)


def test_a_temperature_too_small_is_refused(values):
    with pytest.raises(ConfigError, match=r"sampling\.temperature.*at least 0\.01, got temperature=0\.001"):
        start(values, sampling__temperature=0.001)


def test_a_key_like_no_other_lists_those_there_are(values):
    with pytest.raises(
        ConfigError, match="unknown key 'baseline.qqq': known here: name, decay, frozen_every"
    ):
        start(values, baseline={"qqq": 1})
    with pytest.raises(ConfigError, match="unknown key 'objective.qqq': known here: no fields"):
        start(values, objective={"name": "ntp", "qqq": 1})
    with pytest.raises(ConfigError, match="unknown objective 'rlpp': did you mean 'rlp'"):
        start(values, objective="rlpp")


def test_a_misspelt_key_on_the_command_line(values, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    for words, said in (
        (["--optim.warmup_step", "3"], "unknown key 'optim.warmup_step': did you mean 'warmup_steps'?"),
        (["--objective.mark", "x"], "unknown key 'objective.mark': did you mean 'marker'?"),
        (["--max_steps"], "'--max_steps' needs a value"),
        (
            ["--set", "optim.lr=1"],
            "a field is set by its own name: --optim.lr=1 in place of --set optim.lr=1",
        ),
        (["--zet", "1"], "unknown key 'zet': known here: "),  # not data.mixing.eta
        (["max_steps", "3"], "expected --field value, got 'max_steps'"),
        (["--max_steps", "[1"], "'--max_steps [1' is not YAML: "),
        (["--max_steps", "many"], "'max_steps'"),
    ):
        assert cli.main(["train", str(tmp_path / "c.yaml"), *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("rlpretrain: ") and said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"max_steps": 0},
        {"positions_per_step": 0},
        {"token_budget": 0},
        {"log_every": 0},
        {"checkpoint__keep": 0},
        {"sampling__temperature": -1.0},
        {"sampling__top_p": 0.0},
        {"sampling__max_thought_tokens": 0},
        {"stop__nonfinite": 0},
        {"eval__every": -1},
        {"checkpoint__every": -1},
        {"loss__inner_epochs": 0},
        {"baseline__decay": 1.5},
    ],
)
def test_numbers_out_of_range_are_refused_by_name(values, change):
    (name,) = change
    with pytest.raises(ConfigError, match=name.replace("__", r"\.")):
        build(merged(values, **change))


def test_a_missing_required_section(values):
    values.pop("data")
    with pytest.raises(ConfigError, match="'data' is required"):
        build(values)


def test_fewer_than_two_thoughts(values):
    with pytest.raises(ConfigError, match=r"sampling\.thoughts is 1: a group baseline needs at least 2"):
        start(values, sampling__thoughts=1)


def test_a_stream_needs_max_steps(values):
    with pytest.raises(ConfigError, match="give max_steps instead of epochs"):
        start(values, data__streaming=True, max_steps=None)


def test_positions_that_do_not_divide_over_ranks(values, monkeypatch):
    monkeypatch.setattr("rlpretrain.training.builder.join", lambda device: Ranks(0, 3))
    with pytest.raises(ConfigError, match="positions_per_step 4 does not divide over 3 ranks"):
        start(values)


# the data


def test_a_data_file_that_is_missing_or_empty(values, tmp_path):
    with pytest.raises(ConfigError, match=r"no such file or folder: .*nowhere\.jsonl"):
        start(values, data__path=str(tmp_path / "nowhere.jsonl"))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ConfigError, match=r"empty\.jsonl is empty: 0 bytes"):
        start(values, data__path=str(tmp_path / "empty.jsonl"))
    with pytest.raises(ConfigError, match=r"no such file or folder: .*held\.jsonl"):
        start(values, eval__data=str(tmp_path / "held.jsonl"))


def test_a_line_that_is_not_json_is_named(values, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "ann has 1"}\n{"text": "bob has 2"}\n{"text": oh\n')
    with pytest.raises(ConfigError, match=r"bad\.jsonl:3: not JSON"):
        start(values, data__path=str(bad))


def test_a_missing_text_column_lists_the_columns(values):
    with pytest.raises(ConfigError, match="has no column 'txt'; its columns: text, answer, depth, trace"):
        start(values, data__column="txt")


def test_short_documents_are_counted_and_said(values, tmp_path, capsys):
    data = jsonl(tmp_path / "d.jsonl", ["ann has 1 shows 1 ."] * 5 + ["ann"] * 2 + [""])
    run = start(values, data__path=data, objective__min_context=3, console=True)
    assert "3 documents shorter than 4 tokens left out" in capsys.readouterr().out
    assert json.loads((run.folder / "run.json").read_text())["documents_too_short"] == 3


def test_only_short_documents_are_an_error(values):
    with pytest.raises(ConfigError, match=r"no document has 41 tokens; 200 are blank or shorter"):
        start(values, objective__min_context=40)


def test_a_target_longer_than_what_is_left_of_any_document(values, monkeypatch):
    monkeypatch.setattr(drawing, "PATIENCE", 500)
    run = Run(build(merged(values, objective__target_length=5)), None)  # after "shows" there are three tokens
    with pytest.raises(
        ConfigError, match=r"documents in a row gave no position: .*`target_length` do not fit this data"
    ):
        train(run)
    run.close()
    assert 500 <= run.source.drawn < 600


def test_evaluation_data_that_would_fail_later_fails_now(values, tmp_path):
    one = jsonl(tmp_path / "one.jsonl", ["ann has 1 shows 1 ."])
    with pytest.raises(ConfigError, match="1 of 1 documents can be used .*; evaluation needs 2"):
        start(values, eval__data=one)
    none = jsonl(tmp_path / "none.jsonl", ["ann has 1 ."] * 3)
    with pytest.raises(ConfigError, match="0 of 3 documents can be used"):
        start(values, eval__data=none)


def test_a_context_beyond_the_models_positions(values):
    with pytest.raises(ConfigError, match="the model has 256 positions.*lower sampling.max_thought_tokens"):
        Pretrainer(build(merged(values, sampling__max_thought_tokens=300))).train()
    assert not Path(values["output_dir"], "run.json").exists(), "refused before the run begins"


# the model


def test_missing_delimiters_are_added_said_and_saved(values, tmp_path, capsys):
    words = [word for word in dial.WORDS if word not in (dial.OPEN, dial.CLOSE)]
    tokenizer = word_tokenizer(words)
    tokenizer.save_pretrained(tmp_path / "base")
    tiny_model("qwen3", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    Pretrainer(build(merged(values, model=str(tmp_path / "base"), console=True))).train()
    assert "added to the tokenizer: <think>, </think>" in capsys.readouterr().out

    saved = Path(values["output_dir"]) / "model"
    again, model = AutoTokenizer.from_pretrained(saved), AutoModelForCausalLM.from_pretrained(saved)
    ids = again.convert_tokens_to_ids(["<think>", "</think>"])
    assert ids == [len(tokenizer), len(tokenizer) + 1] and model.get_input_embeddings().weight.shape[
        0
    ] == len(again)
    assert again("<think> ann </think>")["input_ids"] == [ids[0], again.convert_tokens_to_ids("ann"), ids[1]]
    run = start(values, model=str(saved), output_dir=str(tmp_path / "second"))
    assert json.loads((run.folder / "run.json").read_text())["added_tokens"] == []


def test_a_model_folder_without_weights(values, corpus):
    with pytest.raises(ConfigError, match="a configuration without weights: from_scratch: true"):
        start(values, model=str(corpus / "model"))


def test_a_model_folder_that_does_not_exist(values, tmp_path):
    with pytest.raises(ConfigError, match=rf"no tokenizer in '{tmp_path}/gone'.*no such folder"):
        start(values, model=str(tmp_path / "gone"))
    with pytest.raises(
        ConfigError, match=rf"cannot load a causal language model from '{tmp_path}/gone'.*no such folder"
    ):
        start(values, model={"path": str(tmp_path / "gone"), "tokenizer": values["model"]})


def test_a_model_with_broken_weights(values, corpus, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(corpus / "base")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = math.nan
    shutil.copytree(corpus / "base", tmp_path / "base")
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"hold NaN or inf: model\.layers\.1\.mlp\.up_proj\.weight"):
        start(values, model=str(tmp_path / "base"))


def test_a_checkpoint_without_some_of_its_weights(values, corpus, tmp_path):
    from safetensors.torch import load_file, save_file

    file = Path(shutil.copytree(corpus / "base", tmp_path / "base")) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        ConfigError,
        match=r"lacks 1 weights of its model, for instance model\.layers\.1\.mlp\.up_proj\.weight",
    ):
        start(values, model=str(tmp_path / "base"))


@pytest.mark.parametrize(
    ("device", "said"), [("gpu", "is not one of auto, cpu, cuda"), ("cuda:0", "finds no CUDA device")]
)
def test_a_device_that_is_not_there(values, device, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=f"device '{device}'.*{said}"):
        start(values, device=device)


# folders and checkpoints


@pytest.fixture
def run_folder(finished, tmp_path):
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def resumable(values, folder, **changes):
    """The configuration that goes on in `folder` for two more steps."""
    return {"output_dir": str(folder), "max_steps": 8, "checkpoint": {"every": 2, "keep": 3}} | changes


def test_an_output_folder_that_holds_another_run(values, run_folder):
    with pytest.raises(ConfigError, match="holds another run: resume it .* or choose another output_dir"):
        start(values, output_dir=str(run_folder))


def test_an_output_folder_that_cannot_be_made(values, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="output_dir .* cannot be made"):
        start(values, output_dir=str(tmp_path / "file" / "run"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda c: (c / "state.json").unlink(), "state.json is missing"),
        (lambda c: os.truncate(c / "state.json", 100), "state.json is damaged"),
        (lambda c: (c / "state.json").write_text("{}"), "state.json is damaged"),
        (lambda c: os.truncate(c / "policy.pt", 1000), "policy.pt has 1000 bytes"),
        (lambda c: (c / "rank-0.pt").unlink(), "rank-0.pt is missing"),
    ],
)
def test_a_half_written_checkpoint_gives_way_to_the_one_before(values, run_folder, capsys, damage, said):
    damage(run_folder / "checkpoint-6")
    with pytest.raises(
        ConfigError, match=f"cannot resume from .*checkpoint-6: {said}"
    ):  # asked for by name: an error
        start(values, str(run_folder / "checkpoint-6"), **resumable(values, run_folder))
    run = start(values, "auto", **resumable(values, run_folder))
    assert run.step == 4 and said in capsys.readouterr().out


def test_a_checkpoint_that_is_not_there(values, run_folder):
    with pytest.raises(ConfigError, match="checkpoint-7: there is no such folder"):
        start(values, str(run_folder / "checkpoint-7"), **resumable(values, run_folder))


def test_resume_auto_begins_where_there_is_nothing_yet(values, tmp_path):
    assert same(trained(values, resume="auto", output_dir=str(tmp_path / "new" / "run")), trained(values))


def test_a_checkpoint_of_another_configuration(values, run_folder):
    with pytest.raises(ConfigError, match=r"optim\.lr was 0\.01, is 0\.5; seed was 0, is 1\. Use another"):
        start(values, "auto", **resumable(values, run_folder, optim__lr=0.5, seed=1))
    with pytest.raises(ConfigError, match="objective.min_context was 1, is 2"):
        start(values, "auto", **resumable(values, run_folder, objective__min_context=2))
    other = {"eval": {"every": 3}, "console": False, "log_every": 7, "max_steps": 9}
    assert start(values, "auto", **resumable(values, run_folder, **other)).step == 6


def test_a_checkpoint_of_another_number_of_ranks_or_backend(values, run_folder):
    state = run_folder / "checkpoint-6" / "state.json"
    written = json.loads(state.read_text())
    state.write_text(json.dumps(written | {"ranks": 2}))
    with pytest.raises(ConfigError, match="was written by 2 ranks, this run has 1, and TorchPolicy keeps"):
        checkpoint.read(state.parent, Ranks(), "TorchPolicy", {}, any_ranks=False)
    with pytest.raises(ConfigError, match="checkpoint-6: rank-1.pt is missing"):  # torch could use it
        start(values, "auto", **resumable(values, run_folder))
    state.write_text(json.dumps(written | {"backend": "DeepSpeedPolicy"}))
    with pytest.raises(
        ConfigError, match="was written by DeepSpeedPolicy, this run has TorchPolicy: set policy.backend"
    ):
        start(values, "auto", **resumable(values, run_folder))


@pytest.mark.parametrize("part", ["policy", "rank", "state", "rename"])
def test_an_error_while_a_checkpoint_is_written_leaves_the_last_one_good(values, tmp_path, monkeypatch, part):
    long = {"max_steps": 4, "checkpoint__every": 2, "checkpoint__keep": 1}
    whole = trained(values, output_dir=str(tmp_path / "whole"), **long)
    real = {"save": torch.save, "write": Path.write_text, "replace": Path.replace}
    second = "checkpoint-4"

    def save(what, path, *args, **kwargs):
        if second in str(path) and Path(path).name.startswith(part):
            Path(path).write_bytes(b"half")
            raise OSError("disk full")
        return real["save"](what, path, *args, **kwargs)

    def write(path, text, *args, **kwargs):
        if part == "state" and second in str(path):
            real["write"](path, text[:50])
            raise OSError("disk full")
        return real["write"](path, text, *args, **kwargs)

    def rename(path, target):
        if part == "rename" and second in str(path):
            raise OSError("disk full")
        return real["replace"](path, target)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        patch.setattr(Path, "write_text", write)
        patch.setattr(Path, "replace", rename)
        with pytest.raises(CannotWrite, match="checkpoint-4.*disk full.*newest whole checkpoint"):
            trained(values, **long)
    assert checkpoint.steps(Path(values["output_dir"])) == [2]
    assert same(whole, trained(values, resume="auto", **long))


KILLED = """
import json, os, signal, sys
from pathlib import Path
import torch
from rlpretrain import Pretrainer
from rlpretrain.config.io import build

save = torch.save

def killed(what, path, *args, **kwargs):
    if "checkpoint-4" in str(path) and Path(path).name == "rank-0.pt":
        Path(path).write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    return save(what, path, *args, **kwargs)

torch.save = killed
torch.set_num_threads(1)
Pretrainer(build(json.loads(sys.argv[1]))).train()
"""


def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_from_the_last_good_one(values, tmp_path):
    long = {"max_steps": 4, "checkpoint__every": 2}
    done = python("-c", KILLED, json.dumps(merged(values, **long)))
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    folder = Path(values["output_dir"])
    assert (
        checkpoint.steps(folder) == [2]
        and json.loads((folder / "run.json").read_text())["status"] == "running"
    )
    resumed = trained(values, resume="auto", **long)
    assert same(resumed, trained(values, output_dir=str(tmp_path / "whole"), **long))
    assert json.loads((folder / "run.json").read_text())["status"] == "done"


def test_what_is_no_model_is_named(corpus, tmp_path):
    """Without its files transformers makes an empty tokenizer of a configuration; then the data seemed to
    be blank.
    """
    from rlpretrain.config import ModelConfig
    from rlpretrain.models import load_tokenizer

    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((corpus / "base" / "config.json").read_text())
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "run.json").write_text("{}")
    for folder, said in (
        (tmp_path / "bare", "none of its files is there"),
        (tmp_path / "adapter", "it is an adapter"),
        (tmp_path, f"the model is {tmp_path}/model"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_tokenizer(ModelConfig(path=str(folder)))
