"""TRL's asynchronous trainer on our engines: its own forward, packing, loss and weight sync.

Two things of it need CUDA and are replaced: FlashAttention 3's kernel, by what it computes, and the name of
the GPU, which it asks for to log its utilisation.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import sys
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from rewards import leave_one_out
from rlpretrain.config import ConfigError
from rlpretrain.corpora import dial
from rlpretrain.trl import InformationGainReward
from rlpretrain.trl import async_rollout as trl_async
from rlpretrain.trl.async_rollout import AsyncRollouts
from rlpretrain.trl.pending import cycle_positions
from rollout.hf import HFEngine
from tests.builders.engines import SHAPE
from tests.builders.learning import BASE
from tests.builders.processes import alone, ranks
from tests.builders.tiny import tiny_model, word_tokenizer
from tests.builders.trl import AFTER, by_hand
from tests.builders.trl_trainer import Gradient

pytest.importorskip("trl")
from trl.experimental.async_grpo import async_grpo_trainer, packing  # noqa: E402

from tests.builders.async_trainer import made, sampled_from, settings, varlen_attention, whole  # noqa: E402


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a CPU")
    monkeypatch.setattr(
        packing, "_flash_attn", lambda: SimpleNamespace(flash_attn_varlen_func=varlen_attention)
    )


def threads() -> int:
    return sum(t.name == "rollout-queue" for t in threading.enumerate())


def test_it_trains_on_gains_of_the_live_model(corpus, tmp_path):
    """Gains equal those of transformers' logits under the live weights; the first update is REINFORCE's."""
    seen, before = Gradient(), threads()
    trainer, rollouts, kept, drawn = made(corpus, settings(tmp_path), callbacks=[seen])
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    logs = [row for row in trainer.state.log_history if "reward" in row]
    assert len(logs) == 3 and threads() == before
    assert all(not torch.equal(p, start[n]) for n, p in trainer.model.named_parameters())

    live = whole(corpus)
    for groups, rewards, weights in kept.calls:
        live.load_state_dict(weights, strict=False)
        assert rewards == pytest.approx(by_hand(live, groups, "force_close"), abs=1e-5)
    samples = [s for s, _ in drawn]
    assert len(samples) == 32  # one batch ahead of the trainer, as accelerate draws them
    assert [s.metrics["reward"] for s in samples] == [r for _, rewards, _ in kept.calls for r in rewards]
    assert [s.group_id for s in samples] == [i // 4 for i in range(32)]
    for (groups, rewards, _), i in zip(kept.calls, range(0, 32, 4), strict=True):
        advantages = leave_one_out(torch.tensor([rewards], dtype=torch.float64))[0].tolist()
        for s, t, a in zip(samples[i : i + 4], groups[0].thoughts, advantages, strict=True):
            size = len(groups[0].prompt.token_ids)
            assert tuple(s.input_ids) == (
                *groups[0].prompt.token_ids,
                *t.token_ids,
            ) and s.advantage == pytest.approx(a)
            assert s.completion_mask.tolist() == [0] * size + [1] * len(t.token_ids)
            assert s.old_log_probs[size:].tolist() == pytest.approx(t.behaviour_logps)
    means = [np.mean([s.metrics["reward"] for s in samples[i : i + 8]]) for i in range(0, 32, 8)]
    assert [row["reward"] for row in logs] == pytest.approx([np.mean(means[:2]), *means[2:]], abs=1e-6)
    assert (
        logs[0]["rewards/information_gain"]
        == pytest.approx(logs[0]["reward"])
        == pytest.approx(logs[0]["ig/mean"], abs=1e-6)
    )
    assert {"ig/std", "ig/self", "thought/closed_frac", "sample/staleness_max"} <= logs[0].keys()

    live = whole(corpus)  # the first step, by hand
    total = torch.zeros(())
    for s in samples[:8]:
        logps = live(input_ids=torch.tensor(s.input_ids)[None]).logits[0, :-1].log_softmax(-1)
        own = logps.gather(1, torch.tensor(s.input_ids)[1:, None])[:, 0]
        mask = torch.tensor(s.completion_mask)[1:].bool()
        assert own[mask].tolist() == pytest.approx(s.old_log_probs[1:][mask.numpy()], abs=1e-5)
        total = total - s.advantage * own[mask].sum()
    (total / sum(int(s.completion_mask.sum()) for s in samples[:8])).backward()
    for name, p in live.named_parameters():
        assert torch.allclose(p.grad, seen.found[name], atol=1e-5 * float(p.grad.abs().max())), name


def test_versions_and_ratios(corpus, tmp_path):
    """Thoughts of the current weights have a ratio of 1, thoughts that are one step older do not."""
    trainer, rollouts, kept, drawn = made(corpus, settings(tmp_path, max_staleness=0))
    trainer.train()
    logs = [row for row in trainer.state.log_history if "ratio" in row]
    assert logs[0]["ratio"] == pytest.approx(1, abs=1e-5) and logs[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert all(abs(row["ratio"] - 1) > 1e-4 for row in logs[1:])  # drawn before the step before them
    assert [(s.model_version, v) for s, v in drawn] == [(1, 1)] * 16 + [(2, 2)] * 8 + [(3, 3)] * 8
    assert (
        sum(row.get("sample/dropped_stale_total", 0) for row in logs) > 0
    )  # what was ahead of a sync, never scored
    assert all(row["sample/staleness_max"] == 0 for row in logs) and len(kept.calls) == 8
    assert rollouts.version == rollouts.engine.version == trainer.model_version == 4
    theirs = dict(rollouts.engine.model.named_parameters())
    assert all(torch.equal(p, theirs[n]) for n, p in trainer.model.named_parameters())
    assert sampled_from(kept, whole(corpus)) < 1e-5


@pytest.mark.parametrize(("most", "every"), [(1, 1), (2, 1), (1, 2)])
def test_thoughts_are_as_stale_as_they_may_be_and_no_more(corpus, tmp_path, most, every):
    args = settings(
        tmp_path,
        max_staleness=most,
        weight_sync_steps=every,
        max_steps=4,
        token_budget=256,
        gradient_accumulation_steps=2,
    )
    trainer, _, kept, drawn = made(corpus, args)
    trainer.train()
    assert sampled_from(kept, whole(corpus)) < 1e-5
    stale = [v - s.model_version for s, v in drawn]
    assert 0 < max(stale) <= most and min(stale) >= 0
    assert trainer.model_version == 1 + 4 // every
    ids = [s.group_id for s, _ in drawn]
    assert ids == sorted(ids) and max(map(ids.count, ids)) == 4
    rows = [row for row in trainer.state.log_history if "sample/staleness_max" in row]
    assert max(row["sample/staleness_max"] for row in rows) == max(stale)
    assert all(0 <= row["sample/time_in_queue_s"] < 60 for row in rows)


def test_the_trainer_gets_its_attention_back(corpus, tmp_path):
    trainer, rollouts, _, _ = made(corpus, settings(tmp_path, max_steps=1), baseline="frozen")
    trainer.train()
    assert trainer.model.config._attn_implementation == packing.TREE_ATTENTION
    assert rollouts.reward.attention == "tree_sdpa" and rollouts.reward.layout.tree
    assert rollouts.reward.reference.model.config._attn_implementation == "tree_sdpa"
    row = next(r for r in trainer.state.log_history if "ig/mean" in r)
    assert row["ig/mean"] == pytest.approx(
        row["ig/self"], abs=1e-6
    )  # no step was made before these were scored


def test_with_adapters(corpus, tmp_path):
    """The engine gets merged weights under the checkpoint's names; frozen is the model without adapters."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    args = settings(tmp_path, max_staleness=0, learning_rate=0.1)
    trainer, rollouts, kept, _ = made(corpus, args, peft_config=lora, baseline="frozen")
    trainer.train()
    logs = [row for row in trainer.state.log_history if "ratio" in row]
    assert logs[0]["ratio"] == pytest.approx(1, abs=1e-4)
    assert all(abs(row["ig/mean"] - row["ig/self"]) > 1e-4 for row in logs)
    merged = trainer.model.merge_and_unload()
    merged.set_attn_implementation("sdpa")
    ids = torch.arange(5, 15)[None]
    assert torch.allclose(merged(ids).logits, rollouts.engine.model(ids).logits, atol=1e-4)
    assert not torch.allclose(merged(ids).logits, whole(corpus)(ids).logits, atol=1e-2)


