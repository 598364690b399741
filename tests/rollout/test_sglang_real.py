"""The client of SGLang servers against one that you started: log-probs, syncs, bans, greedy thoughts.

    SGLANG_URL=http://127.0.0.1:30000 SGLANG_MODEL=runs/base pytest tests/rollout/test_sglang_real.py

It has never run: no server of SGLang was at hand (docs/engines.md).
"""

from __future__ import annotations

import json
import os

import pytest

from rollout import HFEngine, SamplingParams
from rollout.probe import Probe
from tests.builders.sampling import PARAMS, ask, move, prompts_of, sample, tokens, weights_of, worst
from tests.builders.sglang import CONTRACT, Contract

httpx = pytest.importorskip("httpx")
from rollout.sglang_server import SGLangServerEngine  # noqa: E402


@pytest.mark.skipif(
    "SGLANG_URL" not in os.environ, reason="needs a server of SGLang: SGLANG_URL, SGLANG_MODEL"
)
def test_a_real_server_gives_the_trainers_log_probs_and_keeps_the_contract(tmp_path):
    """SGLANG_URL is its address, SGLANG_MODEL the folder of its model (float32). Its weights are changed."""
    from transformers import AutoModelForCausalLM

    url, folder = os.environ["SGLANG_URL"], os.environ["SGLANG_MODEL"]
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    size, tolerance = model.config.vocab_size, float(os.environ.get("SGLANG_TOLERANCE", "1e-3"))
    seeded = httpx.get(f"{url}/server_info").json()["enable_deterministic_inference"]
    engine = SGLangServerEngine(
        [url],
        model=folder,
        weights_dir=tmp_path,
        deterministic=seeded,
        vocabulary=size,
        request_timeout=300.0,
    )
    prompts, hot = prompts_of([12, 3, 33]), SamplingParams(9, temperature=2.0, banned_ids=(5, 6, 7))
    try:
        for version in range(3):
            move(model)
            engine.sync(weights_of(model), version)
            groups = sample(engine, prompts)
            assert worst(model, prompts, groups) <= tolerance
            ask(
                Probe(size, engine.block_size, engine.max_model_len, tolerance=tolerance),
                model,
                engine,
                version,
            )
            print("worst", worst(model, prompts, groups))
        if seeded:
            assert tokens(sample(engine, prompts)) == tokens(groups)
        assert all(len(set(each)) > 1 for each in tokens(groups))
        assert not {5, 6, 7} & {
            i for each in tokens(sample(engine, prompts, hot, n=8)) for t in each for i in t
        }
        greedy = SamplingParams(9, temperature=0.0)
        assert tokens(sample(engine, prompts, greedy, n=1)) == tokens(
            sample(HFEngine(model), prompts, greedy, n=1)
        )
        body = engine.servers[0].request(prompts[0], PARAMS, 2, 0)
        answers = httpx.post(f"{url}/generate", json=body, timeout=300.0).json()
        (tmp_path / "answer.json").write_text(json.dumps(answers))
        print(json.dumps(answers[0]))
        response = Contract(CONTRACT)["GenerateResponse"]
        for answer in answers:
            assert {"output_ids", "meta_info"} <= set(answer) & set(response.model_fields)
    finally:
        engine.close()
