"""FSDP 2 as a backend: the same update as torch on one rank, two and four; resume, adapters, averages."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.objectives.rlp import RLP
from rlpretrain.ranks import Ranks, ensure_group
from rlpretrain.scoring.scorer import NoGradScorer
from rlpretrain.training.backends.fsdp import find_layers
from rlpretrain.training.loop import train
from rlpretrain.training.planning import check_settings
from rlpretrain.training.redealing import deal_source
from rlpretrain.training.run import Run
from rollout.store import Store
from tests.builders.runs import launch, merged, same, trained, weights
from tests.builders.tiny import tiny_model


@pytest.fixture
def one_process():
    """A process group of this process alone, which FSDP needs. It stays: DeepSpeed remembers it."""
    ensure_group(Ranks())


def fsdp(**changes) -> dict:
    return {"policy__backend": "fsdp", **changes}


def norms(folder: Path) -> list[float]:
    return [json.loads(line)["grad_norm"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_trains_like_torch(values, tmp_path):
    expected = trained(values, output_dir=str(tmp_path / "torch"))
    ours = trained(values, output_dir=str(tmp_path / "fsdp"), **fsdp())
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)
    assert norms(tmp_path / "fsdp") == pytest.approx(norms(tmp_path / "torch"), rel=1e-4)


def test_resumes_bit_identically(values, tmp_path):
    run = merged(values, **fsdp(max_steps=4, checkpoint__every=2, baseline__name="ema"))
    whole = trained(run, output_dir=str(tmp_path / "whole"))
    (tmp_path / "parts").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "parts" / "checkpoint-2")
    resumed = trained(run, resume="auto", output_dir=str(tmp_path / "parts"))
    assert same(whole, resumed)


def test_half_precision_weights_are_trained_in_float32(values, tmp_path):
    """As torch does with its float32 copies; the saved model is in half precision."""
    run = merged(values, optim__lr=1e-5, max_steps=3)
    run["model"] = {"path": run["model"], "dtype": "bfloat16"}
    theirs = Run(build(merged(run, output_dir=str(tmp_path / "torch"))), None)
    ours = Run(build(merged(run, output_dir=str(tmp_path / "fsdp"), **fsdp())), None)
    start = {name: values.clone() for name, values in ours.policy.parts()}
    for held in (theirs, ours):
        train(held)
        held.end()
        held.close()
    names = {id(p): name for name, p in theirs.policy.model.named_parameters()}
    expected = {names[id(p)]: master.detach() for p, master in theirs.policy.masters}
    found = dict(ours.policy.parts())
    moved = sum(float((expected[name] - start[name]).norm()) for name in start)
    apart = sum(float((expected[name] - found[name]).norm()) for name in start)
    assert apart < 0.02 * moved and moved > 0
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    saved = weights(tmp_path / "fsdp" / "model")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


@pytest.mark.slow
def test_ranks_train_like_one(values, tmp_path):
    """Two ranks and four against torch on one, with uneven micro-batches, and what stands on the weights."""
    held_out = {"eval__data": str(Path(values["data"]["path"]).parent / "held_out.jsonl"), "eval__every": 2}
    base = merged(values, token_budget=150, positions_per_step=8, eval__documents=8, **held_out)
    lora = {"policy__lora": {"r": 2}, "baseline__name": "frozen", "optim__lr": 1e-2}
    kinds: dict[str, dict] = {
        "plain": {"baseline__name": "ema", "average": {"kind": "ema", "decay": 0.6}},
        "lora": lora,
        "kept": {"policy__fsdp": {"reshard": False}},
        "muon": {"optim__name": "muon"},
        "entropy": {"objective__positions": "entropy", "optim__lr": 1e-3},
    }
    torch_only = [{k: v for k, v in c.items() if k != "policy__fsdp"} for c in kinds.values()]
    one = {
        name: trained(base, output_dir=str(tmp_path / name), **changes)
        for name, changes in zip(kinds, torch_only, strict=True)
    }
    kinds["replicas"] = {"policy__fsdp": {"replicas": 2}}
    one["replicas"] = one["kept"]
    for size in (2, 4):
        jobs = [
            {"config": merged(base, output_dir=str(tmp_path / f"{name}-{size}"), **fsdp(**changes))}
            for name, changes in kinds.items()
        ]
        launch(jobs, tmp_path, size)
        for name in kinds:
            found = weights(tmp_path / f"{name}-{size}" / "model")
            for parameter, tensor in one[name].items():
                # Muon orthogonalises in bfloat16; with `entropy` torch's own ranks differ in one entry too
                atol = {"muon": 1e-3, "entropy": 1e-4}.get(name, 2e-5)
                torch.testing.assert_close(
                    found[parameter], tensor, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
                )
        averaged = weights(tmp_path / f"plain-{size}" / "averaged")
        assert same(averaged, weights(tmp_path / "plain" / "averaged"), within=2e-5)


def drawn(folder: Path) -> list[tuple[int, str, int]]:
    """(step, document, place) of all positions in a run's rollouts."""
    found = []
    for rank in range(4):
        store = Store(folder / "rollouts", rank)
        for step in store.steps():
            found += [(step, g.position.document_id, g.position.index) for g in store.read(step)[0]]
    return sorted(found)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fsdp", "torch"])
