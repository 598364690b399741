"""Endings and folders (issue 15.15 to 15.17, 15.25): branches, guards, permissions, signals, full disks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, GenerationConfig

from rlpretrain import Pretrainer, cli, models
from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.corpora import dial
from rlpretrain.files import CannotWrite, check_writable, writing
from rlpretrain.ranks import Ranks
from rlpretrain.training import checkpoint, same_settings
from rlpretrain.training.interruption import Interrupted
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from rollout.folders import MARK, begin_folder, finish_folder, remove_folder
from rollout.store import Store
from rollout.weights import write_adapter, write_weights
from tests.builders.processes import ROOT, alone, python
from tests.builders.runs import merged, same, weights

LONG = {"checkpoint__every": 2, "checkpoint__keep": 2}


def rows(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def status(folder: Path) -> str:
    return json.loads((folder / "run.json").read_text())["status"]


# 15.15: resuming from an older checkpoint


def test_what_came_after_an_older_checkpoint_is_set_aside_and_auto_follows_the_new_branch(
    values, tmp_path, capsys
):
    run = merged(values, save_rollouts=True, console=True, **LONG)
    folder = Path(values["output_dir"])
    Pretrainer(build(merged(run, max_steps=6))).train()
    (folder / "nonfinite").mkdir()
    (folder / "nonfinite" / "step-5-rank-0.json").write_text("{}")
    before = {p.name: p.stat().st_ino for p in folder.glob("checkpoint-*")}
    assert list(before) and checkpoint.steps(folder) == [4, 6]
    again = Run(build(merged(run, max_steps=5)), str(folder / "checkpoint-4"))
    assert "moved what the run wrote after step 4 to" in capsys.readouterr().out
    (aside,) = folder.glob("abandoned-*")
    assert checkpoint.steps(folder) == [4] and checkpoint.steps(aside) == [6]  # at once, before any step
    assert (aside / "checkpoint-6").stat().st_ino == before["checkpoint-6"]
    assert rows(folder) == [1, 2, 3, 4] and rows(aside) == [5, 6]
    assert Store(folder / "rollouts").steps() == [1, 2, 3, 4] and Store(aside / "rollouts").steps() == [5, 6]
    assert (aside / "nonfinite" / "step-5-rank-0.json").exists() and (aside / "model").is_dir()
    assert json.loads((aside / "run.json").read_text())["step"] == 6
    train(again)
    again.end()
    again.close()
    assert checkpoint.latest(folder)[0] == folder / "checkpoint-5" and rows(folder) == [1, 2, 3, 4, 5]
    on = Run(build(merged(run, max_steps=6)), "auto")
    on.close()
    assert on.resumed_from == folder / "checkpoint-5"


class Part:
    def save(self, path: Path) -> None:
        (path / "part.bin").write_bytes(b"1234")


def test_age_is_when_a_checkpoint_was_written_not_its_number(tmp_path):
    for step in (6, 8, 3):  # 3 belongs to a branch that began at 2, in a folder that an older version mixed
        checkpoint.save(tmp_path, step, Ranks(), {"part": Part()}, {"config": {}}, {})
    assert checkpoint.latest(tmp_path)[0] == tmp_path / "checkpoint-3"
    checkpoint.rotate(tmp_path, keep=1, best=None)
    assert checkpoint.steps(tmp_path) == [3]


def test_a_run_that_begins_again_without_a_checkpoint_keeps_what_was_there(values):
    run = merged(values, max_steps=3, checkpoint__every=0)
    folder = Path(values["output_dir"])
    Pretrainer(build(run)).train()
    with pytest.raises(ConfigError, match=r"optim\.lr was"):  # another run is not begun over it either
        Run(build(merged(run, optim__lr=0.5)), "auto")
    assert (folder / "model").is_dir()
    Run(build(run), "auto").close()
    (aside,) = folder.glob("abandoned-*")
    assert (
        rows(aside) == [1, 2, 3]
        and rows(folder) == []
        and weights(aside / "model")
        and not (folder / "model").exists()
    )


# 15.16: guards of what is there


def test_a_checkpoint_of_another_run_is_not_mixed_into_a_folder_that_holds_one(values, tmp_path):
    for name in "ab":
        Pretrainer(
            build(merged(values, max_steps=2, output_dir=str(tmp_path / name), checkpoint__every=1))
        ).train()
    before = sorted(p.name for p in (tmp_path / "b").iterdir())
    into_b = build(merged(values, max_steps=3, output_dir=str(tmp_path / "b"), checkpoint__every=1))
    with pytest.raises(ConfigError, match="holds another run, and the two would mix"):
        Run(into_b, str(tmp_path / "a" / "checkpoint-1"))
    (tmp_path / "b" / "run.json").unlink()
    with pytest.raises(ConfigError, match="holds another run"):  # what is left of it counts
        Run(into_b, str(tmp_path / "a" / "checkpoint-1"))
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [n for n in before if n != "run.json"]
    fork = build(merged(values, max_steps=3, output_dir=str(tmp_path / "c"), checkpoint__every=1))
    run = Run(fork, str(tmp_path / "a" / "checkpoint-1"))  # a new folder is a branch
    run.close()
    assert run.step == 1 and checkpoint.steps(tmp_path / "a") == [1, 2]


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("resume", [None, "auto"])
def test_the_base_folder_is_never_the_output(values, tmp_path, marked, resume):
    base = Path(
        shutil.copytree(
            values["model"]["path"] if isinstance(values["model"], dict) else values["model"],
            tmp_path / "model",
        )
    )
    if marked:  # a model that an earlier run wrote, taken as a base now
        (base / MARK).touch()
    files = {p.name: p.read_bytes() for p in base.iterdir()}
    with pytest.raises(ConfigError, match="model.path is .*writes its own 'model' there"):
        Run(build(merged(values, model={"path": str(base)}, output_dir=str(tmp_path))), resume)
    assert {p.name: p.read_bytes() for p in base.iterdir()} == files
    with (
        pytest.raises(ConfigError, match="model exists, and no run wrote it") if not marked else nullcontext()
    ):
        Run(build(merged(values, output_dir=str(tmp_path))), resume).close()  # with another base
    assert {p.name: p.read_bytes() for p in base.iterdir()} == files


def test_only_what_we_wrote_is_deleted(tmp_path):
    theirs = tmp_path / "model"
    theirs.mkdir()
    (theirs / "mine.txt").write_text("mine")
    moved = finish_folder(begin_folder(theirs), theirs)
    assert moved is not None and (moved / "mine.txt").read_text() == "mine" and (theirs / MARK).exists()
    assert remove_folder(theirs) is None and not theirs.exists()
    for step in (1, 2, 3):  # another trainer's
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    for step in (7, 8):
        checkpoint.save(tmp_path, step, Ranks(), {"part": Part()}, {"config": {}}, {})
    checkpoint.rotate(tmp_path, keep=1, best=None)
    assert checkpoint.steps(tmp_path) == [1, 2, 3, 8]
    checkpoint.save(tmp_path, 3, Ranks(), {"part": Part()}, {"config": {}}, {})
    assert [p.name[:19] for p in tmp_path.glob("checkpoint-3.*")] == ["checkpoint-3.before"]


def test_weights_of_a_sync_leave_folders_of_others_alone(tmp_path):
    (tmp_path / "version-1").mkdir()
    (tmp_path / "version-1" / "mine.txt").write_text("mine")
    write_weights(tmp_path / "version-1", {"w": torch.zeros(2)})
    assert [p.read_text() for p in tmp_path.glob("version-1.before-*/mine.txt")] == ["mine"]


def test_a_corpus_does_not_replace_files_of_others(tmp_path):
    (tmp_path / "train.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match="train.jsonl exists, and is not part of a corpus"):
        dial.write(tmp_path, base=1, train=1, held_out=1)
    assert (tmp_path / "train.jsonl").read_text() == "mine" and list(tmp_path.iterdir()) == [
        tmp_path / "train.jsonl"
    ]
    for _ in range(2):  # its own may be made again
        dial.write(tmp_path / "ours", base=1, train=1, held_out=1)


def base_with(values, tmp_path, **ends) -> str:
    base = Path(
        shutil.copytree(
            values["model"]["path"] if isinstance(values["model"], dict) else values["model"],
            tmp_path / "base",
        )
    )
    known = GenerationConfig.from_model_config(AutoConfig.from_pretrained(base)).to_dict()
    (base / "generation_config.json").write_text(json.dumps(known | ends))
    return str(base)


@pytest.mark.parametrize(
    "ends",
    [
        {"temperature": 0.6, "top_p": 0.9, "do_sample": False},
        {"length_penalty": 0.8},
        {"top_k": 20, "early_stopping": True},
        {"pad_token_id": -1, "output_scores": True},
    ],
)
def test_settings_of_a_base_that_greedy_decoding_ignores_do_not_fail_the_end(values, tmp_path, ends):
    path = base_with(values, tmp_path, **ends)
    Pretrainer(build(merged(values, model={"path": path}, max_steps=1))).train()
    GenerationConfig.from_pretrained(Path(values["output_dir"]) / "model").validate(strict=True)


def test_sampling_settings_of_a_base_are_kept(values, tmp_path):
    path = base_with(values, tmp_path, temperature=0.6, top_p=0.9, do_sample=True)
    Pretrainer(build(merged(values, model={"path": path}, max_steps=1))).train()
    kept = GenerationConfig.from_pretrained(Path(values["output_dir"]) / "model")
    assert (kept.temperature, kept.top_p, kept.do_sample) == (0.6, 0.9, True)


def test_what_cannot_be_saved_is_known_before_the_first_step(values, tmp_path, monkeypatch):
    load = models.load_with_tokenizer

    def refused(*args, **kwargs):
        model, tokenizer, added = load(*args, **kwargs)
        model.generation_config.num_return_sequences = 3  # no setting that could be dropped
        return model, tokenizer, added

    monkeypatch.setattr(models, "load_with_tokenizer", refused)
    with pytest.raises(ConfigError, match="could not be saved at the end.*num_return_sequences"):
        Run(build(values), None)
    assert not list(Path(values["output_dir"]).iterdir())


# 15.17: permissions and machines


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_follow_the_umask(values, tmp_path, mask):
    before = os.umask(mask)
    try:
        folders = [tmp_path / "version-1", tmp_path / "adapter"]
        write_weights(folders[0], {"w": torch.zeros(2)})
        folders[1].mkdir()
        write_adapter(folders[1], {"w": torch.zeros(2)}, {})
        model, tokenizer, _ = models.load_with_tokenizer(build(values).model, None)
        models.save_start(model, tokenizer, tmp_path / "start")
        found = {
            p.name: p.stat().st_mode & 0o777
            for f in (*folders, tmp_path / "start")
            for p in f.rglob("*")
            if p.is_file()
        }
    finally:
        os.umask(before)
    assert "adapter_model.safetensors" in found and "model.safetensors" in found
    assert set(found.values()) == {0o666 & ~mask}, found


def test_a_trained_model_with_adapters_can_be_read_by_others(values):
    before = os.umask(0o022)
    try:
        Pretrainer(build(merged(values, max_steps=1, policy={"lora": {"r": 2}}, checkpoint__every=1))).train()
    finally:
        os.umask(before)
    folder = Path(values["output_dir"])
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    assert {p.stat().st_mode & 0o777 for p in folder.rglob("*") if p.is_file()} == {0o644}


def test_machines_may_change_on_resume_and_numbers_may_not():
    def settings(**engine):
        return {
            "engine": {
                "name": "vllm_server",
                "urls": ["http://a:1"],
                "dtype": None,
                "in_flight": 4,
                **engine,
            },
            "seed": 0,
        }

    moved = {
        "urls": ["http://b:2", "http://c:3"],
        "request_timeout": 9.0,
        "deadline": 3.0,
        "weights_dir": "/x",
        "concurrency": 2,
        "token_file": "t",
        "transfer": "nccl",
        "master_address": "m",
        "num_engines": 3,
    }
    same_settings.check_same(settings(), settings(**moved), Path("x"))
    for field, value in {
        "name": "hf",
        "dtype": "float16",
        "in_flight": 2,
        "max_staleness": 1,
        "batch_size": 3,
    }.items():
        with pytest.raises(ConfigError, match=f"engine.{field} was"):
            same_settings.check_same(
                settings(**{"batch_size": 256, "max_staleness": 0}),
                settings(**({"batch_size": 256, "max_staleness": 0} | {field: value})),
                Path("x"),
            )


# 15.25: signals


def interrupted_at(run: Run, step: int, number: int) -> None:
    """Send this process a signal within a step."""
    take = run.next_batch

    def spy():
        if run.step + 1 == step:
            os.kill(os.getpid(), number)
        return take()

    run.next_batch = spy


@pytest.mark.parametrize(("number", "every"), [(signal.SIGINT, 0), (signal.SIGTERM, 4)])
def test_a_signal_finishes_the_step_and_writes_a_checkpoint(values, tmp_path, monkeypatch, number, every):
    whole = Pretrainer(build(merged(values, max_steps=4, output_dir=str(tmp_path / "whole")))).train()
    run = merged(values, max_steps=4, checkpoint__every=every)
    begin = Run.__init__

    def signalled(self, *args):
        begin(self, *args)
        interrupted_at(self, 2, number)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "__init__", signalled)
        handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
        with pytest.raises(
            Interrupted, match="after step 2 of 4: checkpoint-2 is written, go on with --resume auto"
        ):
            Pretrainer(build(run)).train()
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    folder = Path(values["output_dir"])
    assert (
        status(folder) == "interrupted"
        and checkpoint.steps(folder) == [2]
        and not (folder / "model").exists()
    )
    Pretrainer(build(run)).train(resume="auto")
    assert same(weights(folder / "model"), weights(Path(whole["model"]))) and status(folder) == "done"
    assert not list(folder.glob("abandoned-*"))


SCRIPT = """
import os, resource, signal, sys, time
from rlpretrain import cli
from rlpretrain.training.run import Run
begin, mode = Run.__init__, sys.argv[1]
if mode == "small files":  # no file may grow over 40 kB: what a full disk looks like to whoever writes
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
def patched(self, *args):
    begin(self, *args)
    take = self.next_batch
    def spy():
        if self.step == 1 and (mode in ("once", "twice") or mode == "one rank" and self.ranks.rank == 1):
            os.kill(os.getpid(), signal.SIGINT)
            if mode == "twice":
                time.sleep(2.1)
                os.kill(os.getpid(), signal.SIGINT)
        return take()
    self.next_batch = spy
