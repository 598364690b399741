"""TRL's trainers with our rewards: the gain they log is the scorer's; baselines, adapters, other
objectives; prompt datasets.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlpretrain.config import ConfigError
from rlpretrain.trl import COLUMNS, InformationGainReward, ObjectiveReward, to_prompt_dataset
from rlpretrain.trl.callback import plain
from rlpretrain.trl.completions import make_thought
from rollout.types import FinishReason
from tests.builders.tiny import bpe_tokenizer
from tests.builders.trl import AFTER, Kept, by_hand, settings, trl


@pytest.fixture
def base(corpus: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of the suite's random base."""
    model = AutoModelForCausalLM.from_pretrained(corpus / "base", dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(corpus / "base")


def test_the_two_lines_train_and_log_the_scorers_gain(base, corpus, tmp_path):
    """What the README shows, on TRL's documented interface alone."""
    model, tokenizer = base
    reward = InformationGainReward(model, tokenizer, cut="force_close", target_length=2, **AFTER)
    kept = Kept(reward)
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=[reward],
        callbacks=[reward.callback],
        args=settings(tmp_path),
        train_dataset=reward.dataset(str(corpus / "train.jsonl")),
        processing_class=tokenizer,
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer.train()
    logs = [row for row in trainer.state.log_history if "reward" in row]
    assert len(kept.calls) == len(logs) == 2
    other = AutoModelForCausalLM.from_pretrained(corpus / "base", dtype=torch.float32)
    for (groups, rewards, weights), row in zip(kept.calls, logs, strict=True):
        assert len(groups) == 2 and all(len(g.thoughts) == 4 for g in groups)
        other.load_state_dict(weights, strict=False)
        assert rewards == pytest.approx(by_hand(other, groups, "force_close"), abs=1e-5)
        assert row["rewards/information_gain/mean"] == pytest.approx(np.mean(rewards), abs=1e-5)
        assert (
            row["ig/mean"] == pytest.approx(np.mean(rewards), abs=1e-5) and 0 <= row["ig/positive_frac"] <= 1
        )
        assert {"ig/std", "ig/per_token", "ig/self", "baseline/self", "thought/closed_frac"} <= row.keys()
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_the_head_check_bears_autocast_and_nothing_more(base):
    from rlpretrain.scoring.checks import check_head

    model, _ = base
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20)
    with torch.autocast("cpu", torch.bfloat16):
        apart = check_head(model)
    assert 1e-3 < apart < 0.3 and check_head(model) < 1e-3


def test_a_close_tag_ends_a_completion(base, corpus):
    model, tokenizer = base
    reward = InformationGainReward(model, tokenizer, **AFTER)
    close, eos = reward.close_id, tokenizer.eos_token_id
    assert close in model.generation_config.eos_token_id and eos in model.generation_config.eos_token_id
    assert make_thought(reward.objective, [7, close, 9, 0]).token_ids == (7, close)
    assert make_thought(reward.objective, [7, 8]).finish_reason is FinishReason.LENGTH
    ended = make_thought(reward.objective, [7, eos, 0, 0])
    assert ended.token_ids == (7, eos) and ended.finish_reason is FinishReason.EOS
    boxed = ObjectiveReward(None, tokenizer, "rpt", template="raw", opening="has", closing=".")
    assert make_thought(boxed.objective, [7, close, 9, 11]).answer_span == (2, 4)


def test_prompts_are_the_documents_own_ids(base, corpus):
    _, tokenizer = base
    path = str(corpus / "train.jsonl")
    data = to_prompt_dataset(path, tokenizer, whole=True, epochs=2, **AFTER)
    texts = [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]
    assert len(data) == 2 * len(texts) and set(COLUMNS) <= set(data.column_names)
    for row, text in zip(data, texts, strict=False):
        assert (
            row["prompt"].endswith("shows <think>")
            and tokenizer(row["prompt"])["input_ids"][:-1] == row["context_ids"]
        )
        assert row["document_token_ids"][:-1] == tokenizer(text)["input_ids"]
        assert row["document_token_ids"][row["position"]] == row["target_ids"][0]
    again = to_prompt_dataset(Dataset.from_dict({"text": texts}), tokenizer, whole=True, epochs=2, **AFTER)
    assert again["context_ids"] == data["context_ids"]
    stream = to_prompt_dataset(
        IterableDataset.from_generator(lambda: ({"text": t} for t in texts)), tokenizer, **AFTER
    )
    assert isinstance(stream, IterableDataset) and next(iter(stream))["context_ids"] == data[0]["context_ids"]
    short = to_prompt_dataset(texts[:1], tokenizer, max_length=6, whole=True, positions="every_k", every=2)
    assert {"0.0", "0.1"} <= set(short["document_id"])  # long texts are split, as those of a file are
    random = to_prompt_dataset(texts, tokenizer, epochs=2, seed=3)
    assert random["position"][: len(texts)] != random["position"][len(texts) :]


