"""What users of TRL bring along: resumed runs, mixed precision, KL, several rewards and datasets, adapters
of other kinds.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from rewards import leave_one_out
from rlpretrain.config import ConfigError
from rlpretrain.corpora import dial
from rlpretrain.trl import InformationGainReward, ObjectiveReward
from rlpretrain.trl.rollout import Rollouts
from rollout.hf import HFEngine
from tests.builders.processes import alone, ranks
from tests.builders.tiny import tiny_model, word_tokenizer
from tests.builders.trl import AFTER, Kept, by_hand, settings
from tests.builders.trl_trainer import ONE, Gradient, close, native, rows, stored

trl = pytest.importorskip("trl")
from rlpretrain.trl import RLPConfig, RLPTrainer  # noqa: E402


@pytest.fixture
def texts(corpus: Path) -> Dataset:
    return Dataset.from_json(str(corpus / "train.jsonl"))


def sharp(folder: Path, **fields: Any) -> str:
    """A random base with opinions, where half precision shows; returns its folder."""
    tiny_model("qwen3", len(dial.WORDS), seed=3, initializer_range=0.3, **fields).save_pretrained(folder)
    dial.tokenizer().save_pretrained(folder)
    return str(folder)


def test_float32_weights_under_bf16(texts, tmp_path):
    """accelerate wraps the model's forward in autocast; the check of the head is not of that."""
    args = settings(tmp_path, RLPConfig, bf16=True, max_steps=1, cut="force_close", **AFTER)
    trainer = RLPTrainer(sharp(tmp_path / "base"), args=args, train_dataset=texts)
    kept = Kept(trainer.reward)
    trainer.train()
    ((groups, rewards, weights),) = kept.calls
    with torch.no_grad():  # or there would be nothing to bear
        ids = torch.arange(1, 9)[None]
        whole, own = (
            f(input_ids=ids).logits.log_softmax(-1) for f in (trainer.model, trainer.model._original_forward)
        )
        assert (whole - own).abs().max() > 1e-3
    live = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    live.load_state_dict(weights, strict=False)
    assert np.array(rewards, float) == pytest.approx(
        np.array(by_hand(live, groups, "force_close"), float), abs=1e-5
    )


@pytest.mark.parametrize("baseline", ["frozen", "ema"])
def test_a_resumed_run_has_the_baseline_that_it_had(texts, corpus, tmp_path, baseline):
    def run(**resume: Any) -> dict[int, float]:
        args = settings(
            tmp_path,
            RLPConfig,
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            baseline=baseline,
            ema_decay=0.8,
            cut="force_close",
            **AFTER,
        )
        trainer = RLPTrainer(str(corpus / "base"), args=args, train_dataset=texts)
        trainer.train(**resume)
        return {row["step"]: row["ig/mean"] for row in trainer.state.log_history if "ig/mean" in row}

    whole = run()
    assert (tmp_path / "out" / "checkpoint-2" / "ema.safetensors").exists() == (baseline == "ema")
    checkpoint = tmp_path / "out" / "checkpoint-2"
    again = run(resume_from_checkpoint=str(checkpoint))
    assert again[3] == pytest.approx(whole[3], abs=1e-5) and again[4] == pytest.approx(whole[4], abs=1e-4)
    if baseline == "ema":
        for name in ("log_history", None):  # another run's average, then none
            if name:
                state = json.loads((checkpoint / "trainer_state.json").read_text())
                (checkpoint / "trainer_state.json").write_text(json.dumps(state | {name: state[name][:1]}))
            else:
                (checkpoint / "ema.safetensors").unlink()
            with pytest.warns(UserWarning, match="the moving average begins again"):
                assert run(resume_from_checkpoint=str(checkpoint))[3] != pytest.approx(whole[3], abs=1e-4)


@pytest.mark.parametrize("ntp", [0.0, 0.3])
def test_the_update_is_the_pretrainers_where_thoughts_are_not_counted(values, corpus, tmp_path, ntp):
    """The mean of the policy's loss is over the thoughts that count."""
    batch, gradient, _ = native(
        values,
        loss__ntp_coef=ntp,
        sampling__cut="mask",
        sampling__max_thought_tokens=60,
        sampling__thoughts=8,
    )
    counted = sum(t.finish_reason.value == "close" for g in batch.groups for t in g.thoughts)
    assert 6 <= counted <= 26 and max(g.abs().max() for g in gradient.values()) > 1e-3
    model = AutoModelForCausalLM.from_pretrained(corpus / "base", dtype=torch.float32)
    tokenizer, seen = AutoTokenizer.from_pretrained(corpus / "base"), Gradient()
    args = settings(
        tmp_path,
        RLPConfig,
        ntp_coef=ntp,
        cut="mask",
        max_completion_length=60,
        num_generations=8,
        **AFTER,
        **(ONE | {"per_device_train_batch_size": 32}),
    )
    RLPTrainer(
        model,
        args=args,
        train_dataset=rows(batch, tokenizer),
        processing_class=tokenizer,
        callbacks=[seen],
        rollout_func=stored(batch),
    ).train()
    assert close(gradient, seen.found) < 1e-5