Run.__init__ = patched
sys.exit(cli.main(sys.argv[2:]))
"""


def command(tmp_path: Path, values: dict, mode: str, *launcher: str) -> subprocess.CompletedProcess:
    """`rlpretrain train` with the changes of SCRIPT; a `launcher` starts interpreters of its own."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    words = [str(tmp_path / "script.py"), mode, "train", str(tmp_path / "c.yaml")]
    environment = alone() | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if not launcher:
        return python(*words, folder=tmp_path, environment=environment)
    words = [sys.executable, *launcher, *words]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200, cwd=tmp_path)


def test_the_command_line_says_how_to_go_on_in_one_line(values, tmp_path):
    done = command(tmp_path, merged(values, max_steps=9), "once")
    lines = [line for line in done.stderr.splitlines() if line.startswith("rlpretrain:")]
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert lines == [
        f"rlpretrain: SIGINT after step 2 of 9: checkpoint-2 is written, go on with --resume auto: "
        f"rlpretrain train {tmp_path / 'c.yaml'} --resume auto"
    ]
    assert "SIGINT: finishing the step under way" in done.stderr


def test_a_second_ctrl_c_stops_at_once(values, tmp_path):
    done = command(tmp_path, merged(values, max_steps=9, checkpoint__every=1), "twice")
    folder = Path(values["output_dir"])
    assert done.returncode == 130 and "Traceback" not in done.stderr and "stopped at once" in done.stderr
    assert status(folder) == "interrupted" and checkpoint.steps(folder) == [1]


