"""Real vLLM in this process: the same log-probs as the trainer, before and after every sync, and a probe
that notices.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout import FinishReason, HFEngine, Prompt, SamplingParams
from rollout.probe import Probe, StaleWeights
from tests.builders.sampling import prompts_of, sample, tokens
from tests.builders.tiny import tiny_model

pytest.importorskip("vllm", reason="needs the CPU build of vLLM: make env LOCK=test-cpu")
from rollout.vllm_local import VLLMEngine  # noqa: E402
from tests.builders.vllm import SHAPE, VOCABULARY, ask, move, weights_of, worst

pytestmark = pytest.mark.slow
FAMILIES = {"qwen3": {"tie_word_embeddings": True}, "llama": {"tie_word_embeddings": False}}
PARAMS = SamplingParams(max_thought_tokens=9)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory) -> Iterator[tuple[Any, VLLMEngine]]:
    """A model and a vLLM engine that was started from its checkpoint."""
    model = tiny_model(request.param, VOCABULARY, **SHAPE | FAMILIES[request.param])
    folder = Path(tmp_path_factory.mktemp(request.param))
    model.save_pretrained(folder)
    engine = VLLMEngine(folder, max_model_len=512, max_num_seqs=32, kv_cache_gib=0.05)
    yield model, engine
    engine.close()


def test_log_probs_are_the_trainers_before_and_after_every_update(pair):
    model, engine = pair
    prompts = prompts_of([12, 3, 70, 70, 130])
    assert worst(model, prompts, sample(engine, prompts)) <= 1e-4
    for version in (1, 2, 3):
        move(model)
        assert (
            worst(model, prompts, sample(engine, prompts)) > 1e-2
        )  # stale, so the next line shows something
        engine.sync(weights_of(model), version)
        groups = sample(engine, prompts)
        assert worst(model, prompts, groups) <= 1e-4
        assert {t.policy_version for group in groups for t in group} == {version} == {engine.version}


def test_seeds_decide_whatever_shares_the_batch(pair):
    _, engine = pair
    prompts = prompts_of([12, 3, 20])
    together = sample(engine, prompts, seeds=[7, 8, 9])
    alone = [sample(engine, [p], seeds=[s])[0] for p, s in zip(prompts, (7, 8, 9), strict=True)]
    assert tokens(together) == tokens(alone)
    assert len(set(tokens(together)[0])) > 1  # the thoughts of a prompt have seeds of their own
    again = asyncio.run(engine.sample([prompts[0]], PARAMS, 1, [together[0][2].seed]))
    assert again[0][0].token_ids == together[0][2].token_ids


def test_calls_that_overlap_do_not_mix(pair):
    _, engine = pair
    prompts = prompts_of([12, 3, 20, 9])

    async def both():
        return await asyncio.gather(*(engine.sample([p], PARAMS, 2, [i]) for i, p in enumerate(prompts)))

    assert [tokens(part)[0] for part in asyncio.run(both())] == tokens(sample(engine, prompts, n=2))


def test_a_sync_waits_for_what_is_being_sampled(pair, monkeypatch):
    model, engine = pair
    engine.sync(weights_of(model), 5)
    put, asked = engine._driver._put, threading.Event()

    def watched(kind, what):
        put(kind, what)
        if kind == "run":
            asked.set()

    monkeypatch.setattr(engine._driver, "_put", watched)
    long, (prompt,) = SamplingParams(max_thought_tokens=200), prompts_of([10], stop_ids=())

    async def both():
        early = asyncio.ensure_future(engine.sample([prompt], long, 2, [0]))
        while not engine.llm.llm_engine.has_unfinished_requests():
            await asyncio.sleep(0.001)
        change = asyncio.to_thread(engine.sync, weights_of(model), 6)
        changed = asyncio.ensure_future(change)
        assert await asyncio.to_thread(asked.wait, 60)
        late = await engine.sample([prompt], PARAMS, 2, [0])
        await changed
        return (await early)[0], late[0]

    early, late = asyncio.run(both())
    assert {t.policy_version for t in early} == {5} and {t.policy_version for t in late} == {6}


def test_the_number_of_threads_is_this_process_own(pair):
    """vLLM's CPU worker makes torch.set_num_threads do nothing; its kernels want one number at every call."""
    _, engine = pair
    assert engine._driver.run(torch.get_num_threads) == torch.get_num_threads() == 1
    torch.set_num_threads(2)
    try:
        assert torch.get_num_threads() == 2 and engine._driver.run(torch.get_num_threads) == 1
    finally:
        torch.set_num_threads(1)


