"""Checks of a run, on a real checkpoint in half precision: rounding must not look like a fault."""

from __future__ import annotations

import asyncio
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.real_matrix import How, settings, write_documents
from examples.smollm2_checkpoint import make_checkpoint
from rlpretrain.compat import attention_of
from rlpretrain.config.io import build
from rlpretrain.models.kernels import check_kernel
from rlpretrain.rollouts.engines import default_tolerance
from rlpretrain.scoring import attention
from rlpretrain.scoring.checks import check_head
from rollout import HFEngine
from rollout.probe import Probe
from tests.builders.runs import trained
from tests.builders.sampling import logps_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """SmolLM2-135M, all thirty layers: two of them round less."""
    folder = tmp_path_factory.mktemp("smollm2")
    make_checkpoint(folder / "checkpoint")
    write_documents(folder / "documents.jsonl")
    return folder / "checkpoint"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_is_scored_in_trees_whatever_its_precision(checkpoint, dtype):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    assert attention.install(model) is None and attention_of(model) == "tree_sdpa"
    check_kernel(model)
    check_head(model)


@pytest.mark.parametrize("changes", [{"model__dtype": "bfloat16"}, {"policy__autocast": "bfloat16"}])
def test_a_run_packs_trees_and_finds_their_rows(checkpoint, changes):
    """Weights in bfloat16 ran on padded rows, before the probe of trees knew what rounding does."""
    folder = checkpoint.parent / "-".join(changes)
    trained(settings("rlp", "hf", "all", folder, How(1)), **changes)
    facts = json.loads((folder / "run.json").read_text())
    assert facts["padded_because"] is None and 0 < facts["tree_difference"] < 0.05


def test_the_probe_of_an_engine_in_bfloat16_passes_beside_a_trainer_in_float32(checkpoint):
    ours = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    engine = HFEngine(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval())
    values = {"model": "m", "data": "d.jsonl", "objective": "rlp"}
    config = build(values | {"engine": {"name": "vllm_local", "dtype": "bfloat16"}})
    probe = Probe(ours.config.vocab_size, 32, 512, tolerance=default_tolerance(config, torch.device("cpu")))
    worst = []
    for version in range(12):
        engine.sync(lambda: [], version)
        (thought,) = asyncio.run(probe.ask(engine))
        logps = logps_of(ours, probe.prompt.token_ids, thought.token_ids).tolist()
        worst.append(asyncio.run(probe.verify(engine, [thought], [logps], version)))
    assert max(worst) > 0.1  # that was the tolerance, set with tiny models