def half_cut(corpus: Path, folder: Path, **fields: Any) -> tuple[Any, list[dict[str, Any]]]:
    """(trainer, what its loss was given) of one step on thoughts of which some are cut, with a further
    reward.
    """

    def nothing(completion_ids: list[Any], **_: Any) -> list[float]:
        return [0.01 * k for k in range(len(completion_ids))]

    texts = Dataset.from_json(str(corpus / "train.jsonl"))
    args = settings(
        folder,
        RLPConfig,
        max_steps=1,
        max_completion_length=40,
        baseline="none",
        log_completions=True,
        **{"cut": "mask"} | fields,
        **AFTER,
    )
    trainer = RLPTrainer(str(corpus / "base"), args=args, train_dataset=texts, reward_funcs=[nothing])
    given: list[dict[str, Any]] = []
    make = trainer._generate_and_score_completions

    def spy(inputs: Any) -> Any:
        given.append(make(inputs))
        return given[-1]

    trainer._generate_and_score_completions = spy
    trainer.train()
    return trainer, given


def test_uncounted_thoughts_earn_nothing_from_further_rewards_either(corpus, tmp_path):
    trainer, (given,) = half_cut(corpus, tmp_path)
    gains = torch.tensor(trainer._logs["rewards"]["information_gain"], dtype=torch.float64)
    cut = gains.isnan()
    assert 0 < cut.sum() < len(cut)
    assert torch.equal(given["advantages"] == 0, cut)
    total = gains + 0.01 * torch.arange(8)
    expected = leave_one_out(total.view(2, 4)).flatten()
    assert list(trainer._logs["advantages"]) == pytest.approx(
        expected.tolist(), abs=1e-5
    )  # the table has what was trained on
    assert given["advantages"].tolist() == pytest.approx((expected * 8 / (~cut).sum()).tolist(), abs=1e-5)


def test_another_way_of_joining_rewards_is_trls(corpus, tmp_path):
    trainer, (given,) = half_cut(
        corpus, tmp_path, multi_objective_aggregation="normalize_then_sum", cut="force_close"
    )
    assert given["advantages"].tolist() == pytest.approx(list(trainer._logs["advantages"]))
    assert float(given["advantages"].std()) == pytest.approx(1.0, abs=0.05)  # as TRL's are


def test_several_evaluation_sets(texts, corpus, tmp_path):
    parts = DatasetDict(short=texts.select(range(3)), long=texts.select(range(3, 8)))
    for held in (parts, dict(parts)):
        args = settings(
            tmp_path,
            RLPConfig,
            cut="force_close",
            eval_strategy="steps",
            eval_steps=1,
            max_steps=1,
            num_generations_eval=2,
            **AFTER,
        )
        trainer = RLPTrainer(str(corpus / "base"), args=args, train_dataset=texts, eval_dataset=held)
        assert {n: len(d) for n, d in trainer.eval_dataset.items()} == {"short": 3, "long": 5}
        trainer.train()
        assert sum("eval_ig/mean" in row for row in trainer.state.log_history) == 2  # TRL gives both one name
    with pytest.raises(ConfigError, match="several datasets"):
        RLPTrainer(str(corpus / "base"), args=args, train_dataset=parts)


def test_columns_that_further_rewards_want(texts, corpus, tmp_path):
    seen: list[Any] = []

    def wants(depth: list[int], completion_ids: list[Any], **_: Any) -> list[float]:
        seen.extend(depth)
        return [0.0] * len(depth)

    args = settings(tmp_path, RLPConfig, cut="force_close", max_steps=1, **AFTER)
    RLPTrainer(str(corpus / "base"), args=args, train_dataset=texts, reward_funcs=wants).train()
    assert seen and set(seen) <= set(texts["depth"])


