"""Rewards by dotted path on TRL's command line: what is logged is what the stored completions are worth by
stored weights.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlpretrain.trl
from rlpretrain import cli
from rlpretrain.config import ConfigError
from rlpretrain.trl import InformationGainReward, to_prompt_dataset
from tests.builders.processes import python

trl = pytest.importorskip("trl")
AFTER = "positions: after, marker: shows"
TAGS = "open: <hm>, close: </hm>"  # new to the tokenizer


def prepare(corpus: Path, out: Path, section: str, *words: str) -> Path:
    data = ["--data", str(corpus / "train.jsonl"), "--objective", f"{{{section}}}"]
    assert cli.main(["prepare", str(corpus / "base"), "--out", str(out), *data, *words]) == 0
    return out


NO_TEXT = {"suppress_tokens": [0, 2, 3, 4]}
"""Ids that TRL's table of completions leaves out, which then could not be scored again: pad, unknown, the
corpus' own tags.
"""
SETTINGS = {
    "per_device_train_batch_size": 16,
    "num_generations": 8,
    "max_completion_length": 24,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "scale_rewards": "none",
    "loss_type": "grpo",
    "log_completions": True,
    "disable_tqdm": True,
    "lr_scheduler_type": "constant",
}


def trainer_at(prepared: Path, reward: Any, out: Path, model: Path | None = None) -> Any:
    """What TRL's script makes of its flags, in this process: no callbacks."""
    args = trl.GRPOConfig(str(out), max_steps=1, save_strategy="no", generation_kwargs=NO_TEXT, **SETTINGS)
    data = load_dataset(str(prepared / "prompts"))["train"]
    return trl.GRPOTrainer(
        str(model or prepared / "model"), reward_funcs=[reward], args=args, train_dataset=data
    )


def steps(out: Path) -> list[pandas.DataFrame]:
    return [pandas.read_parquet(file) for file in sorted((out / "completions").glob("*.parquet"))]


def weights(prepared: Path, out: Path, step: int) -> Any:
    """The model that a step was sampled and scored with: what the step before has saved."""
    folder = out / f"checkpoint-{step - 1}" if step > 1 else prepared / "model"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logp(model: Any, tokenizer: Any, before: str, target: str) -> float:
    """Of a target's ids, from transformers' own logits."""
    head, ids = tokenizer(before)["input_ids"], tokenizer(target)["input_ids"]
    logits = model(input_ids=torch.tensor([[*head, *ids]])).logits[0].float().log_softmax(-1)
    return sum(float(logits[len(head) + k - 1, i]) for k, i in enumerate(ids))


def after_thoughts(model: Any, tokenizer: Any, table: pandas.DataFrame, close: str) -> list[float]:
    """log p(target) after each thought; NaN for those that did not close themselves."""
    return [
        logp(model, tokenizer, f"{row.prompt} {row.completion}", row.target)
        if row.completion.endswith(close)
        else math.nan
        for row in table.itertuples()
    ]


def without(model: Any, tokenizer: Any, table: pandas.DataFrame, opened: str) -> list[float]:
    return [logp(model, tokenizer, row.prompt.removesuffix(opened), row.target) for row in table.itertuples()]


