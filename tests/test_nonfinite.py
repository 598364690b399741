"""NaN and inf in loss, gradients or log-probs: the step is skipped and counted, the run stops in the end,
the batch is kept.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from rlpretrain import cli
from rlpretrain.config.io import build
from rlpretrain.scoring.packing import Layout, count, pack
from rlpretrain.training.loop import train
from rlpretrain.training.run import Diverged, Run
from rlpretrain.types import Batch, Document
from rollout.types import FinishReason, Group, Position, Prompt, Thought
from tests.builders.faults import poison
from tests.builders.runs import launch, merged, same, weights

REASONS = {
    "log-probs": "log-probs",
    "baseline": "log-probs",
    "reward": "loss",
    "loss": "loss",
    "gradients": "gradients",
}


@pytest.mark.parametrize("where", REASONS)
def test_a_step_with_nan_or_inf_is_skipped_and_counted(values, where, capsys):
    run = Run(
        build(merged(values, max_steps=3, console=True, stop__collapse=True, stop__collapse_window=1)), None
    )
    poison(run, where, at={2})
    seen = {}
    finish = run.finish

    def spy(step, batch):
        seen[step] = {n: p.detach().clone() for n, p in run.policy.model.named_parameters()}
        finish(step, batch)

    run.finish = spy
    train(run)
    run.end()
    run.close()
    assert run.step == 3 and run.skipped == 1 and run.skipped_in_row == 0 and run.stopped is None
    assert same(seen[1], seen[2]) and not same(seen[2], seen[3])
    assert all(bool(torch.isfinite(p).all()) for p in weights(run.folder / "model").values())
    assert f"step 2 skipped: NaN or inf in {REASONS[where]} (1 in a row)" in capsys.readouterr().out
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["run/skipped_steps"] for row in rows] == [0, 1, 1] and "loss" not in rows[1]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert [p.name for p in (run.folder / "nonfinite").iterdir()] == ["step-2-rank-0.json"]


@pytest.mark.slow
def test_what_one_rank_meets_both_skip(values, tmp_path):
    """Two ranks, NaN or inf on the second alone: nothing hangs, and the step is skipped as a single
    process would.
    """
    base = merged(values, max_steps=3, positions_per_step=4, token_budget=150)
    kinds = {where: {} for where in ("log-probs", "loss", "gradients")}
    kinds["zero2"] = {"policy": {"backend": "deepspeed", "zero_stage": 2}}
    alone = Run(build(merged(base, output_dir=str(tmp_path / "alone"))), None)
    poison(alone, "loss", at={2})
    train(alone)
    alone.end()
    alone.close()
    launch(
        [
            {
                "config": merged(base, output_dir=str(tmp_path / kind), **changes),
                "poison": "loss" if changes else kind,
            }
            for kind, changes in kinds.items()
        ],
        tmp_path,
    )
    expected = weights(tmp_path / "alone" / "model")
    for kind in kinds:
        rows = [json.loads(line) for line in (tmp_path / kind / "metrics.jsonl").read_text().splitlines()]
        assert [row["run/skipped_steps"] for row in rows] == [0, 1, 1], kind
        assert "step-2-rank-1.json" in [p.name for p in (tmp_path / kind / "nonfinite").iterdir()]
        found = weights(tmp_path / kind / "model")
        for name, tensor in expected.items():
            torch.testing.assert_close(
                found[name], tensor, rtol=1e-4, atol=5e-5, msg=lambda m, k=kind: f"{k}: {m}"
            )


def test_several_inner_epochs_skip_a_step_once(values):
    run = Run(build(merged(values, max_steps=2, loss__inner_epochs=3)), None)
    poison(run, "loss", at={1})
    train(run)
    run.close()
    assert run.skipped == 1


def as_tuples(value):
    return tuple(as_tuples(v) for v in value) if isinstance(value, list) else value


def read_group(kept: dict) -> Group:
    """A group from what was saved."""
    kept = {k: as_tuples(v) for k, v in kept.items()}
    thoughts = (
        Thought(
            **{k: as_tuples(v) for k, v in t.items()} | {"finish_reason": FinishReason(t["finish_reason"])}
        )
        for t in kept.pop("thoughts")
    )
    inner = (
        {k: as_tuples(v) for k, v in kept.pop("position").items()},
        {k: as_tuples(v) for k, v in kept.pop("prompt").items()},
    )
    return Group(position=Position(**inner[0]), prompt=Prompt(**inner[1]), thoughts=tuple(thoughts), **kept)


def test_a_run_stops_after_so_many_bad_steps_and_keeps_the_batches(values, tmp_path, capsys):
    run = Run(build(merged(values, max_steps=9, stop__nonfinite=3, checkpoint__every=4)), None)
    poison(run, "loss", at={2, 4, 5, 6, 7})
    taken, take = {}, run.next_batch

    def spy():
        taken[run.step + 1] = take()
        return taken[run.step + 1]

    run.next_batch = spy
    train(run)
    with pytest.raises(Diverged, match="3 steps in a row skipped; the batches are in .*nonfinite"):
        run.end()
    run.close()
    assert run.step == 6 and run.skipped == 4
    kept = {p.name: json.loads(p.read_text()) for p in (run.folder / "nonfinite").iterdir()}
    assert sorted(kept) == [f"step-{n}-rank-0.json" for n in (2, 4, 5, 6)]
    read = kept["step-6-rank-0.json"]
    groups = [read_group(g) for g in read["groups"]]
    documents = [Document(**d | {"token_ids": tuple(d["token_ids"])}) for d in read["documents"]]
    assert read["step"] == 6 and read["reason"] == "loss"
    assert {g.id: g for g in taken[6].groups} == {g.id: g for g in groups}
    batch = Batch(tuple(groups), tuple(documents))  # and it can be scored again
    (micro,) = pack(batch, Layout(100_000, "force_close"), count(batch, "force_close"))
    assert bool(torch.isfinite(run.policy.score(micro).thought_logps).all())


def test_the_command_line_says_that_a_run_diverged(values, tmp_path, capsys, monkeypatch):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    begin = Run.__init__

    def poisoned(self, *args):
        begin(self, *args)
        poison(self, "loss", at=range(10))

    monkeypatch.setattr(Run, "__init__", poisoned)
    assert cli.main(["train", str(tmp_path / "c.yaml"), "--stop.nonfinite", "2"]) == 1
    assert capsys.readouterr().err.startswith("rlpretrain: nonfinite: 2 steps in a row skipped")
    record = json.loads(Path(values["output_dir"], "run.json").read_text())
    assert record["status"] == "failed" and record["error"].startswith("Diverged: ")


def test_the_next_token_objective_keeps_its_documents(values):
    run = Run(build(merged(values, objective="ntp", max_steps=1)), None)
    run.objective.ntp_weights = lambda micro, scores: torch.full_like(scores.trunk_logps, math.nan)
    train(run)
    run.close()
    (kept,) = (run.folder / "nonfinite").iterdir()
    assert len(json.loads(kept.read_text())["documents"]) == 4 and run.skipped == 1


def test_every_thought_masked_is_a_step_without_a_policy_loss(values):
    run = Run(build(merged(values, max_steps=1, sampling__cut="mask", sampling__max_thought_tokens=1)), None)
    train(run)
    run.close()
    assert run.skipped == 0 and run.last["thought/uncounted_frac"] > 0.9 and math.isfinite(run.last["loss"])
