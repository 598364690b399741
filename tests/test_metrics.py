"""What a run logs: every name documented, every value a number, on disk, on boards and on the console."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sqlite3
import struct
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from rlpretrain import Pretrainer
from rlpretrain.config.io import build
from rlpretrain.models.spending import size_of
from rlpretrain.ranks import Ranks
from rlpretrain.tracking.console import Console, thought_table
from rlpretrain.tracking.metrics import METRICS
from rlpretrain.tracking.step_metrics import StepMetrics
from rlpretrain.tracking.trackers import THOUGHT_COLUMNS, Trackers, markdown, thought_rows
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from rollout.types import FinishReason, Group, Position, Prompt, Thought
from tests.builders.runs import merged, trained
from tests.builders.tiny import word_tokenizer


def rows(folder: Path) -> list[dict]:
    fail = lambda name: pytest.fail(f"{name} is no JSON")  # noqa: E731
    return [
        json.loads(line, parse_constant=fail) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"baseline__frozen_every": 1, "eval__every": 2, "eval__documents": 4},
        {"loss__inner_epochs": 2, "baseline__name": "ema"},
        {"sampling__cut": "mask", "objective__target_length": 2},
        {"objective": {"name": "rlp", "positions": "entropy"}, "sampling__cut": "penalise"},
        {"objective": "ntp", "eval__every": 1, "eval__documents": 4},
    ],
    ids=["frozen and eval", "inner epochs", "mask", "entropy", "ntp"],
)
def test_every_logged_name_is_documented_and_every_value_finite(values, corpus, changes):
    if any(name.startswith("eval") for name in changes):
        changes = changes | {"eval__data": str(corpus / "held_out.jsonl")}
    Pretrainer(build(merged(values, **changes))).train()
    found = rows(Path(values["output_dir"]))
    assert [row["step"] for row in found] == [1, 2, 3]
    for row in found:
        for name, value in row.items():
            assert name in ("step", "time") or any(fnmatch(name, known) for known in METRICS), name
            assert isinstance(value, int | float) and math.isfinite(value), name
    assert {
        "loss",
        "ntp/loss",
        "grad_norm",
        "learning_rate",
        "num_tokens",
        "num_flops",
        "step_time",
    } <= found[-1].keys()
    if "eval__data" in changes:
        assert any(name.startswith("eval/") for name in found[-1])


def test_off_policy_diagnostics_are_logged(values):
    run = Run(build(merged(values, max_steps=1)), None)
    take = run.next_batch

    def stale():
        batch = take()
        return dataclasses.replace(
            batch, groups=[dataclasses.replace(g, policy_version=-1) for g in batch.groups]
        )

    run.next_batch = stale
    train(run)
    run.close()
    found = {name for name in run.last if name.startswith("sampling/")}
    assert found and all(math.isfinite(run.last[name]) for name in found)


def test_every_documented_name_is_logged(values):
    """Names with a star aside, which depend on the run, the probe's (tests/test_engines.py), those of servers
    (tests/test_contact_servers.py), those that need a GPU's peak (tests/test_throughput.py), a verifier
    (tests/objectives/test_verified.py), a second model (tests/test_reference_path.py), routers
    (tests/test_routers.py), scores and weights (tests/objectives/test_preference.py, test_controls.py), soft
    targets (tests/objectives/test_distill.py), or labelled documents (tests/objectives/test_v_pretrain.py).
    """
    Pretrainer(build(merged(values, baseline__frozen_every=1, loss__inner_epochs=2))).train()
    logged = set().union(*(row.keys() for row in rows(Path(values["output_dir"]))))
    elsewhere = ("verified/", "reference/", "preference/", "ntp/weight_", "ntp/soft_", "ntp/trained_")
    elsewhere += ("feedback/", "targets/", "designer/", "router/", "sample/updated_", "sample/token_")
    documented = {name for name in METRICS if "*" not in name and not name.startswith(elsewhere)}
    of_engines = {"perf/probe_s", "sampling/probe_difference", "perf/weight_sync_mib"}
    assert documented - logged == of_engines | {"perf/mfu", "perf/step_mfu"}


def test_numbers_agree_with_the_batch(values):
    run = Run(build(merged(values, max_steps=1, baseline__name="none")), None)
    kept, take = [], run.next_batch
    run.next_batch = lambda: kept.append(take()) or kept[0]
    train(run)
    run.close()
    thoughts = [t for g in kept[0].groups for t in g.thoughts]
    row = run.last
    assert row["completions/mean_length"] == pytest.approx(
        sum(len(t.token_ids) for t in thoughts) / len(thoughts)
    )
    assert row["completions/max_length"] == max(len(t.token_ids) for t in thoughts)
    shares = {
        "thought/closed_frac": "close",
        "thought/eos_frac": "eos",
        "completions/clipped_ratio": "length",
    }
    for name, reason in shares.items():
        assert row[name] == pytest.approx(sum(t.finish_reason == reason for t in thoughts) / len(thoughts))
    assert sum(row[name] for name in shares) == pytest.approx(1.0)
    assert row["ig/mean"] == row["reward"] == pytest.approx(-row["reader/loss"])  # against no baseline
    assert row["baseline/logp"] == 0.0 and row["ig/self"] == pytest.approx(
        row["ig/mean"] - row["baseline/self"]
    )
    assert row["loss"] == pytest.approx(
        row["policy_loss"] + 0.3 * row["ntp/loss"] + 0.1 * row["reader/loss"], abs=1e-5
    )
    trained = (
        row["num_tokens"]
        - sum(len(g.prompt.token_ids) for g in kept[0].groups)
        - sum(len(t.token_ids) for t in thoughts)
    )
    linear = size_of(run.policy.model).matrices * (6 * trained + 2 * (row["num_tokens"] - trained))
    assert (
        linear < row["num_flops"] < 1.5 * linear
    )  # attention comes on top; tests/test_spending.py counts it


def test_what_is_sampled_and_dropped_was_spent_all_the_same(values):
    run = Run(build(merged(values, max_steps=1)), None)
    sampled, choose = [], run.objective.select
    run.objective.select = lambda groups: sampled.extend(groups) or choose(groups[:1])
    train(run)
    run.close()
    assert len(sampled) == 4 and run.last["num_tokens"] > sum(
        len(g.prompt.token_ids) + sum(len(t.token_ids) for t in g.thoughts) for g in sampled
    )
    kept = sum(len(t.token_ids) for t in sampled[0].thoughts)
    operations = run.last["num_flops"] / size_of(run.policy.model).matrices
    assert operations > 2 * sum(len(t.token_ids) for g in sampled for t in g.thoughts) + 6 * kept


@pytest.mark.parametrize("limit", ["input_tokens", "flops"])
def test_a_budget_ends_a_run_with_the_step_that_reaches_it(values, tmp_path, limit):
    """Also when it is resumed."""
    whole = trained(values, max_steps=5, output_dir=str(tmp_path / "whole"))
    seen = rows(tmp_path / "whole")
    cut = merged(
        values,
        max_steps=5,
        output_dir=str(tmp_path / "cut"),
        checkpoint__every=2,
        **{f"stop__{limit}": seen[2][f"num_{limit}"]},
    )
    ended = Pretrainer(build(cut)).train()
    assert ended["steps"] == 3 and ended["stopped"].startswith("budget: ") and whole
    assert Pretrainer(build(cut)).train(resume="auto")["steps"] == 3
    assert seen[0]["num_input_tokens"] < seen[1]["num_input_tokens"]


def test_means_weigh_by_elements_and_leave_nan_out():
    metrics = StepMetrics()
    metrics.add("x", torch.tensor([1.0, math.nan, 2.0]))
    metrics.add("x", torch.tensor([6.0]))
    metrics.add("x", torch.tensor([]))
    metrics.add("never", torch.tensor([]))
    metrics.add("y", 0.5, 10)
    metrics.add("y", 1.0, 30)
    metrics.total("loss", 1.0)
    metrics.total("loss", torch.tensor(2.0))
    assert metrics.means(Ranks()) == {"x": 3.0, "y": 0.875, "loss": 3.0}


def test_tensorboard_has_every_number(values):
    Pretrainer(build(merged(values, report_to=["tensorboard"]))).train()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = Path(values["output_dir"])
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    found = rows(folder)
    for name in found[0].keys() - {"step", "time"}:
        points = board.Scalars(name)
        assert [p.step for p in points] == [1, 2, 3]
        assert points[0].value == pytest.approx(found[0][name], rel=1e-5)
    texts = board.Tensors("thoughts/text_summary")
    assert [t.step for t in texts] == [1, 2, 3]
    said = texts[0].tensor_proto.string_val[0].decode()
    assert (
        said.startswith("| position | context | target | thought |")
        and said.count("\n") == 1 + 4 * 4
        and "shows" in said
    )


def test_nothing_in_a_thought_is_markdown():
    hostile = "| a `b` |\n# <script>\x1b[0m\u202e"
    tokenizer = word_tokenizer([hostile])
    word = tokenizer.convert_tokens_to_ids(hostile)
    thought = Thought((word,), (0.0,), FinishReason.CLOSE, 0, 0)
    group = Group("g", Position("d", 1, (word,), (word,)), Prompt((word,), ()), (thought,), 0, rewards=(0.5,))
    (row,) = thought_rows([group], tokenizer)
    assert thought_rows([group], tokenizer, {("g", 0): math.nan})[0][-1] is None
    assert thought_rows([group], tokenizer, {("g", 0): 2.0})[0][-1] == 2.0
    assert row[0] == "d@1" and row[4:] == (1, "close", 0.5) and "␛[0m⟨U+202E⟩" in row[3]
    line = markdown([row]).splitlines()[2]
    assert line.count("|") == 8 and "# <script>" in line and line.count("`") == 14


def check_board(found: list[dict], numbers: dict[int, dict], tables: dict[int, list[dict]]) -> None:
    """Numbers and tables by step are those of metrics.jsonl, and of thoughts."""
    for row in found:
        for name in row.keys() - {"step", "time"}:
            assert numbers[row["step"]][name] == pytest.approx(row[name])
    assert sorted(numbers) == sorted(tables) == [1, 2, 3]
    for step, thoughts in tables.items():
        assert len(thoughts) == 4 * 4 and all(list(t) == list(THOUGHT_COLUMNS) for t in thoughts)
        assert all(
            "shows" in t["context"] and type(t["tokens"]) is int and 1 <= t["tokens"] <= 6 for t in thoughts
        )
        counted = [t["reward"] for t in thoughts if t["reward"] is not None]
        assert all(
            (t["reward"] is None) == (t["ended by"] != "close") for t in thoughts
        )  # the cut-off ones count nowhere
        assert all(type(r) is float for r in counted)
        if counted:  # four positions of four thoughts: the table is the whole step
            assert sum(counted) / len(counted) == pytest.approx(found[step - 1]["reward"], abs=1e-5)
    assert any(t["reward"] is not None for thoughts in tables.values() for t in thoughts)


def test_wandb_has_every_number_and_the_thoughts(values, tmp_path, monkeypatch):
    """An offline run, read back from its own file: a table that is logged apart could land on another
    step.
    """
    pytest.importorskip("wandb")
    for name, value in {
        "MODE": "offline",
        "DIR": str(tmp_path),
        "SILENT": "true",
        "ERROR_REPORTING": "false",
    }.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    Pretrainer(
        build(merged(values, report_to=["wandb"], sampling__cut="mask", sampling__max_thought_tokens=6))
    ).train()
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    numbers, tables, end = {}, {}, time.monotonic() + 60
    while (
        not (found := list(wandb_records(log.read_bytes()))) or found[-1].WhichOneof("record_type") != "exit"
    ):
        assert time.monotonic() < end, "wandb never closed its file"
        time.sleep(0.05)  # wandb's own process writes it, and `finish` does not wait for that
    for record in found:
        if record.WhichOneof("record_type") == "history":
            row = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            numbers[record.history.step.num] = row
            table = json.loads((log.parent / "files" / row["thoughts.path"]).read_text())
            tables[record.history.step.num] = [
                dict(zip(table["columns"], cells, strict=True)) for cells in table["data"]
            ]
    check_board(rows(Path(values["output_dir"])), numbers, tables)


def wandb_records(data: bytes):
    """The records of a `.wandb` file: a LevelDB log (blocks of 32 KiB, records cut at their ends) of
    protobuf messages.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    at, parts = 7, b""
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        parts, at = parts + data[at + 7 : at + 7 + size], at + 7 + size
        if at > len(data):
            return  # not written to its end yet
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def test_one_tracker_may_be_named_alone(values):
    assert build(merged(values, report_to="wandb")).report_to == ("wandb",)


