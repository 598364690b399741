"""Thoughts sampled ahead of the trainer: the same positions in the same order, known staleness, and
nothing trained twice.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from rlpretrain.config.io import build
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from rollout.hf import HFEngine
from rollout.store import Store
from tests.builders.runs import merged, same, trained, weights


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def trained_groups(folder: Path) -> list[tuple[str, int, int]]:
    """(document, index, seed of the first thought) of every group, in the order of training."""
    store = Store(folder / "rollouts")
    groups = [g for step in store.steps() for g in store.read(step)[0]]
    return [(g.position.document_id, g.position.index, g.thoughts[0].seed) for g in groups]


@pytest.fixture
def run(values):
    return merged(values, max_steps=6, save_rollouts=True, optim__lr=3e-3)


@pytest.mark.parametrize("ahead", [1, 2])
def test_thoughts_are_as_stale_as_they_may_be_and_no_more(run, tmp_path, ahead):
    trained(run, output_dir=str(tmp_path / "sync"))
    trained(run, output_dir=str(tmp_path / "ahead"), engine={"max_staleness": ahead, "in_flight": 2})
    rows = rows_of(tmp_path / "ahead")
    assert rows[0]["sample/staleness_max"] == 0 and max(row["sample/staleness_max"] for row in rows) in range(
        1, ahead + 1
    )
    assert all(row["sample/staleness_max"] == 0 for row in rows_of(tmp_path / "sync"))
    stale = [row for row in rows if row["sample/staleness_max"]]
    assert stale and all(
        row["sampling/raw_max"] != 1 for row in stale
    )  # corrected for, raw ratios beside truncated ones
    assert all(row["sampling/truncated_max"] <= 2.0 for row in stale)
    assert not same(weights(tmp_path / "ahead" / "model"), weights(Path(run["model"])))
    assert trained_groups(tmp_path / "ahead") == trained_groups(tmp_path / "sync")


def test_a_resumed_run_trains_on_every_position_once(run, tmp_path):
    engine = {"max_staleness": 2, "in_flight": 2}
    trained(run, output_dir=str(tmp_path / "whole"), engine=engine)
    halves = merged(run, output_dir=str(tmp_path / "halves"), engine=engine, checkpoint={"every": 3})
    cut = Run(build(halves), None)
    finish = cut.finish

    def stop_at_three(step, batch):
        finish(step, batch)
        if step == 3:
            raise KeyboardInterrupt

    cut.finish = stop_at_three
    with pytest.raises(KeyboardInterrupt):
        train(cut)
    cut.close()
    trained(halves, resume="auto")
    assert trained_groups(tmp_path / "halves") == trained_groups(tmp_path / "whole")


def test_the_embedded_engine_samples_from_a_copy(run):
    ahead = Run(build(merged(run, engine={"max_staleness": 1})), None)
    assert not ahead.engine.shares_weights and ahead.engine.model is not ahead.policy.model
    ahead.close()


def test_sampling_goes_on_while_the_model_trains(run, monkeypatch):
    """With a sampler and a trainer that both wait, a step takes as long as the slower, not as both."""
    sample, step = HFEngine.sample, 0.25

    async def slow(self, *request):
        import asyncio

        await asyncio.sleep(step)
        return await sample(self, *request)

    monkeypatch.setattr(HFEngine, "sample", slow)
    seconds = {}
    for ahead in (0, 1):
        values = merged(
            run,
            max_steps=8,
            save_rollouts=False,
            engine={"max_staleness": ahead, "in_flight": 1},
            output_dir=f"{run['output_dir']}-{ahead}",
        )
        held = Run(build(values), None)
        update = held.update

        def slow_update(update=update):
            time.sleep(step)
            update()

        held.update = slow_update
        begin = time.perf_counter()
        train(held)
        seconds[ahead] = time.perf_counter() - begin
        held.close()
    assert seconds[0] > 8 * 2 * step and seconds[1] < 0.8 * seconds[0]


def test_what_the_engine_raises_ends_the_run_and_nothing_hangs(run, monkeypatch):
    async def broken(self, *request):
        raise RuntimeError("the sampler fell over")

    held = Run(build(merged(run, engine={"max_staleness": 1})), None)
    monkeypatch.setattr(HFEngine, "sample", broken)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="the sampler fell over"):
        train(held)
    held.close()
    assert time.monotonic() - begin < 10