class Broken(HFEngine):
    """An engine that fails or hangs after `good` groups."""

    def __init__(self, model: Any, tokenizer: Any, good: int, error: BaseException | None):
        super().__init__(model, tokenizer=tokenizer, shares_weights=False)
        self.good, self.error = good, error

    async def sample(self, *given: Any) -> Any:
        self.good -= 1
        if self.good < 0 and self.error is None:
            await asyncio.sleep(1000)
        if self.good < 0:
            raise self.error
        return await super().sample(*given)


@pytest.mark.parametrize(
    ("good", "error", "said"),
    [
        (
            0,
            OSError("no route to host"),
            "the engine failed while it sampled thoughts: OSError.*no route to host",
        ),
        (5, OSError("no route to host"), "the engine failed"),
        (3, ValueError("prompt 0 is too long"), "cannot sample.*too long"),
        (3, None, "no thoughts came for . s .heartbeat_stale_after_s is 1.: Broken hangs"),
        (
            5,
            None,
            "1 rollouts still ran 1 s after the queue was paused: Broken hangs, or heartbeat_stale_after_s",
        ),
    ],
)
def test_an_engine_that_fails_ends_the_training(corpus, tmp_path, good, error, said):
    """train() raises what happened and leaves no thread, whether the engine raises or hangs."""
    before = threads()
    engine = Broken(whole(corpus), AutoTokenizer.from_pretrained(corpus / "base"), good, error)
    trainer, rollouts, _, _ = made(corpus, settings(tmp_path, heartbeat_stale_after_s=1.0), engine=engine)
    with pytest.raises((RuntimeError, ConfigError), match=said):
        trainer.train()
    assert threads() == before and rollouts.queue is None
    with pytest.raises(RuntimeError, match="serves one training"):
        rollouts.check_health(60.0)


