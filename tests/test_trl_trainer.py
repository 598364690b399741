"""RLPTrainer: its update is Pretrainer's, plain text goes in, and every seam of TRL it stands on is there."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.gpu_paths import write_inputs
from rlpretrain.config import ConfigError
from rlpretrain.corpora import dial
from rlpretrain.trl import InformationGainReward
from rlpretrain.trl.rollout import Rollouts
from rollout.hf import HFEngine
from tests.builders.engines import SHAPE
from tests.builders.processes import alone, ranks
from tests.builders.tiny import tiny_model
from tests.builders.trl import AFTER, Kept, by_hand, settings

trl = pytest.importorskip("trl")
from rlpretrain.trl import RLPConfig, RLPTrainer  # noqa: E402
from tests.builders.trl_trainer import ONE, Gradient, close, native, rows, stored  # noqa: E402

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
"""What `accelerate launch` sets for FSDP 2."""


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("ntp", [0.0, 0.3])
def test_the_update_is_the_pretrainers(values, corpus, tmp_path, ntp, parts):
    """Same thoughts: the same gradient to 1e-5, and the same weights, whole or in micro-batches that split
    groups.
    """
    batch, gradient, after = native(values, loss__ntp_coef=ntp)
    model = AutoModelForCausalLM.from_pretrained(corpus / "base", dtype=torch.float32)
    tokenizer, seen = AutoTokenizer.from_pretrained(corpus / "base"), Gradient()
    changes = ONE | {"per_device_train_batch_size": 16 // parts, "gradient_accumulation_steps": parts}
    args = settings(
        tmp_path, RLPConfig, ntp_coef=ntp, cut="force_close", adam_epsilon=1e-8, **changes, **AFTER
    )
    trainer = RLPTrainer(
        model,
        args=args,
        train_dataset=rows(batch, tokenizer),
        processing_class=tokenizer,
        callbacks=[seen],
        rollout_func=stored(batch),
    )
    trainer.train()
    assert close(gradient, seen.found) < 1e-5
    for (
        name,
        p,
    ) in (
        model.named_parameters()
    ):  # Adam's first step is the gradient's sign, which means nothing where that is noise
        clear = gradient[name].abs() > 1e-3 * gradient[name].abs().max()
        assert torch.allclose(p[clear], after[name][clear], atol=2e-5), name
    if ntp:
        ours = json.loads((Path(values["output_dir"]) / "metrics.jsonl").read_text().splitlines()[0])
        assert trainer.state.log_history[0]["ntp/loss"] == pytest.approx(ours["ntp/loss"], abs=1e-5)


def test_grpo_with_our_reward_is_rlp_but_for_a_constant(values, corpus, tmp_path):
    """TRL's own trainer, mean-centred and unscaled: RLP's gradient times (G - 1) / G."""
    batch, gradient, _ = native(values, loss__ntp_coef=0.0)
    model = AutoModelForCausalLM.from_pretrained(corpus / "base", dtype=torch.float32)
    tokenizer, seen = AutoTokenizer.from_pretrained(corpus / "base"), Gradient()
    reward = InformationGainReward(model, tokenizer, cut="force_close", **AFTER)
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=[reward],
        callbacks=[reward.callback, seen],
        processing_class=tokenizer,
        args=settings(tmp_path, **ONE),
        train_dataset=rows(batch, tokenizer),
        rollout_func=stored(batch),
    )
    trainer.train()
    assert close(gradient, seen.found, factor=4 / 3) < 1e-5


@pytest.mark.parametrize("streaming", [False, True])
def test_plain_text_goes_in(corpus, tmp_path, streaming):
    """As a TRL user writes it: a path or a model, a dataset with a text column; the model card names the
    paper.
    """
    texts = [json.loads(line)["text"] for line in (corpus / "train.jsonl").read_text().splitlines()]
    data: Any = Dataset.from_dict({"text": texts})
    if streaming:
        data = IterableDataset.from_generator(lambda: ({"text": t} for t in texts))
    args = settings(
        tmp_path,
        RLPConfig,
        cut="force_close",
        save_strategy="steps",
        save_steps=2,
        positions="random",
        max_length=200,
    )
    trainer = RLPTrainer(str(corpus / "base"), args=args, train_dataset=data)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert all(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if "norm" not in n)
    row = next(r for r in trainer.state.log_history if "ig/mean" in r)
    assert {"ntp/loss", "rewards/information_gain/mean", "reward", "completions/mean_length"} <= row.keys()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2510.01265" in card and "RLP: Reinforcement as a Pretraining Objective" in card
    args = settings(tmp_path, RLPConfig, cut="force_close", max_steps=3, max_length=200)
    again = RLPTrainer(str(corpus / "base"), args=args, train_dataset=data)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert again.state.global_step == 3


def test_adapters_and_further_rewards(corpus, tmp_path):
    peft = pytest.importorskip("peft")

    def short(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [-float(len(ids)) for ids in completion_ids]

    args = settings(
        tmp_path, RLPConfig, cut="force_close", reward_weights=[1.0, 0.1], baseline="frozen", **AFTER
    )
    trainer = RLPTrainer(
        str(corpus / "base"),
        args=args,
        train_dataset=Dataset.from_json(str(corpus / "train.jsonl")),
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear"),
        reward_funcs=short,
    )
    trainer.train()
    row = next(r for r in trainer.state.log_history if "reward" in r)
    expected = row["rewards/information_gain/mean"] + 0.1 * row["rewards/short/mean"]
    assert row["reward"] == pytest.approx(expected, abs=1e-5)
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_bad_settings(values, corpus, tmp_path):
    data = Dataset.from_json(str(corpus / "train.jsonl"))
    base = str(corpus / "base")
    for changes, fields, said in (
        ({}, {"train_dataset": None}, "needs a train_dataset"),
        ({"dataset_text_field": "txt"}, {}, "no column 'txt'"),
        ({"positions": "afterr"}, {}, "did you mean 'after'"),
        ({"objective_fields": {"clipp": 1}}, {}, "did you mean 'clip'"),
    ):
        with pytest.raises(ConfigError, match=said):
            RLPTrainer(
                base, args=settings(tmp_path, RLPConfig, **changes), **({"train_dataset": data} | fields)
            )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    prompts = InformationGainReward(model, tokenizer, **AFTER).dataset(data)
    with pytest.raises(ConfigError, match="whole=True"):
        RLPTrainer(
            model, args=settings(tmp_path, RLPConfig), train_dataset=prompts, processing_class=tokenizer
        )


def test_the_command_line_knows_its_fields(tmp_path):
    """TRL's parser: flags, JSON, YAML; and the defaults are RLP's."""
    (tmp_path / "rlp.yaml").write_text("positions: after\nmarker: '='\nobjective_fields: {clip: 3.0}\n")
    parser = trl.TrlParser(RLPConfig)
    where = ["--output_dir", str(tmp_path / "out"), "--use_cpu", "--bf16", "false"]
    (args,) = parser.parse_args_and_config(
        [*where, "--config", str(tmp_path / "rlp.yaml"), "--ntp_coef", "0"]
    )
    assert (args.positions, args.marker, args.objective_fields, args.ntp_coef) == (
        "after",
        "=",
        {"clip": 3.0},
        0,
    )
    (args,) = parser.parse_args_and_config([*where, "--objective_fields", '{"clip": 2.0}'])
    assert args.objective_fields == {"clip": 2.0}
    assert (args.num_generations, args.loss_type, args.scale_rewards) == (16, "grpo", "none")
    assert (args.beta, args.temperature) == (0.0, 1.0)


SEAMS = {
    "_tokenize_prompts": ["self", "prompts"],
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_compute_loss": ["self", "model", "inputs"],
}


@pytest.mark.parametrize("name", SEAMS)
def test_the_seams_of_trl_are_there(name):
    """An upgrade of TRL that moves what we override fails here, by name."""
    found = list(inspect.signature(getattr(trl.GRPOTrainer, name)).parameters)
    assert found == SEAMS[name], f"TRL {trl.__version__}: GRPOTrainer.{name} takes {found}"


def in_ranks(corpus: Path, out: Path, number: int, kind: str, gpu: bool = False) -> list[dict[str, Any]]:
    """The records of a training in ranks: every rank's rewards are those of the whole live model."""
    out.mkdir(exist_ok=True)
    environment = alone() if gpu else alone() | {"DS_ACCELERATOR": "cpu"}
    zero = kind.startswith("zero")
    if not gpu:
        environment |= {"ACCELERATE_USE_DEEPSPEED": "true"} if zero else {"ACCELERATE_USE_CPU": "true"}
    environment |= FSDP if kind in ("fsdp", "rollouts") else {}
    words = ["-m", "tests.scripts.trl_ranks", str(corpus), str(out), kind]
    done = ranks(number, *words, environment=environment)
    assert done.returncode == 0, done.stderr[-6000:]
    found = [json.loads((out / f"rank-{r}.json").read_text()) for r in range(number)]
    assert all(record["calls"] == 2 and record["worst"] < 1e-4 for record in found)
    for step, log in enumerate(found[0]["logs"]):  # the log has the mean of all ranks
        mean = sum(sum(r["rewards"][step]) for r in found) / sum(len(r["rewards"][step]) for r in found)
        assert log["rewards/information_gain/mean"] == pytest.approx(mean, abs=1e-4)
        assert log["ig/mean"] == pytest.approx(mean, abs=1e-4)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_with_zero(corpus, tmp_path, kind):
    """In one process: transformers counts one rank where DeepSpeed runs on CPUs, and refuses the batch size
    of two.
    """
    in_ranks(corpus, tmp_path, 1, kind)