def test_prepare_writes_what_trl_loads(corpus, tmp_path, capsys):
    section = f"{AFTER}, {TAGS}, target_length: 2"
    out = prepare(corpus, tmp_path / "out", section, "--held-out", str(corpus / "held_out.jsonl"))
    said = capsys.readouterr().out
    assert "new to it: <hm>, </hm>" in said and "train: 200, test: 48" in said
    model, tokenizer = weights(out, out, 1), AutoTokenizer.from_pretrained(out / "model")
    close = tokenizer.get_vocab()["</hm>"]
    assert set(model.generation_config.eos_token_id) == {tokenizer.eos_token_id, close}
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == close + 1
    data = load_dataset(str(out / "prompts"))
    assert set(data) == {"train", "test"} and data["test"].num_rows == 48
    given = json.loads(data["train"][0]["objective"])
    assert given == {
        "name": "rlp",
        "positions": "after",
        "marker": "shows",
        "open": "<hm>",
        "close": "</hm>",
        "target_length": 2,
    }
    again = to_prompt_dataset(str(corpus / "train.jsonl"), tokenizer, objective=given.pop("name"), **given)
    assert data["train"].select_columns(again.column_names)[:] == again[:]
    assert (
        cli.main(["prepare", str(corpus / "base"), "--out", str(out), "--data", str(corpus / "train.jsonl")])
        == 2
    )
    assert "model exists already" in capsys.readouterr().err
    words = ["prepare", str(corpus / "base"), "--data", str(corpus / "train.jsonl"), "--objective"]
    assert cli.main([*words, "{name: ntp}", "--out", str(tmp_path / "ntp")]) == 2
    assert "no thoughts to prepare for" in capsys.readouterr().err
    assert (
        cli.main([*words, "{positions: after, marker: '<eos> shows'}", "--out", str(tmp_path / "none")]) == 2
    )
    assert "no document gives a prompt" in capsys.readouterr().err
    assert not (tmp_path / "ntp").exists() and not (tmp_path / "none").exists()  # nothing half done
    boxed = prepare(corpus, tmp_path / "rpt", f"name: rpt, template: raw, target_length: 2, {AFTER}")
    assert (
        weights(boxed, boxed, 1).generation_config.eos_token_id == tokenizer.eos_token_id
    )  # it goes on to a prediction


@pytest.mark.slow
def test_the_command_line_logs_the_gain(corpus, tmp_path):
    """All of it as a user types it, accelerate's launcher included: a reward of ours, and one of a module in
    the folder it is started from, whose EMA must move once a step though training had begun when it was first
    called.
    """
    (tmp_path / "my_rewards.py").write_text(
        "from rlpretrain.trl import InformationGainReward\n"
        "reward = InformationGainReward(baseline='ema', ema_decay=0.5, clip=0.2)\n"
        "reward.__name__ = 'mine'\n"
    )
    prepared, out = prepare(corpus, tmp_path / "prepared", f"{AFTER}, {TAGS}"), tmp_path / "out"
    flags = SETTINGS | {
        "model_name_or_path": prepared / "model",
        "dataset_name": prepared / "prompts",
        "output_dir": out,
        "max_steps": 3,
        "save_steps": 1,
        "learning_rate": 3e-2,
        "generation_kwargs": json.dumps(NO_TEXT),
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    rewards = ["--reward_funcs", "rlpretrain.trl.information_gain_reward", "my_rewards.reward"]
    done = python("-m", "trl.cli.main", "grpo", *words, *rewards, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]

    history = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    logs = [row for row in history if "reward" in row]
    tokenizer, average, compared, apart = (
        AutoTokenizer.from_pretrained(prepared / "model"),
        weights(prepared, out, 1),
        0,
        0.0,
    )
    for step, (table, row) in enumerate(zip(steps(out), logs, strict=True), start=1):
        model = weights(prepared, out, step)
        if step > 1:
            with torch.no_grad():
                for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
                    mine.lerp_(theirs, 0.5)
        thought, own = (
            after_thoughts(model, tokenizer, table, "</hm>"),
            without(model, tokenizer, table, "<hm>"),
        )
        gains = [a - b for a, b in zip(thought, own, strict=True)]
        closed = [not math.isnan(g) for g in gains]
        counted = [g for g in gains if not math.isnan(g)]
        assert table["information_gain"][closed].tolist() == pytest.approx(counted, abs=1e-5)
        assert row["rewards/information_gain/mean"] == pytest.approx(
            table["information_gain"].mean(), abs=1e-5
        )
        assert row["thought/closed_frac"] == len(counted) / 16
        before = without(average, tokenizer, table, "<hm>")
        clipped = [
            max(-0.2, min(0.2, a - b)) for a, b in zip(thought, before, strict=True) if not math.isnan(a)
        ]
        assert table["mine"][closed].tolist() == pytest.approx(clipped, abs=1e-5)
        assert (table["mine"][[not c for c in closed]] <= -0.8).all()  # an unclosed thought loses cut_penalty
        compared += len(counted)
        apart = max(apart, *(abs(a - b) for a, b in zip(own, before, strict=True)))
    assert len(logs) == 3 and compared >= 6 and apart > 1e-2


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("likelihood", "name: likelihood, score: prob"),
        ("rlpr", "name: likelihood, score: debiased_prob"),
        (
            "rpt",
            "name: rpt, template: raw, opening: has, closing: ., strip: true, target_length: 2, "
            "max_prediction_tokens: 8",
        ),
    ],
)
def test_objectives_by_name(corpus, tmp_path, name, section):
    """With the fields that the prompts were prepared with."""
    prepared, out = prepare(corpus, tmp_path / "prepared", f"{section}, {AFTER}, {TAGS}"), tmp_path / "out"
    trainer_at(prepared, getattr(rlpretrain.trl, f"{name}_reward"), out).train()
    (table,) = steps(out)
    tokenizer, model = AutoTokenizer.from_pretrained(prepared / "model"), weights(prepared, out, 1)
    closed = table.completion.str.contains("</hm>")
    assert len(table) == 16 and closed.any()
    if name == "rpt":
        assert set(table[name][closed]) <= {0.0, 1.0} and set(table[name][~closed]) <= {-1.0}
        assert table.completion.str.contains("</hm> .").any()  # it goes on to a prediction
        return
    expected = [math.exp(x) for x in after_thoughts(model, tokenizer, table, "</hm>")]
    if name == "rlpr":
        base = [math.exp(x) for x in without(model, tokenizer, table, "<hm>")]
        expected = [
            a - b if math.isnan(a) else max(0.0, min(1.0, a - b)) for a, b in zip(expected, base, strict=True)
        ]
    assert table[name][closed].tolist() == pytest.approx(
        [e for e, c in zip(expected, closed, strict=True) if c], abs=1e-5
    )
    assert (table[name][~closed] < 0).all()  # they lose cut_penalty