def test_weights_that_do_not_fit_end_the_training(corpus, tmp_path):
    engine = HFEngine(tiny_model("qwen2", len(dial.WORDS)), shares_weights=False)
    trainer, *_ = made(corpus, settings(tmp_path), engine=engine)
    with pytest.raises(ValueError, match="do not fit the engine's model"):
        trainer.train()


def test_thoughts_that_do_not_count_are_left_out(corpus, tmp_path, monkeypatch):
    """Groups with fewer than two counted thoughts are dropped and counted; if all are, the run ends."""
    trainer, _, kept, drawn = made(
        corpus, settings(tmp_path, max_completion_length=24, learning_rate=0.0), cut="mask"
    )
    trainer.train()
    counted = [(g, [r is not None for r in rewards]) for (g,), rewards, _ in kept.calls]
    usable = [(g, c) for g, c in counted if sum(c) > 1]
    assert any(0 < sum(c) < 4 for _, c in usable) and len(usable) < len(counted)
    expected = [
        (*g.prompt.token_ids, *t.token_ids)
        for g, c in usable
        for t, yes in zip(g.thoughts, c, strict=True)
        if yes
    ]
    assert [tuple(s.input_ids) for s, _ in drawn] == expected[: len(drawn)] and len(drawn) == 32
    dropped = sum(row.get("sample/dropped_uncounted_total", 0) for row in trainer.state.log_history)
    assert dropped == 4 * (len(counted) - len(usable))

    monkeypatch.setattr(trl_async, "PATIENCE", 6)
    trainer, *_ = made(corpus, settings(tmp_path, max_completion_length=1), cut="mask")
    with pytest.raises(RuntimeError, match="6 groups in a row had fewer than two thoughts that count"):
        trainer.train()


def test_the_seams_of_trl_are_there():
    """If a TRL upgrade asks for other methods or arguments, this test names them."""
    for protocol in (async_grpo_trainer.RolloutWorkerProtocol, async_grpo_trainer.WeightTransferProtocol):
        for name, theirs in inspect.getmembers(protocol, inspect.isfunction):
            if not name.startswith("_"):
                ours = inspect.signature(getattr(AsyncRollouts, name)).parameters
                assert list(ours) == list(inspect.signature(theirs).parameters), f"{protocol.__name__}.{name}"
    assert set(async_grpo_trainer.RolloutWorkerProtocol.__annotations__) == {
        "rollout_buffer",
        "metrics_queue",
    }
    assert not async_grpo_trainer.WeightTransferProtocol.__annotations__