@pytest.mark.slow
def test_two_ranks_train_alike_with_ddp_and_fsdp(corpus, tmp_path):
    """Accelerate's FSDP 2; the whole weights are gathered from its shards."""
    for kind in ("ddp", "fsdp"):
        in_ranks(corpus, tmp_path / kind, 2, kind)
    ddp, *others = (
        load_file(tmp_path / kind / f"rank-{rank}.safetensors") for kind in ("ddp", "fsdp") for rank in (0, 1)
    )
    start = load_file(corpus / "base" / "model.safetensors")
    for other in others:
        assert other.keys() == ddp.keys()
        for name, weight in ddp.items():
            assert float((other[name] - weight).abs().max()) < 1e-4, name
    assert any(float((ddp[name] - weight).abs().max()) > 1e-2 for name, weight in start.items())


@pytest.mark.slow
def test_our_engine_gets_the_weights_that_fsdp_shards(corpus, tmp_path):
    """With adapters, which are off for the frozen baseline and merged in for the engine."""
    found = in_ranks(corpus, tmp_path, 2, "rollouts")
    assert max(record["apart"] for record in found) < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_fsdp_trains_on_a_gpu_as_ddp(tmp_path):
    """One rank over NCCL; rewards and the engine's log-probs are those of a CPU."""
    write_inputs(tmp_path)
    found = {}
    for kind in ("ddp", "fsdp", "rollouts"):
        (record,) = in_ranks(tmp_path, tmp_path / kind, 1, kind, gpu=True)
        assert record["apart"] < 1e-4
        found[kind] = load_file(tmp_path / kind / "rank-0.safetensors")
    assert found["fsdp"].keys() == found["ddp"].keys()
    assert all(float((found["fsdp"][name] - x).abs().max()) < 1e-4 for name, x in found["ddp"].items())