def test_a_run_resumes_on_another_number_of_ranks(values, tmp_path, backend):
    """Two ranks write a checkpoint; one and four train on from it as one rank does all along."""
    base = merged(values, positions_per_step=8, max_steps=4, checkpoint__every=2, save_rollouts=True)
    base = merged(base, average={"kind": "ema", "decay": 0.6}, policy__backend=backend)
    kinds: dict[str, dict] = {"": {}, "k-": {"average": {"kind": "last_k", "last": 2}, "optim__lr": 1e-3}}
    runs = {name: merged(base, **changes) for name, changes in kinds.items()}
    for name, run in runs.items():
        trained(run | {"policy": {"backend": "torch"}}, output_dir=str(tmp_path / f"{name}all"))
    launch([{"config": merged(r, output_dir=str(tmp_path / f"{n}two"))} for n, r in runs.items()], tmp_path)
    for size in (1, 4):
        again = {name: tmp_path / f"{name}on-{size}" for name in runs}
        for name, folder in again.items():
            shutil.copytree(tmp_path / f"{name}two" / "checkpoint-2", folder / "checkpoint-2")
            shutil.copytree(tmp_path / f"{name}two" / "rollouts", folder / "rollouts")
        jobs = [
            {"config": merged(run, output_dir=str(again[name])), "resume": "auto"}
            for name, run in runs.items()
        ]
        launch(jobs, tmp_path, size)
        for name, folder in again.items():
            for kind in ("model", "averaged"):
                expected = weights(tmp_path / f"{name}all" / kind)
                assert same(weights(folder / kind), expected, within=2e-5), (size, name, kind)
            assert drawn(folder) == drawn(tmp_path / f"{name}all")
    if backend == "torch":  # each rank keeps its own part, so that no stale one is read later
        files = sorted((tmp_path / "on-4" / "checkpoint-4").glob("average-*.pt"))
        parts = [set(torch.load(file, weights_only=True)["means"]) for file in files]
        assert len(parts) == 4 and sum(map(len, parts)) == len(set().union(*parts))


def test_a_model_that_another_trainer_shards_is_scored(one_process):
    """As accelerate shards it: the causal model is the root, and nothing has called it yet."""
    model = tiny_model("llama", 40)
    ids, rows = torch.arange(3, 15)[None], torch.arange(11)
    inputs = (ids, torch.ones_like(ids), None, rows, ids[0, 1:])
    expected = NoGradScorer(model)(*inputs)[0]
    for layer in find_layers(model):
        fully_shard(layer)
    fully_shard(model)
    torch.testing.assert_close(NoGradScorer(model)(*inputs)[0], expected)
    assert all(isinstance(p, DTensor) for p in model.parameters())  # and is sharded again


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"policy__zero_stage": 2}, "need policy.backend deepspeed"),
        ({"policy__fsdp": {"replicas": 2}}, "policy.fsdp.replicas 2 does not divide the 1 ranks"),
        ({"model__quantization": "4bit", "policy__lora": {}}, "FSDP cannot shard quantised weights"),
        ({"optim__name": "adamw_8bit"}, "does not know the DTensors of FSDP"),
        ({"model__compile": True}, "model.compile needs policy.backend torch"),
        (
            {"policy__backend": "torch", "policy__fsdp": {"reshard": False}},
            "policy.fsdp needs policy.backend",
        ),
    ],
)
def test_settings_that_contradict_are_refused_early(values, changes, said):
    run = merged(values | {"model": {"path": values["model"]}}, **fsdp() | changes)
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_settings(build(run), RLP, 1)


def test_documents_that_ranks_drew_out_of_step_are_dealt_again():
    """Ranks 0 and 1 have drawn 0, 2, 4, 6 and 1: of three ranks each begins at 3, without 4 and 6."""
    cursor = {"identity": {"rank": 0, "world_size": 2}, "cursor": {"taken": 4}}
    states = [
        {
            "stream": cursor,
            "drawn": drawn,
            "dropped": rank,
            "without": 1,
            "spare": [],
            "waiting": [],
            "by_stream": {},
            "taken": 2,
            "ntp_stream": None,
        }
        for rank, drawn in enumerate((4, 1))
    ]
    dealt = [deal_source(states, rank, 3) for rank in range(3)]
    assert [(state["drawn"], state["done"]) for state in dealt] == [(1, [6]), (1, [4]), (1, [])]
    assert [state["stream"]["cursor"]["taken"] for state in dealt] == [1, 1, 1]
    assert [state["dropped"] for state in dealt] == [1, 0, 0]
    # rank 0 goes on with 3 and leaves out 6; then all go back to two ranks
    dealt[0]["drawn"] = 2
    again = [deal_source(dealt, rank, 2) for rank in range(2)]
    assert [(state["drawn"], state["done"]) for state in again] == [(3, [6]), (2, [])]


def test_a_stream_is_not_dealt_again():
    state = {"stream": {"identity": {}, "cursor": {"epoch": 0, "place": 3}}, "drawn": 3, "spare": []}
    state |= {"ntp_stream": None, "waiting": [], "dropped": 0, "without": 0}
    with pytest.raises(ConfigError, match="resume on as many as before"):
        deal_source([state], 0, 2)