def test_rows_that_share_a_prompt_keep_their_targets(corpus, tmp_path):
    """TRL hands a rollout_func prompts alone."""
    model = AutoModelForCausalLM.from_pretrained(corpus / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(corpus / "base")
    line = json.loads((corpus / "train.jsonl").read_text().splitlines()[0])["text"]
    head = line[: line.rindex("shows") + len("shows")]
    reward = InformationGainReward(model, tokenizer, cut="force_close", **AFTER)
    data = reward.dataset([f"{head} 1", f"{head} 2"])
    assert len(set(data["prompt"])) == 1 and len(data) == 2
    kept = Kept(reward)
    rollouts = Rollouts(reward, HFEngine(model, tokenizer=tokenizer), data)
    trl.GRPOTrainer(
        model,
        reward_funcs=[reward],
        callbacks=[reward.callback],
        rollout_func=rollouts,
        train_dataset=data,
        args=settings(tmp_path, max_steps=1),
        processing_class=tokenizer,
    ).train()
    groups, rewards, weights = kept.calls[-1]
    assert {g.position.target_ids for g in groups} == {tuple(row["target_ids"]) for row in data}
    live = AutoModelForCausalLM.from_pretrained(corpus / "base", dtype=torch.float32)
    live.load_state_dict(weights, strict=False)
    assert np.array(rewards, float) == pytest.approx(
        np.array(by_hand(live, groups, "force_close"), float), abs=1e-5
    )


@pytest.mark.slow
def test_ranks_score_again_together(corpus, tmp_path):
    """Scoring is a matter of all ranks: one that has to do it again does not do it alone."""
    words = ["-m", "tests.scripts.trl_shared_prompts", str(corpus), str(tmp_path)]
    done = ranks(2, *words, environment=alone() | {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads((tmp_path / f"rank-{r}.json").read_text()) for r in range(2)]
    assert all(record["calls"] == 2 and record["worst"] < 1e-5 for record in found)
    assert sorted(sum((record["targets"] for record in found), [])) == sorted(
        [found[0]["wanted"][0], found[0]["wanted"][2]]
    )


def test_a_reference_for_the_kl_has_the_tags_too(tmp_path):
    words = [f"w{i}" for i in range(20)]
    tokenizer = word_tokenizer(words)
    tiny_model("qwen3", len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    data = Dataset.from_list([{"text": " ".join(words[i : i + 8])} for i in range(10)])
    args = settings(
        tmp_path,
        RLPConfig,
        beta=0.1,
        cut="force_close",
        max_steps=1,
        model_init_kwargs={"use_safetensors": True},
    )
    trainer = RLPTrainer(str(tmp_path / "base"), args=args, train_dataset=data)
    weights = [m.get_input_embeddings().weight for m in (trainer.model, trainer.ref_model)]
    assert torch.equal(*weights) and len(weights[0]) == len(tokenizer) + 2
    assert args.model_init_kwargs == {"use_safetensors": True}  # a revision, for one, is the reference's too
    trainer.train()
    row = next(r for r in trainer.state.log_history if "kl" in r)
    assert row["kl"] == pytest.approx(0, abs=1e-6)  # of the first step
    assert trainer.model.config._name_or_path == str(tmp_path / "base")


@pytest.mark.parametrize(
    ("config", "baseline", "said"),
    [
        (
            "PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=4)",
            "self",
            "prompt and prefix tuning",
        ),
        (
            "PrefixTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=4)",
            "self",
            "prompt and prefix tuning",
        ),
        (
            "LoraConfig(target_modules=['q_proj'], bias='all')",
            "frozen",
            "weights of the model itself are trained as well",
        ),
        ("LoraConfig(target_modules=['q_proj', 'lm_head'])", "self", "name the output head"),
    ],
)
def test_adapters_that_scoring_would_not_see(tmp_path, config, baseline, said):
    peft = pytest.importorskip("peft")
    tiny_model("qwen2", len(dial.WORDS)).save_pretrained(tmp_path / "base")
    dial.tokenizer().save_pretrained(tmp_path / "base")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        AutoTokenizer.from_pretrained(tmp_path / "base"),
    )
    reward = InformationGainReward(model, tokenizer, baseline=baseline, **AFTER)
    with pytest.raises(ConfigError, match=said):
        reward.watch(peft.get_peft_model(model, eval(config, vars(peft))))


def test_four_bits_are_not_dropped(texts, tmp_path):
    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    form = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    args = settings(tmp_path, RLPConfig, cut="force_close", max_steps=2, baseline="frozen", **AFTER)
    trainer = RLPTrainer(
        sharp(tmp_path / "base", hidden_size=64, head_dim=32),
        args=args,
        train_dataset=texts,
        quantization_config=form,
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear"),
    )
    assert trainer.model.get_base_model().is_loaded_in_4bit
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if ".lora_" in n}
    trainer.train()
    assert all(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if ".lora_B" in n)


def test_a_processor_brings_its_tokenizer(texts, corpus, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(corpus / "base")
    processor = type("Processor", (), {"tokenizer": tokenizer})()
    args = settings(tmp_path, RLPConfig, **AFTER)
    with pytest.raises(
        TypeError, match="processing_class"
    ):  # TRL's own word, once we have found the tokenizer in it
        RLPTrainer(str(corpus / "base"), args=args, train_dataset=texts, processing_class=processor)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective_fields": {"target_length": 3}}, "set it as a field of RLPConfig"),
        ({"remove_unused_columns": True}, "leave remove_unused_columns at false"),
        ({"objective": "likelihood", "objective_fields": {"direct": 1.0}}, "a loss on the target itself"),
        ({"objective": "likelihood", "objective_fields": {"score": "jepo"}}, "advantages of its own"),
        ({"objective": "quiet_star"}, "objective.fixed_length: thoughts that TRL samples end"),
        (
            {"objective": "quiet_star", "objective_fields": {"fixed_length": False}},
            "objective.clamp True has advantages of its own",
        ),
        ({"objective": "bow"}, "objective bow cannot be a reward function"),
        ({"objective": "rmt"}, "set ntp_coef 0"),
        (None, "takes an RLPConfig"),
    ],
    ids=str,
)
def test_settings_that_would_have_no_effect(texts, corpus, tmp_path, changes, said):
    args = settings(tmp_path) if changes is None else settings(tmp_path, RLPConfig, **(AFTER | changes))
    with pytest.raises(ConfigError, match=said):
        RLPTrainer(str(corpus / "base"), args=args, train_dataset=texts).train()