def test_trackio_has_every_number_and_the_thoughts(values, tmp_path):
    """Its local database; in a process of its own, since trackio reads TRACKIO_DIR when it is imported."""
    pytest.importorskip("trackio")
    config = merged(values, report_to=["trackio"], sampling__cut="mask", sampling__max_thought_tokens=6)
    code = (
        f"from rlpretrain import Pretrainer; from rlpretrain.config.io import build; "
        f"Pretrainer(build({config!r})).train()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with sqlite3.connect(tmp_path / "trackio" / "rlpretrain.db") as database:
        logged = {
            step: json.loads(row)
            for step, row in database.execute("select step, metrics from metrics order by id")
        }
    assert all(row["thoughts"]["_type"] == "trackio.table" for row in logged.values())
    check_board(
        rows(Path(values["output_dir"])),
        logged,
        {step: row["thoughts"]["_value"] for step, row in logged.items()},
    )


def test_a_tracker_that_is_not_installed_says_how_to_get_it(values, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trackio", None)
    with pytest.raises(ImportError, match="pip install trackio"):
        Run(build(merged(values, report_to=["trackio"])), None)


def test_trackers_keep_what_came_before_the_checkpoint(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    trackers = Trackers(tmp_path, (), {}, "run", keep_until=2)
    trackers.write(3, {"loss": 1.0})
    trackers.close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3] and rows(tmp_path)[2]["loss"] == 1.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


TEXTS = ["[/bold]", "[red]x", "[/]", "\\", "[link=x]a\\", "a[b]c[/b]", "[[", "]", "", "\x1b[2J", "é\n\t▸"]


@pytest.mark.parametrize("text", TEXTS)
def test_thoughts_are_shown_as_they_are(values, text, capsys):
    tokenizer = word_tokenizer([text])
    word = tokenizer.convert_tokens_to_ids(text)
    thought = Thought((word,), (-1.0,), FinishReason.CLOSE, 0, 0)
    group = Group("g", Position("d", 1, (word,), (word,)), Prompt((word,), (word,)), (thought,) * 5, 0)
    assert thought_table(group, tokenizer).row_count == 4
    console = Console(build(values | {"console": True}), total=1, done=0, first=True)
    console.say(f"added {text}")
    console.step(1, {"loss": 1.0, "step_time": 0.1, "eval/gain": 0.5}, [group], tokenizer)
    console.close()
    out = capsys.readouterr().out
    assert "loss 1.000" in out and "eval/gain 0.500" in out
    if text.isascii() and text.isprintable() and text:
        assert out.count(text) >= 5  # in the line, the title and the rows


def test_a_quiet_console_says_nothing(values, capfd):
    Pretrainer(build(values)).train()
    assert capfd.readouterr() == ("", "")


def test_a_console_shows_thoughts_five_times_a_run_and_every_nth_step(values, capsys):
    Pretrainer(build(merged(values, max_steps=10, console=True, log_every=5))).train()
    out = capsys.readouterr().out
    assert (
        out.count("thought") >= 5
        and out.count("step 5 ") == out.count("step 10 ") == 1
        and "step 4 " not in out
    )
    assert "model saved to" in out.replace("\n", " ")