def test_what_is_given_up_is_aborted(pair):
    _, engine = pair
    (prompt,) = prompts_of([10], stop_ids=())
    vllm = engine.llm.llm_engine

    async def give_up():
        work = asyncio.ensure_future(
            engine.sample([prompt] * 4, SamplingParams(max_thought_tokens=490), 4, [0] * 4)
        )
        while not vllm.has_unfinished_requests():
            await asyncio.sleep(0.001)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        return await engine.sample([prompt], PARAMS, 1, [0])

    asyncio.run(give_up())
    assert not vllm.has_unfinished_requests()


def test_more_context_than_vllm_reads_at_once(pair):
    """vLLM would read one of these prompts in pieces, and on a CPU die of its seed."""
    model, engine = pair
    engine.sync(weights_of(model), engine.version)
    prompts = prompts_of([300] * 16)
    assert (
        sum(len(p.token_ids) for p in prompts)
        > engine.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    )
    assert worst(model, prompts, sample(engine, prompts, n=1)) <= 1e-4


def test_thoughts_end_as_with_the_transformers_engine(pair):
    """Greedy thoughts, log-probs and reasons agree across engines; the ending token stays in the thought."""
    model, engine = pair
    prompts = prompts_of([12, 3, 20, 9, 33], stop_ids=tuple(range(3, 12)))
    greedy = SamplingParams(max_thought_tokens=9, temperature=0.0, eos_ids=tuple(range(20, 30)))
    engine.sync(weights_of(model), engine.version)
    theirs, ours = sample(engine, prompts, greedy, n=1), sample(HFEngine(model), prompts, greedy, n=1)
    assert tokens(theirs) == tokens(ours)
    assert [g[0].finish_reason for g in theirs] == [g[0].finish_reason for g in ours]
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(
            torch.tensor(a[0].behaviour_logps), torch.tensor(b[0].behaviour_logps), atol=1e-4, rtol=0
        )
    short = sample(engine, prompts_of([5], stop_ids=()), SamplingParams(max_thought_tokens=2))
    assert {t.finish_reason for t in short[0]} == {FinishReason.LENGTH}


def test_log_probs_are_those_of_the_distribution_drawn_from(pair):
    model, engine = pair
    engine.sync(weights_of(model), engine.version)
    (prompt,) = prompts_of([10], stop_ids=())
    for group in sample(
        engine, [prompt], SamplingParams(max_thought_tokens=4, temperature=0.6, top_k=5), n=4
    ):
        for thought in group:
            with torch.no_grad():
                logits = (
                    model(input_ids=torch.tensor([prompt.token_ids + thought.token_ids])).logits[0, 9:-1]
                    / 0.6
                )
            kept = logits.masked_fill(logits < logits.topk(5).values[:, -1:], -torch.inf).log_softmax(-1)
            expected = kept.gather(1, torch.tensor(thought.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(thought.behaviour_logps), expected, atol=1e-4, rtol=0)


def test_banned_ids_are_never_sampled(pair):
    """Log-probs are those of the model without them, and greedy thoughts those of the other engine."""
    model, engine = pair
    engine.sync(weights_of(model), engine.version)
    banned = tuple(range(0, VOCABULARY, 2))
    (prompt,) = prompts_of([10], stop_ids=())
    params = SamplingParams(max_thought_tokens=5, temperature=0.6, banned_ids=banned)
    for thought in sample(engine, [prompt], params, n=8)[0]:
        assert not set(thought.token_ids) & set(banned)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt.token_ids + thought.token_ids])).logits[0, 9:-1]
        logits[:, list(banned)] = -torch.inf
        ids = torch.tensor(thought.token_ids)[:, None]
        expected = (logits / 0.6).log_softmax(-1).gather(1, ids)[:, 0]
        torch.testing.assert_close(torch.tensor(thought.behaviour_logps), expected, atol=1e-4, rtol=0)
    greedy = SamplingParams(max_thought_tokens=5, temperature=0.0, banned_ids=banned)
    theirs, ours = (sample(each, [prompt], greedy, n=1) for each in (engine, HFEngine(model)))
    assert tokens(theirs) == tokens(ours)