def test_frozen_is_frozen_beside_modules_that_are_saved_whole(tmp_path):
    """A bias of a module that is turned off with the adapters is no trained weight of the model itself."""
    peft = pytest.importorskip("peft")
    model = tiny_model("gpt2", len(dial.WORDS))
    reward = InformationGainReward(model, dial.tokenizer(), baseline="frozen", **AFTER)
    reward.watch(
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn"], modules_to_save=["ln_f"]))
    )


def test_several_rewards_want_every_thought_to_count(texts, corpus, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(corpus / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(corpus / "base")
    reward = InformationGainReward(model, tokenizer, cut="mask", **AFTER)
    with pytest.raises(ConfigError, match="cut mask with several reward functions"):
        trl.GRPOTrainer(
            model,
            reward_funcs=[reward, lambda completion_ids, **_: [0.0] * len(completion_ids)],
            callbacks=[reward.callback],
            train_dataset=reward.dataset(texts),
            args=settings(tmp_path),
            processing_class=tokenizer,
        ).train()


def test_the_trainer_has_the_model_of_the_reward(texts, corpus, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(corpus / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(corpus / "base")
    for tags, said in (
        ({}, "does not end a generation"),
        ({"open": "<t>", "close": "</t>"}, "has no rows for the tags"),
    ):
        reward = InformationGainReward(model, copy.deepcopy(tokenizer), **tags, **AFTER)
        with pytest.raises(ConfigError, match=said):
            trl.GRPOTrainer(
                str(corpus / "base"),
                reward_funcs=[reward],
                callbacks=[reward.callback],
                args=settings(tmp_path),
                train_dataset=reward.dataset(texts),
                processing_class=tokenizer,
            ).train()


def test_settings_of_a_dataset_that_nobody_reads(texts, corpus):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(corpus / "base"),
        AutoTokenizer.from_pretrained(corpus / "base"),
    )
    reward = InformationGainReward(model, tokenizer, **AFTER)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (texts, {"max_len": 10}, "unknown settings: max_len"),
        (texts, {"keep": ["nope"]}, "no column nope"),
        (["ann has 6"], {"keep": ["a"]}, "not of texts"),
    ]
    for given, changes, said in cases:
        with pytest.raises(ConfigError, match=said):
            reward.dataset(given, **changes)


def test_a_reward_without_its_callback_of_a_resumed_run_knows_no_beginning(texts, corpus, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(corpus / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(corpus / "base")
    maker = InformationGainReward(model, tokenizer, **AFTER)
    data = maker.dataset(texts)

    def run(reward: ObjectiveReward, steps: int, **resume: Any) -> None:
        args = settings(tmp_path, max_steps=steps, save_strategy="steps", save_steps=1)
        trl.GRPOTrainer(
            model, reward_funcs=[reward], args=args, train_dataset=data, processing_class=tokenizer
        ).train(**resume)

    run(InformationGainReward(baseline="frozen", cut="force_close", **AFTER), 1)
    early = InformationGainReward(model, tokenizer, baseline="frozen", cut="force_close", **AFTER)
    for reward in (InformationGainReward(baseline="frozen", cut="force_close", **AFTER), early):
        with pytest.raises(ConfigError, match="this run was resumed"):
            run(reward, 2, resume_from_checkpoint=True)
    run(InformationGainReward(baseline="self", cut="force_close", **AFTER), 2, resume_from_checkpoint=True)