@pytest.mark.slow
def test_a_signal_to_one_rank_ends_both_behind_the_same_step(values, tmp_path):
    two = merged(values, max_steps=9, positions_per_step=4)
    done = command(
        tmp_path, two, "one rank", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"
    )
    folder = Path(values["output_dir"])
    assert status(folder) == "interrupted" and checkpoint.steps(folder) == [2], done.stderr[-3000:]
    assert "go on with --resume auto" in done.stderr and (folder / "checkpoint-2" / "rank-1.pt").exists()


# 15.25: full disks, folders that cannot be written


@pytest.mark.parametrize("backend", ["torch", "fsdp", "deepspeed"])
def test_a_full_disk_is_named_and_the_last_checkpoint_stands(values, tmp_path, backend):
    run = merged(values, max_steps=3, checkpoint__every=2, policy={"backend": backend})
    done = command(tmp_path, run, "small files")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("rlpretrain:")]
    assert (
        "cannot write" in line and "checkpoint-2" in line and "There is no checkpoint yet: make room" in line
    )
    folder = Path(values["output_dir"])
    assert status(folder) == "failed" and not list(folder.glob(".checkpoint*"))


@pytest.mark.parametrize("kind", ["torch", "safetensors", "text"])
def test_whoever_writes_the_reason_is_named(tmp_path, kind):
    code = f"""
import resource, torch
from pathlib import Path
from safetensors.torch import save_file
from rlpretrain.files import CannotWrite, writing
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
big, path = torch.zeros(100_000), Path({str(tmp_path)!r}) / "x"
try:
    with writing(path):
        {{"torch": lambda: torch.save(big, path), "safetensors": lambda: save_file({{"w": big}}, path),
          "text": lambda: path.write_text("x" * 100_000)}}[{kind!r}]()
except CannotWrite as error:
    assert error.__suppress_context__
    print(error)
"""
    done = python("-c", code)
    assert (
        done.stdout.startswith(f"cannot write {tmp_path / 'x'}: ") and "GiB are free there" in done.stdout
    ), done.stderr


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="mine"), writing(tmp_path):
        raise RuntimeError("mine")
    with pytest.raises(CannotWrite, match="cannot write .*: Is a directory"), writing(tmp_path):
        tmp_path.write_text("x")