def test_a_late_reward_follows_the_trainer_that_calls_it(corpus, tmp_path):
    reward, tokenizer = InformationGainReward(), None
    for turn in ("late", "another trainer", "with a tokenizer, its callback forgotten"):
        prepared = prepare(corpus, tmp_path / turn, f"{AFTER}, {TAGS}")
        if turn.startswith("with"):
            tokenizer = AutoTokenizer.from_pretrained(prepared / "model")
            reward = InformationGainReward(None, tokenizer, open="<hm>", close="</hm>")
        trainer = trainer_at(prepared, reward, tmp_path / "out")
        trainer.train()
        assert reward.model is trainer.model and reward.tokenizer is (tokenizer or trainer.processing_class)
        assert trainer.callback_handler.callbacks.count(reward.callback) == 1


def test_what_cannot_work_is_said(corpus, tmp_path):
    base = corpus / "base"

    def fails(prepared: Path, reward: Any, said: str, model: Path | None = None) -> None:
        with pytest.raises(ConfigError, match=said):
            trainer_at(prepared, reward, tmp_path / "o", model).train()

    named = "rlpretrain prepare MODEL --out DIR"
    hm = prepare(corpus, tmp_path / "hm", f"{AFTER}, {TAGS}")
    fails(hm, InformationGainReward(), f"does not know <hm>, .*{named}", model=base)
    think = prepare(corpus, tmp_path / "think", AFTER)
    fails(
        think,
        InformationGainReward(),
        f"</think> does not end a generation of this checkpoint .*{named}",
        model=base,
    )
    fails(
        think,
        rlpretrain.trl.rpt_reward,
        f"</think> ends a generation .* wants a prediction after it: .*{named}",
    )
    fails(
        think, InformationGainReward(template="so : {context}"), "with its settings the first prompt would be"
    )
    reward, row = InformationGainReward(), load_dataset(str(think / "prompts"))["train"][0]
    prompt = row.pop("prompt")
    with pytest.raises(RuntimeError, match=r"callbacks=\[reward.callback\]"):
        reward([prompt], [[7]], **{n: [v] for n, v in row.items()})
    with pytest.raises(RuntimeError, match="log_metric="):
        reward([prompt], [[7]], log_metric=print, **{n: [v] for n, v in row.items()})
    with pytest.raises(ConfigError, match="makes no prompts"):
        reward.dataset(str(corpus / "train.jsonl"))
    with pytest.raises(AttributeError, match="nothing_reward"):
        rlpretrain.trl.nothing_reward  # noqa: B018
    with pytest.raises(ConfigError, match="rounds of its own"):
        rlpretrain.trl.pretrain_zero_reward  # noqa: B018
    assert rlpretrain.trl.rlpr_reward.__name__ == "rlpr"
