"""Runs whose thoughts come from an engine with weights of its own: real vLLM, and the probe between them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.corpora import dial
from rlpretrain.ranks import Ranks
from rlpretrain.training.pretrainer import Pretrainer
from rollout.probe import StaleWeights
from rollout.store import Store
from tests.builders.engines import SHAPE, rows_of
from tests.builders.policies import SHARDED
from tests.builders.runs import launch, merged, same, trained, weights
from tests.builders.servers import VLLMServer
from tests.builders.tiny import tiny_model, word_tokenizer

pytest.importorskip("vllm", reason="needs the CPU build of vLLM: make env LOCK=test-cpu")
pytestmark = pytest.mark.slow


@pytest.fixture
def run(values, tmp_path):
    """The small run with vLLM, from a model of a shape that vLLM has kernels for."""
    tiny_model("qwen3", len(dial.WORDS), **SHAPE).save_pretrained(tmp_path / "base")
    dial.tokenizer().save_pretrained(tmp_path / "base")
    return merged(
        values,
        model=str(tmp_path / "base"),
        engine={"name": "vllm_local", "kv_cache_gib": 0.05, "batch_size": 32},
    )


def test_vllm_in_the_loop_samples_from_the_weights_that_are_trained(run, tmp_path):
    trained(run, max_steps=4)
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 4 and all(row["sampling/probe_difference"] <= 1e-4 for row in rows)
    assert all(
        row["sampling/abs_log_ratio_max"] <= 1e-4 for row in rows
    )  # thoughts: behaviour against the trainer
    assert all(row["perf/probe_s"] > 0 for row in rows)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["engine"]["kind"] == "vllm_local" and facts["engine"]["vllm"]
    assert not same(weights(tmp_path / "run" / "model"), weights(Path(run["model"])))


def test_vllm_samples_what_is_said_after_a_thought_too(run, tmp_path):
    """RPT in two calls of the engine: over thought and prediction the trainer has the log-probs that vLLM
    sampled with.
    """
    objective = {
        "name": "rpt",
        "template": "raw",
        "positions": "after",
        "marker": "shows",
        "opening": "has",
        "closing": ".",
        "target_length": 1,
        "strip": True,
        "max_prediction_tokens": 60,
        "dynamic_sampling": False,
    }
    trained(
        run,
        objective=objective,
        max_steps=2,
        positions_per_step=8,
        save_rollouts=True,
        sampling__max_thought_tokens=99,
        sampling__cut="force_close",
    )
    assert all(row["sampling/abs_log_ratio_max"] <= 1e-4 for row in rows_of(tmp_path / "run"))
    groups, _, _ = Store(tmp_path / "run" / "rollouts", 0).read(1)
    spans = [(t, t.answer_span) for g in groups for t in g.thoughts if t.answer_span]
    assert len(spans) > 5 and any(t.finish_reason == "close" for t, _ in spans)
    assert all(0 < a < b == len(t.token_ids) == len(t.behaviour_logps) for t, (a, b) in spans)


def test_vllm_rests_while_the_model_trains(run, tmp_path, monkeypatch):
    """On a CPU sleep and wake give nothing back; their order is the GPU's."""
    from rollout.vllm_local import VLLMEngine

    said = []
    for name in ("sample", "sleep", "wake", "sync"):
        inner = getattr(VLLMEngine, name)
        monkeypatch.setattr(
            VLLMEngine, name, lambda self, *a, name=name, inner=inner: (said.append(name), inner(self, *a))[1]
        )
    trained(run, max_steps=2, engine__sleep=True)
    begin = ["sync", "sample"]  # the starting weights and their probe
    assert said == begin + ["sample", "sleep", "wake", "sync", "sample"] * 2
    with pytest.raises(ConfigError, match="engine.sleep is for engine vllm_local with max_staleness 0"):
        trained(run, output_dir=str(tmp_path / "other"), engine__sleep=True, engine__max_staleness=1)


