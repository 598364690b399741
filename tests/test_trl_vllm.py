"""TRL's `use_vllm` with `vllm_mode="colocate"` on a CPU, by the adapter in rlpretrain/compat.py."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rlpretrain import compat
from rlpretrain.corpora import dial
from tests.builders.engines import SHAPE
from tests.builders.processes import alone, ranks
from tests.builders.tiny import tiny_model, word_tokenizer

trl = pytest.importorskip("trl")
pytest.importorskip("vllm")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "zero", "new-tags"])
def test_a_script_of_trl_trains_with_its_vllm(corpus, tmp_path, kind):
    """The trainer agrees with vLLM's log-probs at every step, so it got every step's weights."""
    base, tokenizer = tmp_path / "base", dial.tokenizer()
    if kind == "new-tags":
        tokenizer = word_tokenizer(
            [w for w in dial.WORDS if w not in ("<think>", "</think>", "<pad>", "<eos>", "<unk>")]
        )
    tiny_model("qwen3", len(tokenizer), **SHAPE).save_pretrained(base)
    tokenizer.save_pretrained(base)
    words = [str(base), str(corpus / "train.jsonl"), str(tmp_path), kind]
    environment = alone() | ({"ACCELERATE_USE_DEEPSPEED": "true"} if kind == "zero" else {})
    done = ranks(
        1, "-m", "tests.scripts.trl_colocate", *words, environment=environment, joined=kind == "zero"
    )
    assert done.returncode == 0, done.stderr[-6000:]
    found = json.loads((tmp_path / "record.json").read_text())
    assert found["calls"] == len(found["logs"]) == 3 and found["worst"] < 1e-4 and found["close_inside"] == 0
    for row, rewards in zip(found["logs"], found["rewards"], strict=True):
        assert row["sampling/sampling_logp_difference/max"] < 1e-4
        assert row["ig/mean"] == pytest.approx(np.mean(rewards), abs=1e-5)
    assert len({round(row["ig/mean"], 6) for row in found["logs"]}) == 3
    assert found["name"] == str(tmp_path / "out" / "start" if kind == "new-tags" else base)


def test_a_seam_of_trl_that_moved_is_named(monkeypatch):
    from trl.generation import vllm_generation

    monkeypatch.delattr(vllm_generation.VLLMGeneration, "_iter_named_params")
    with pytest.raises(ImportError, match="moved VLLMGeneration's _iter_named_params"):
        compat.trl_vllm_on_cpu()


def test_on_an_accelerator_nothing_is_touched(monkeypatch):
    from trl.generation import vllm_generation

    monkeypatch.setattr(compat.torch.accelerator, "is_available", lambda: True)
    before = vllm_generation.VLLMGeneration.sync_weights
    assert not compat.trl_vllm_on_cpu() and vllm_generation.VLLMGeneration.sync_weights is before


def test_the_servers_tags(corpus, tmp_path):
    """A vLLM server loads its own checkpoint, which lacks tags that were just added."""
    from rlpretrain.config import ConfigError
    from rlpretrain.trl import InformationGainReward

    tokenizer = word_tokenizer(["a", "b"])
    model = tiny_model("qwen3", len(tokenizer))
    reward = InformationGainReward(model, tokenizer)
    args = trl.GRPOConfig(
        str(tmp_path),
        use_vllm=True,
        vllm_mode="server",
        use_cpu=True,
        bf16=False,
        report_to="none",
        generation_kwargs={"min_tokens": 1},
    )
    with pytest.raises(ConfigError, match="the vLLM server does not have them"):
        reward.callback.on_init_end(args, None, None, model)
    assert args.generation_kwargs == {"stop_token_ids": [reward.close_id], "min_tokens": 1}