def test_positions_whose_text_is_other_ids_are_left_out():
    """A byte-level BPE cut within a character: the text of such a prompt cannot give its ids again."""
    tokenizer = bpe_tokenizer(["so it goes, so it goes"], 280)
    texts = ["so 漢字 it goes", "it goes 字 so"]
    with pytest.warns(
        UserWarning, match=r"\d+ of \d+ positions left out: their prompts tokenise to other ids"
    ):
        data = to_prompt_dataset(texts, tokenizer, positions="every_k", every=1, positions_per_document=99)
    stream = IterableDataset.from_generator(lambda: ({"text": t} for t in texts))
    with pytest.warns(UserWarning, match=r"\d+ of \d+ positions left out"):  # at its end
        streamed = list(
            to_prompt_dataset(stream, tokenizer, positions="every_k", every=1, positions_per_document=99)
        )
    assert [row["prompt"] for row in streamed] == data["prompt"]
    whole = [tokenizer(t)["input_ids"] for t in texts]
    assert 0 < len(data) < sum(map(len, whole))
    for row in data:
        assert row["context_ids"] == whole[int(row["document_id"])][: row["position"]]
        assert tokenizer(row["prompt"])["input_ids"][:-1] == row["context_ids"]
        assert "\N{REPLACEMENT CHARACTER}" not in row["prompt"]


@pytest.mark.parametrize("baseline", ["frozen", "ema", "none"])
def test_baselines_are_those_they_say(base, corpus, tmp_path, baseline):
    model, tokenizer = base
    initial = AutoModelForCausalLM.from_pretrained(corpus / "base", dtype=torch.float32)
    reward = InformationGainReward(
        model, tokenizer, baseline=baseline, ema_decay=0.5, cut="force_close", **AFTER
    )
    kept = Kept(reward)
    trl.GRPOTrainer(
        model,
        reward_funcs=[reward],
        callbacks=[reward.callback],
        args=settings(tmp_path),
        train_dataset=reward.dataset(str(corpus / "train.jsonl")),
        processing_class=tokenizer,
    ).train()
    groups, rewards, weights = kept.calls[1]  # after one step

    def total(net: Any, g: Any) -> float:
        logits = (
            net(input_ids=torch.tensor([[*g.position.context_ids, *g.position.target_ids]]))
            .logits[0]
            .log_softmax(-1)
        )
        return float(logits[len(g.position.context_ids) - 1, g.position.target_ids[0]].detach())

    live = AutoModelForCausalLM.from_pretrained(corpus / "base", dtype=torch.float32)
    live.load_state_dict(weights, strict=False)
    live.tie_weights()
    ours = np.array(by_hand(live, groups, "force_close"), float).reshape(2, 4)
    own = np.array([total(live, g) for g in groups])[:, None]
    if baseline == "frozen":
        base_ = np.array([total(initial, g) for g in groups])[:, None]
    elif baseline == "none":
        base_ = np.zeros((2, 1))
    else:
        for (_, p), (_, q) in zip(initial.named_parameters(), live.named_parameters(), strict=True):
            p.data.lerp_(q.data, 0.5)
        base_ = np.array([total(initial, g) for g in groups])[:, None]
    assert np.array(rewards, float).reshape(2, 4) == pytest.approx(ours + own - base_, abs=1e-4)