def test_what_cannot_be_sampled_is_refused(pair):
    _, engine = pair
    with pytest.raises(ValueError, match="id 40 is outside the model's vocabulary of 40"):
        sample(engine, [Prompt((40,), stop_ids=())])
    with pytest.raises(ValueError, match="over the model's 512 positions"):
        sample(engine, [Prompt((1,) * 510, stop_ids=())])
    with pytest.raises(ValueError, match="stop strings: the engine needs a tokenizer"):
        sample(engine, [Prompt((1,), stop_ids=(), stop_strings=("x",))])
    with pytest.raises(ValueError, match="one seed a prompt"):
        sample(engine, prompts_of([4]), seeds=[1, 2])


# the probe


@pytest.fixture
def probed(pair):
    """The engine in step with the model, and a probe whose prompt its cache holds."""
    model, engine = pair
    engine.sync(weights_of(model), 10)
    probe = Probe(VOCABULARY, engine.block_size, engine.max_model_len)
    assert probe.covers_cache and ask(probe, model, engine, 10) <= 1e-4
    before = engine.health()["cached_tokens"]
    assert ask(probe, model, engine, 10) <= 1e-4
    assert engine.health()["cached_tokens"] - before >= 2 * engine.block_size
    return model, engine, probe


def test_the_probe_agrees_after_a_good_sync(probed):
    model, engine, probe = probed
    move(model)
    engine.sync(weights_of(model), 11)
    assert ask(probe, model, engine, 11) <= 1e-4


def test_the_probe_finds_a_tensor_that_was_lost(probed):
    model, engine, probe = probed
    old = {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}
    move(model)
    lost = "model.layers.1.mlp.down_proj.weight"
    engine.sync(lambda: [(n, old[n] if n == lost else p) for n, p in weights_of(model)()], 11)
    with pytest.raises(
        StaleWeights, match=r"after the sync of version 11 .* nats off .* a tensor did not arrive"
    ):
        ask(probe, model, engine, 11)


def test_names_that_go_missing_are_refused_at_once(probed):
    model, engine, _ = probed
    with pytest.raises(ValueError, match="do not fit the engine's model; missing: model.norm.weight"):
        engine.sync(weights_of(model, drop=("model.norm.weight",)), 11)
    assert engine.version == 10


def test_a_tied_head_is_filled_in_and_an_untied_one_is_missed(probed):
    model, engine, probe = probed
    move(model)
    headless = weights_of(model, drop=("lm_head.weight",))
    if model.config.tie_word_embeddings:
        engine.sync(headless, 11)
        assert ask(probe, model, engine, 11) <= 1e-4
    else:
        with pytest.raises(ValueError, match="missing: lm_head.weight"):
            engine.sync(headless, 11)


def test_the_probe_finds_a_forgotten_head(probed, monkeypatch):
    model, engine, probe = probed
    move(model)
    with monkeypatch.context() as careless:
        careless.setattr("rollout.vllm_local.complete", lambda state, names: state)
        engine.sync(weights_of(model, drop=("lm_head.weight",)), 11)
    with pytest.raises(StaleWeights, match="a tensor did not arrive"):
        ask(probe, model, engine, 11)


def test_the_probe_finds_a_prefix_cache_that_was_kept(probed, monkeypatch):
    model, engine, probe = probed
    move(model)
    with monkeypatch.context() as kept:
        kept.setattr(engine, "reset_prefix_cache", lambda: None)
        engine.sync(weights_of(model), 11)
    with pytest.raises(
        StaleWeights, match="its prefix cache kept contexts that were read with the old weights"
    ):
        ask(probe, model, engine, 11)


def test_the_probe_finds_a_version_that_did_not_move(probed):
    model, engine, probe = probed
    with pytest.raises(StaleWeights, match="answers with version 10, but version 11 was synced"):
        ask(probe, model, engine, 11)


def test_a_broken_or_closed_engine_says_so(tmp_path, monkeypatch):
    tiny_model("qwen3", VOCABULARY, **SHAPE).save_pretrained(tmp_path)
    engine = VLLMEngine(tmp_path, max_model_len=64, max_num_seqs=4, kv_cache_gib=0.05)

    def broken():
        raise ValueError("a worker died")

    monkeypatch.setattr(engine.llm.llm_engine, "step", broken)
    for _ in range(2):  # what is in flight, and what comes later
        with pytest.raises(
            RuntimeError, match="vLLM failed, start the engine again: ValueError.'a worker died'"
        ):
            sample(engine, prompts_of([4, 5]))
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="this engine is closed"):
        sample(engine, prompts_of([4]))
    assert engine.health()["closed"]