def rolled(corpus: Path, folder: Path, make: Any, **changes: Any) -> tuple[Any, Any, Any]:
    """(trainer, reward, rollouts) of a training that samples with an engine of ours."""
    model = AutoModelForCausalLM.from_pretrained(corpus / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(corpus / "base")
    reward = InformationGainReward(model, tokenizer, cut="force_close", **AFTER)
    data = reward.dataset(str(corpus / "train.jsonl"))
    rollouts = Rollouts(reward, make(model, tokenizer), data)
    kept = Kept(reward)
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=[reward],
        callbacks=[reward.callback],
        train_dataset=data,
        rollout_func=rollouts,
        args=settings(folder, **changes),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer, kept, rollouts


def test_our_engine_samples_and_scores_for_trl(corpus, tmp_path):
    """Prompts come repeated, a thought goes to each; the gain arrives as a field; weights follow the
    trainer.
    """
    trainer, kept, rollouts = rolled(
        corpus, tmp_path, lambda m, t: HFEngine(copy.deepcopy(m), tokenizer=t, shares_weights=False)
    )
    logs = [row for row in trainer.state.log_history if "ig/mean" in row]
    assert len(kept.calls) == 2 == len(logs) and rollouts.engine.version == 1
    live = AutoModelForCausalLM.from_pretrained(corpus / "base", dtype=torch.float32)
    for (groups, rewards, weights), row in zip(kept.calls, logs, strict=True):
        assert [len(g.thoughts) for g in groups] == [4, 4]
        live.load_state_dict(weights, strict=False)
        assert rewards == pytest.approx(by_hand(live, groups, "force_close"), abs=1e-5)
        assert (
            row["rewards/information_gain/mean"]
            == pytest.approx(sum(rewards) / 8, abs=1e-5)
            == row["ig/mean"]
        )
        for g in groups:  # sampled with the weights of that step
            for t in g.thoughts:
                with torch.no_grad():
                    ids = torch.tensor([[*g.prompt.token_ids, *t.token_ids]])
                    logps = live(input_ids=ids).logits[0].log_softmax(-1)
                    own = [
                        float(logps[len(g.prompt.token_ids) + k - 1, x]) for k, x in enumerate(t.token_ids)
                    ]
                assert t.behaviour_logps == pytest.approx(own, abs=1e-4)


def test_what_rollouts_refuse(corpus, tmp_path):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(corpus / "base"),
        AutoTokenizer.from_pretrained(corpus / "base"),
    )
    reward = InformationGainReward(model, tokenizer, **AFTER)
    engine = HFEngine(model, tokenizer=tokenizer)
    stream = reward.dataset(
        IterableDataset.from_generator(lambda: ({"text": "ann has 6 bob up3 shows 9 ."},))
    )
    for data in (stream, Dataset.from_dict({"prompt": ["a"]})):
        with pytest.raises(ConfigError, match="needs the dataset that reward.dataset"):
            Rollouts(reward, engine, data)
    rollouts = Rollouts(reward, engine, reward.dataset(str(corpus / "train.jsonl")))
    with pytest.raises(ConfigError, match="a prompt is not in the dataset"):
        rollouts(["nobody knows"], SimpleNamespace(state=SimpleNamespace(global_step=0), args=None))
    with pytest.raises(RuntimeError, match=r"callbacks=\[reward.callback\]"):
        list(rollouts.weights())