class Far(torch.nn.Module):
    """Tokens that meet outside attention: each gets a part of one far before it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.cat([torch.zeros_like(x[:, :14]), x[:, :-14]], 1)


@pytest.mark.parametrize("mixes", [False, True])
def test_a_model_that_trees_do_not_fit_is_scored_in_rows(base, corpus, mixes):
    model, tokenizer = base
    if mixes:
        model.model.layers[0].mlp = torch.nn.Sequential(Far(), model.model.layers[0].mlp)
    row = to_prompt_dataset(str(corpus / "train.jsonl"), tokenizer, **AFTER)[0]
    columns = {name: [row[name]] * 6 for name in COLUMNS[1:]}
    found = {}
    for tree in (True, False):
        reward = InformationGainReward(model, tokenizer, cut="force_close", **AFTER)
        reward.watch(model)
        assert reward.layout.tree
        if not tree:
            reward.layout.tree = False
        found[tree] = reward([row["prompt"]] * 6, [[7, 8, 9 + k] for k in range(6)], **columns)
        assert reward.layout.tree == (tree and not mixes)
    assert found[True] == pytest.approx(found[False], abs=1e-5)


def test_unclosed_thoughts_count_nowhere(base, corpus, tmp_path):
    model, tokenizer = base
    reward = InformationGainReward(model, tokenizer, cut="mask", **AFTER)
    reward.watch(model)
    row = to_prompt_dataset(str(corpus / "train.jsonl"), tokenizer, **AFTER)[0]
    columns = {name: [row[name]] * 3 for name in COLUMNS[1:]}
    close = reward.close_id
    rewards = reward([row["prompt"]] * 3, [[7, close], [7, 8], [close]], **columns)
    assert rewards[1] is None and isinstance(rewards[0], float) and isinstance(rewards[2], float)
    priced = InformationGainReward(model, tokenizer, cut="penalise", cut_penalty=3.0, **AFTER)
    closed = InformationGainReward(model, tokenizer, cut="force_close", **AFTER)
    for other in (priced, closed):
        other.watch(model)
    (a,), (b,) = (
        r([row["prompt"]], [[7, 8]], **{n: c[:1] for n, c in columns.items()}) for r in (priced, closed)
    )
    assert a == pytest.approx(b - 3.0, abs=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {
            "name": "rpt",
            "template": "raw",
            "opening": "has",
            "closing": ".",
            "strip": True,
            "target_length": 2,
        },
        {
            "name": "rlpt",
            "reward": "match",
            "segments": "tokens",
            "msr_weight": 0.0,
            "opening": "has",
            "closing": ".",
            "min_words": 1,
            "target_length": 2,
        },
        {"name": "rlpt", "segments": "tokens", "msr_weight": 0.0, "target_length": 2},
        {"name": "likelihood", "score": "prob"},
        {"name": "likelihood", "score": "perplexity_gain", "target_length": 2},
        {"name": "tests.builders.my_objective:LengthObjective"},
    ],
)
def test_other_objectives_are_reward_functions_too(base, corpus, tmp_path, fields):
    model, tokenizer = base
    fields = dict(fields)
    reward = ObjectiveReward(model, tokenizer, fields.pop("name"), cut="force_close", **AFTER, **fields)
    kept = Kept(reward)
    trl.GRPOTrainer(
        model,
        reward_funcs=[reward],
        callbacks=[reward.callback],
        args=settings(tmp_path, max_steps=1),
        train_dataset=reward.dataset(str(corpus / "train.jsonl")),
        processing_class=tokenizer,
    ).train()
    ((groups, rewards, _),) = kept.calls
    assert len(rewards) == 8 and all(isinstance(r, float) for r in rewards)
    if "target" not in reward.objective.needs:
        assert rewards == [r for g in groups for r in g.rewards]


def test_a_match_is_found_in_a_completion(base, corpus):
    """Thought and prediction come as one completion."""
    model, tokenizer = base
    form = {"template": "raw", "opening": "has", "closing": ".", "strip": True, "target_length": 2}
    reward = ObjectiveReward(model, tokenizer, "rpt", **form, **AFTER)
    reward.watch(model)
    row = reward.dataset(str(corpus / "train.jsonl"))[0]
    digit = tokenizer.decode(row["target_ids"][:1])
    said = [
        f"so {reward.delimiters.close} has {digit} .",
        f"so {reward.delimiters.close} has so .",
        "so has 1 .",
    ]
    rewards = reward(
        [row["prompt"]] * 3, tokenizer(said)["input_ids"], **{n: [row[n]] * 3 for n in COLUMNS[1:]}
    )
    assert rewards == [1.0, 0.0, -1.0], "an unclosed thought loses cut_penalty"


def test_with_adapters(base, corpus, tmp_path):
    """The gain is that of the model with its adapters; frozen is the same weights with them off."""
    peft = pytest.importorskip("peft")
    model, tokenizer = base
    reward = InformationGainReward(model, tokenizer, baseline="frozen", cut="force_close", **AFTER)
    kept = Kept(reward)
    lora = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=[reward],
        callbacks=[reward.callback],
        peft_config=lora,
        args=settings(tmp_path, learning_rate=0.1),
        processing_class=tokenizer,
        train_dataset=reward.dataset(str(corpus / "train.jsonl")),
    )
    trainer.train()
    assert reward.reference.model is plain(reward.model)  # no second copy
    groups, rewards, weights = kept.calls[1]
    reward.model.load_state_dict(weights, strict=False)
    live = reward.model.eval()
    with_adapter = by_hand(live, groups, "force_close")
    own, base_ = [], []
    for g in groups:
        ids = torch.tensor([[*g.position.context_ids, *g.position.target_ids]])
        at, token = len(g.position.context_ids) - 1, g.position.target_ids[0]
        with torch.no_grad():
            own += [float(live(input_ids=ids).logits[0, at].log_softmax(-1)[token])] * 4
            with live.disable_adapter():
                base_ += [float(live(input_ids=ids).logits[0, at].log_softmax(-1)[token])] * 4
    assert max(abs(a - b) for a, b in zip(own, base_, strict=True)) > 1e-3
    assert rewards == pytest.approx(
        [w + o - b for w, o, b in zip(with_adapter, own, base_, strict=True)], abs=1e-4
    )


def test_bad_settings(base, corpus, tmp_path):
    model, tokenizer = base
    for build, said in (
        (lambda: InformationGainReward("some/model", tokenizer), "give the model itself"),
        (lambda: InformationGainReward(model), "and its tokenizer"),
        (lambda: InformationGainReward(model, tokenizer, positons="after"), "did you mean 'positions'"),
        (lambda: InformationGainReward(model, tokenizer, baseline="mean"), "baseline must be"),
        (lambda: ObjectiveReward(model, tokenizer, "ntp"), "no thoughts to reward"),
        (lambda: ObjectiveReward(model, tokenizer, "rlpt", reward="judge"), "set judge_url"),
        (lambda: ObjectiveReward(model, tokenizer, "pretrain_zero"), "rounds of its own"),
        (lambda: to_prompt_dataset(["a b"], tokenizer, positions="entropy"), "need the live model"),
        (lambda: to_prompt_dataset(["ann bob"], tokenizer, **AFTER), "no document gives a prompt"),
        (lambda: to_prompt_dataset(Dataset.from_dict({"txt": ["a"]}), tokenizer), "no column 'text'"),
    ):
        with pytest.raises(ConfigError, match=said):
            build()
    reward = InformationGainReward(model, tokenizer, **AFTER)
    with pytest.raises(ConfigError, match="the dataset lacks document_id"):
        reward(["a"], [[1]])
    row = reward.dataset(str(corpus / "train.jsonl"))[0]
    with pytest.raises(RuntimeError, match=r"callbacks=\[reward.callback\]"):
        reward([row["prompt"]], [[7]], **{n: [row[n]] for n in COLUMNS[1:]})


def test_a_missing_trl_says_how_to_get_it(monkeypatch):
    import rlpretrain.trl

    for name in {"trl", *(name for name in sys.modules if name.startswith("trl."))}:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "rlpretrain.trl.trainer", raising=False)
    monkeypatch.delattr(rlpretrain.trl, "trainer", raising=False)
    with pytest.raises(ImportError, match=r'pip install "rlpretrain\[trl\]"'):
        rlpretrain.trl.RLPTrainer  # noqa: B018