def test_folders_that_cannot_be_written_are_refused_before_any_work(
    values, corpus, finished, tmp_path, capsys, monkeypatch
):
    def never(*args, **kwargs):
        raise AssertionError("a model was loaded first")

    monkeypatch.setattr(models, "load_with_tokenizer", never)
    monkeypatch.setattr(models, "load_model", never)
    (tmp_path / "file").touch()
    bad, base, docs = str(tmp_path / "file" / "x"), str(corpus / "base"), str(corpus / "held_out.jsonl")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(merged(values, output_dir=bad)))
    commands = [
        ["train", str(tmp_path / "c.yaml")],
        ["rollout", str(tmp_path / "c.yaml")],
        ["report", str(finished), "--out", bad],
        ["inspect", base, "--text", docs, "--out", bad],
        ["eval", base, "--data", docs, "--json", bad],
        ["prepare", base, "--data", docs, "--out", bad],
        ["corpus", "dial", "--out", bad, "--base", "1", "--train", "1", "--held-out", "1"],
    ]
    for words in commands:
        assert cli.main(words) == 2, words
        said = capsys.readouterr().err
        assert said.startswith("rlpretrain: ") and bad in said or str(tmp_path / "file") in said, said
    with pytest.raises(ConfigError, match="the folder /proc/self cannot be written"):
        check_writable("/proc/self", "the folder")