def test_zero_3_evaluation_and_resume(run, corpus, tmp_path):
    """The policy is sharded, so the engine gets gathered weights and the evaluation a copy of its own."""
    more = merged(
        run,
        policy={"backend": "deepspeed", "deepspeed_config": SHARDED},
        max_steps=4,
        checkpoint={"every": 2},
        eval={"data": str(corpus / "held_out.jsonl"), "every": 2, "documents": 8, "thoughts": 2},
    )
    trained(more, max_steps=2)
    trained(more, resume="auto")
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(
        row["sampling/probe_difference"] <= 1e-4 for row in rows
    )
    assert "eval/gain_frozen" in rows[1] and "eval/gain_frozen" in rows[3]


def test_ray_actors_in_the_loop_train_like_the_embedded_engine(run, tmp_path):
    """Two actors with the transformers engine: the same thoughts, so the same weights but for rounding."""
    pytest.importorskip("ray")
    embedded = trained(run, engine="hf", output_dir=str(tmp_path / "embedded"))
    pooled = trained(
        run, engine={"name": "ray", "of": "hf", "num_engines": 2}, output_dir=str(tmp_path / "pooled")
    )
    for name, tensor in embedded.items():
        torch.testing.assert_close(pooled[name], tensor, rtol=1e-3, atol=1e-4)
    assert all(row["sampling/probe_difference"] <= 1e-4 for row in rows_of(tmp_path / "pooled"))
    assert all(row["perf/weight_sync_load_s"] > 0 for row in rows_of(tmp_path / "pooled"))


def test_zero_3_on_two_ranks_feeds_one_vllm_server(run, tmp_path):
    """Rank 0 hands over the gathered weights, both ranks sample, the probe agrees after every sync."""
    server = VLLMServer(Path(run["model"]), tmp_path / "server.log").start().ready()
    try:
        config = merged(
            run,
            policy={"backend": "deepspeed", "deepspeed_config": SHARDED},
            positions_per_step=4,
            max_steps=3,
            engine={"name": "vllm_server", "urls": [server.url], "block_size": 32},
        )
        launch([{"config": config}], tmp_path)
    finally:
        server.kill()
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 3 and all(row["sampling/probe_difference"] <= 1e-4 for row in rows)
    assert all(row["sampling/abs_log_ratio_max"] <= 1e-4 for row in rows)
    assert not same(weights(tmp_path / "run" / "model"), weights(Path(run["model"])))
    assert not (tmp_path / "run" / "weights" / "version-3").exists()  # cleaned up


def test_tags_that_were_added_reach_the_engine(run, corpus, tmp_path):
    words = [w for w in dial.WORDS[3:] if w not in (dial.OPEN, dial.CLOSE)]
    tokenizer = word_tokenizer(words)
    tiny_model("qwen3", len(tokenizer), **SHAPE | {"tie_word_embeddings": False}).save_pretrained(
        tmp_path / "plain"
    )
    tokenizer.save_pretrained(tmp_path / "plain")
    trained(run, model=str(tmp_path / "plain"))
    assert (tmp_path / "run" / "start" / "model.safetensors").is_file()
    assert all(row["sampling/abs_log_ratio_max"] <= 1e-4 for row in rows_of(tmp_path / "run"))


def test_a_run_stops_at_once_when_the_engine_keeps_old_weights(run, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "rollout.vllm_local.complete", lambda state, names: {n: state[n] for n in state if "lm_head" not in n}
    )
    with pytest.raises(
        StaleWeights, match="after the sync of version 1 the engine's log-probs of a fixed probe"
    ):
        trained(run)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_several_ranks_are_refused(run, monkeypatch):
    monkeypatch.setattr("rlpretrain.training.builder.join", lambda device: Ranks(0, 2))
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value, value])
    monkeypatch.setattr(Ranks, "barrier", lambda self: None)
    with pytest.raises(ConfigError, match="engine vllm_local trains on one rank, not 2"):
        Pretrainer(build(merged(run, positions_per_step=4))).train()