def test_a_missing_trl_says_how_to_get_it(corpus, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "trl"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install "rlpretrain\[trl\]"'):
        AsyncRollouts(None, None, None, None)  # type: ignore[arg-type]


def test_bad_settings(corpus, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(corpus / "base")
    reward = InformationGainReward(tokenizer=tokenizer, **AFTER)
    data, args = reward.dataset(str(corpus / "train.jsonl")), settings(tmp_path)
    engine = HFEngine(whole(corpus), shares_weights=False)
    without = InformationGainReward(tokenizer=word_tokenizer(["a", "shows"]), **AFTER)
    for given, said in (
        ((without, engine, data, args), "lacked <think> and </think>, and so does the checkpoint"),
        ((reward, HFEngine(whole(corpus)), data, args), "must have weights of its own"),
        (
            (reward, engine, Dataset.from_dict({"prompt": ["a"]}), args),
            "the dataset is not one that reward.dataset",
        ),
        ((reward, engine, data, settings(tmp_path, token_budget=None)), "set token_budget"),
        ((reward, engine, data, settings(tmp_path, num_generations=1)), "at least 2"),
        ((reward, engine, data, settings(tmp_path, min_p=0.1)), "neither min_p nor repetition_penalty"),
    ):
        with pytest.raises(ConfigError, match=said):
            AsyncRollouts(*given)
    rollouts = AsyncRollouts(reward, engine, data, args)
    with pytest.raises(RuntimeError, match=r"callbacks=\[reward.callback\]"):
        rollouts.start()
    with pytest.raises(RuntimeError, match="as weight_transfer"):
        rollouts.update_model_version(1)
    with pytest.raises(ConfigError, match="the dataset is empty"):
        next(cycle_positions([]))
    texts = [json.loads(line)["text"] for line in (corpus / "train.jsonl").read_text().splitlines()[:3]]
    stream = reward.dataset(IterableDataset.from_generator(lambda: ({"text": t} for t in texts)))
    found = list(itertools.islice(AsyncRollouts(reward, engine, stream, args).positions, 4))
    assert found[3] == found[0] != found[1] and [p.document_id for p in found] == ["0", "1", "2", "0"]
    with pytest.raises(ConfigError, match="the dataset lacks document_id"):
        next(cycle_positions([{"prompt": "a"}]))


def test_a_sharded_model_is_refused(corpus, tmp_path):
    """Every rank refuses it before any rank waits for another."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    tokenizer = AutoTokenizer.from_pretrained(corpus / "base")
    reward = InformationGainReward(tokenizer=tokenizer, **AFTER)
    engine = HFEngine(whole(corpus), shares_weights=False)
    AsyncRollouts(reward, engine, reward.dataset(str(corpus / "train.jsonl")), settings(tmp_path))
    if mine := not dist.is_initialized():  # DeepSpeed's, of a test before this one
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(whole(corpus), mesh=dist.init_device_mesh("cpu", (1,)))
        with pytest.raises(ConfigError, match="sharded over several"):
            reward.watch(model)
        with pytest.raises(ConfigError, match="set fsdp_version 2"):
            first = FullyShardedDataParallel(whole(corpus), device_id=torch.device("cpu"))
            InformationGainReward(whole(corpus), tokenizer, **AFTER).watch(first)
    finally:
        if mine:
            dist.destroy_process_group()
    reward.watch(whole(corpus))


@pytest.mark.learning
def test_thinking_comes_to_pay(tmp_path):
    """From the demo's base, with thoughts up to two steps old, thoughts make targets more likely."""
    dial.write(tmp_path, base=10, train=1000, held_out=10)
    args = settings(
        tmp_path,
        per_device_train_batch_size=128,
        num_generations=8,
        max_completion_length=24,
        max_steps=36,
        learning_rate=3e-4,
        max_staleness=2,
        max_grad_norm=1.0,
    )
    trainer, *_ = made(tmp_path, args, path=BASE, cut="penalise")
    trainer.train()
    rows = [row for row in trainer.state.log_history if "ig/mean" in row]
    after = [row["ig/mean"] + row["baseline/self"] for row in rows]
    assert np.mean(after[-8:]) > np.mean(after[:4]) + 0.4
    assert (
        np.mean([row["baseline/self"] for row in rows[-8:]])
        > np.mean([row["baseline/self"] for row in rows[:4]]) - 0.3
    )
    assert max(row["sample/staleness_max"] for row in rows) in (1, 2) and all(
        abs(row["ratio"] - 1) < 0.1 for row in rows
    )


@pytest.mark.slow
def test_two_processes(corpus, tmp_path):
    """Rank 0 samples for both ranks, and both make the same update; rank 1 needs no engine."""
    words = ["-m", "tests.scripts.trl_async_ranks", str(corpus), str(tmp_path)]
    done = ranks(2, *words, environment=alone() | {"ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr[-6000:]
    first, second = (json.loads((tmp_path / f"rank-{r}.json").read_text()) for r in range(2))
    assert first["calls"] == 8 and first["drawn"] == 32 and second["calls"] == second["drawn"] == 0
    assert first["worst"] < 1e-5 and first["sampled"] < 1e-5
    assert first["logs"][0]["ratio"] == pytest.approx(1, abs=1e-5)
    assert first["sum"] == pytest.approx(second["sum"], abs=1e-9) and first["sum"] == pytest.approx(
        first["engine"], abs=1e-9
    )


@pytest.mark.slow
def test_vllm_samples_for_it(corpus, tmp_path):
    """In-process vLLM on a CPU takes the weights at each sync, a tied head included."""
    pytest.importorskip("vllm")
    from rollout.vllm_local import VLLMEngine

    folder = tmp_path / "base"  # of a shape that vLLM has kernels for
    tiny_model("qwen3", len(dial.WORDS), **SHAPE).save_pretrained(folder)
    dial.tokenizer().save_pretrained(folder)
    engine = VLLMEngine(str(folder), max_model_len=128, kv_cache_gib=0.05, max_num_seqs=32)
    trainer, _, kept, drawn = made(corpus, settings(tmp_path, max_staleness=1), engine=engine, path=folder)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "ratio" in row]
    assert logs[0]["ratio"] == pytest.approx(1, abs=1e-3) and engine.version == 4
    assert len({g.policy_version for (g,), *_ in kept.calls}) > 1
    assert sampled_from(kept, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)) < 1e-3
    engine.close()