@pytest.mark.slow
def test_vllm_samples_for_trl(corpus, tmp_path):
    """Real vLLM in process, on a CPU, with adapters: it is given merged weights, so the trainer finds its
    samples as likely.
    """
    pytest.importorskip("vllm")
    peft = pytest.importorskip("peft")
    from rollout.vllm_local import VLLMEngine

    folder = tmp_path / "base"  # of a shape that vLLM has kernels for
    tiny_model("qwen3", len(dial.WORDS), **SHAPE).save_pretrained(folder)
    dial.tokenizer().save_pretrained(folder)
    engine = VLLMEngine(str(folder), max_model_len=128, kv_cache_gib=0.05, max_num_seqs=32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reward = InformationGainReward(model, tokenizer, cut="force_close", **AFTER)
    data = reward.dataset(str(corpus / "train.jsonl"))
    rollouts, kept = Rollouts(reward, engine, data), Kept(reward)
    lora = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    args = settings(tmp_path, learning_rate=0.05)
    trl.GRPOTrainer(
        model,
        reward_funcs=[reward],
        callbacks=[reward.callback],
        train_dataset=data,
        rollout_func=rollouts,
        args=args,
        processing_class=tokenizer,
        peft_config=lora,
    ).train()
    groups, _, weights = kept.calls[1]
    reward.model.load_state_dict(weights, strict=False)
    live = reward.model.eval()
    for g in groups:
        for t in g.thoughts:
            with torch.no_grad():
                logps = (
                    live(input_ids=torch.tensor([[*g.prompt.token_ids, *t.token_ids]]))
                    .logits[0]
                    .log_softmax(-1)
                )
            own = [float(logps[len(g.prompt.token_ids) + k - 1, x]) for k, x in enumerate(t.token_ids)]
            assert t.behaviour_logps == pytest.approx(own, abs=1e-3)
    engine.close()
