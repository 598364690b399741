"""TRL's trainers with every family of tokenizers: thoughts follow the document's own ids (issue 15.18).

And rows that are too long for the model are refused before anything is sampled (issue 15.5).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset, load_dataset
from transformers import AutoTokenizer

from rlpretrain.config import ConfigError, ModelConfig
from rlpretrain.objectives import parse_section
from rlpretrain.prompts import ensure_delimiters
from rlpretrain.trl import InformationGainReward, ObjectiveReward, to_prompt_dataset
from rlpretrain.trl.async_rollout import AsyncRollouts
from rlpretrain.trl.prepared import prepare
from rlpretrain.trl.prompts import JUDGED, check_prompts, position_of
from rlpretrain.trl.rollout import Rollouts
from rollout.hf import HFEngine
from tests.builders.tiny import tiny_model
from tests.builders.tokenizers_family import FAMILIES, LINES, WITH_EOS, make
from tests.builders.trl import settings

trl = pytest.importorskip("trl")
from trl.experimental.async_grpo import AsyncGRPOTrainer, packing  # noqa: E402

from rlpretrain.trl import RLPConfig, RLPTrainer  # noqa: E402
from tests.builders.async_trainer import settings as async_settings  # noqa: E402
from tests.builders.async_trainer import varlen_attention  # noqa: E402
from tests.builders.trl_texts import LONG  # noqa: E402

ALL = {"positions": "every_k", "every": 1, "positions_per_document": 999}


def base(family: str, **fields: Any) -> tuple[Any, Any]:
    """A random model with a tokenizer of this family, both with the tags."""
    tokenizer = make(family)
    model = tiny_model("qwen3", len(tokenizer), **fields)
    ensure_delimiters(tokenizer, model)
    return model, tokenizer


def own_prefixes(family: str, texts: list[str]) -> set[tuple[int, ...]]:
    """Every beginning of the documents, in the ids of the tokenizer itself."""
    tokenizer = make(family)
    whole = [tuple(tokenizer(text)["input_ids"]) for text in texts]
    return {ids[:n] for ids in whole for n in range(1, len(ids) + 1)}


class Sampled:
    """The prompts that a model was asked to go on with, without their padding."""

    def __init__(self, model: Any):
        self.prompts: list[tuple[int, ...]] = []
        generate = model.generate

        def spy(*given: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, **others: Any) -> Any:
            for ids, mask in zip(input_ids, attention_mask.bool(), strict=True):
                self.prompts.append(tuple(ids[mask].tolist()))
            return generate(*given, input_ids=input_ids, attention_mask=attention_mask, **others)

        model.generate = spy


def check_sampled(prompts: list[tuple[int, ...]], family: str, texts: list[str], open_id: int) -> None:
    assert prompts and all(ids[-1] == open_id for ids in prompts)
    assert {ids[:-1] for ids in prompts} <= own_prefixes(family, texts)


@pytest.mark.parametrize("template", ["raw", "rlp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_by_ids_no_position_is_left_out(family, template):
    """With any tokenizer and any template; and no two prompts have one name."""
    tokenizer = make(family)
    data = to_prompt_dataset(LINES, tokenizer, by_ids=True, whole=True, template=template, **ALL)
    sizes = {str(row["document_id"]): len(row["document_token_ids"]) for row in data}
    assert len(data) == sum(n - 1 for n in sizes.values()) - (tokenizer.eos_token_id is not None) * len(sizes)
    known: dict[str, tuple[int, ...]] = {}
    owner, config = parse_section({"name": "rlp", "template": template})
    objective = owner(config, tokenizer)
    for row in data:
        at = row["position"]
        assert (
            row["context_ids"] == row["document_token_ids"][:at]
            and row["target_ids"][0] == row["document_token_ids"][at]
        )
        ids = objective.prompt(position_of(row)).token_ids
        assert known.setdefault(row["prompt"], ids) == ids
    check_sampled([(*row["context_ids"], 0) for row in data], family, LINES, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_as_text_are_tokenised_to_their_ids(family):
    """What GRPOTrainer does with them; a tokenizer that ends every text is refused, and what to do is
    said.
    """
    tokenizer = make(family)
    if family in WITH_EOS:
        with pytest.raises(ConfigError, match=r"ends every text with .*</s>.*by_ids=True"):
            to_prompt_dataset(LINES, tokenizer, **ALL)
        return
    try:
        with pytest.warns(
            UserWarning, match=r"[1-5] of \d+ positions left out: their prompts tokenise to other ids"
        ):
            data = to_prompt_dataset(LINES, tokenizer, **ALL)
    except BaseException as error:  # nothing was left out, and so nothing said
        assert "DID NOT WARN" in str(error)
        data = to_prompt_dataset(LINES, tokenizer, **ALL)
    everything = to_prompt_dataset(LINES, tokenizer, by_ids=True, **ALL)
    assert len(data) >= 0.95 * len(everything)
    open_id = tokenizer.convert_tokens_to_ids("<think>")
    for row in data:
        assert tokenizer(text=[row["prompt"]])["input_ids"] == [[*row["context_ids"], open_id]]


def test_nearly_all_left_out_is_refused():
    """The instruction's line ends are tokenised apart from the text behind them, which no text can say."""
    tokenizer = make("sentencepiece_legacy")
    with pytest.raises(
        ConfigError, match=r"(\d+) of \1 positions left out: their prompts tokenise to other ids.*RLPTrainer"
    ):
        to_prompt_dataset(LINES, tokenizer, template="rlp", **ALL)
    endless = IterableDataset.from_generator(lambda: ({"text": LINES[i % len(LINES)]} for i in range(10**9)))
    with pytest.raises(
        ConfigError, match=rf"{JUDGED} of {JUDGED} positions left out"
    ):  # and does not search for ever
        next(iter(to_prompt_dataset(endless, tokenizer, template="rlp", **ALL)))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - WITH_EOS))
def test_grpo_samples_behind_the_documents_ids(family, tmp_path):
    """The two lines of the README, with TRL's own trainer."""
    model, tokenizer = base(family)
    reward = InformationGainReward(model, tokenizer, cut="force_close", positions="random")
    sampled = Sampled(model)
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=[reward],
        callbacks=[reward.callback],
        processing_class=tokenizer,
        train_dataset=reward.dataset(LONG),
        args=settings(tmp_path, max_steps=1),
    )
    trainer.train()
    check_sampled(sampled.prompts, family, LONG, reward.objective.template.open_id)
    assert trainer.state.log_history[0]["thought/uncounted_frac"] == 0


@pytest.mark.parametrize(
    ("family", "template"),
    [(f, "raw") for f in sorted(WITH_EOS)] + [("sentencepiece_legacy", "rlp"), ("byte_bpe_bos", "rlp")],
)
def test_the_trainer_samples_behind_ids_that_no_text_gives(family, template, tmp_path):
    model, tokenizer = base(family, max_position_embeddings=1024)
    sampled = Sampled(model)
    args = settings(
        tmp_path, RLPConfig, max_steps=1, cut="force_close", objective_fields={"template": template}
    )
    trainer = RLPTrainer(
        model, args=args, train_dataset=Dataset.from_dict({"text": LONG}), processing_class=tokenizer
    )
    trainer.train()
    frame = trainer.reward.objective.template
    assert all(ids[-1] == frame.open_id for ids in sampled.prompts) and len(sampled.prompts) == 8
    bodies = []
    for ids in sampled.prompts:
        lead = 1 if frame.bos is not None else 0
        end = len(ids) - 1 - len(frame.tail)
        assert ids[lead : lead + len(frame.head)] == frame.head and ids[end:-1] == frame.tail
        bodies.append((*ids[:lead], *ids[lead + len(frame.head) : end]))
    assert set(bodies) <= own_prefixes(family, LONG)


@pytest.mark.parametrize("family", ["sentencepiece_bos_eos", "metaspace_eos", "wordpiece_cls"])
def test_our_engines_sample_behind_ids_that_no_text_gives(family, tmp_path):
    model, tokenizer = base(family)
    reward = InformationGainReward(model, tokenizer, cut="force_close", positions="random")
    data = reward.dataset(LONG, by_ids=True)
    engine = HFEngine(model, tokenizer=tokenizer)
    asked, sample = [], engine.sample

    async def spy(prompts: Any, *given: Any) -> Any:
        asked.extend(prompts)
        return await sample(prompts, *given)

    engine.sample = spy
    trl.GRPOTrainer(
        model,
        reward_funcs=[reward],
        callbacks=[reward.callback],
        rollout_func=Rollouts(reward, engine, data),
        train_dataset=data,
        args=settings(tmp_path, max_steps=1),
        processing_class=tokenizer,
    ).train()
    check_sampled([tuple(p.token_ids) for p in asked], family, LONG, reward.objective.template.open_id)


@pytest.mark.parametrize("family", ["sentencepiece_bos_eos", "gemma"])
def test_the_asynchronous_trainer_samples_behind_the_documents_ids(family, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a CPU")
    monkeypatch.setattr(
        packing, "_flash_attn", lambda: SimpleNamespace(flash_attn_varlen_func=varlen_attention)
    )
    model, tokenizer = base(family)
    path = str(tmp_path / "base")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    reward = InformationGainReward(tokenizer=tokenizer, cut="force_close", positions="random")
    data, args = reward.dataset(LONG, by_ids=True), async_settings(tmp_path, max_steps=1)
    rollouts = AsyncRollouts(reward, HFEngine(model, tokenizer=tokenizer, shares_weights=False), data, args)
    drawn, get = [], rollouts.rollout_buffer.get

    def spy(**given: Any) -> Any:
        drawn.append(get(**given))
        return drawn[-1]

    rollouts.rollout_buffer.get = spy
    AsyncGRPOTrainer(
        path,
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[reward.callback],
        rollout_worker=rollouts,
        weight_transfer=rollouts,
    ).train()
    prompts = [
        tuple(int(i) for i, m in zip(s.input_ids, s.completion_mask, strict=True) if not m) for s in drawn
    ]
    check_sampled(prompts, family, LONG, reward.objective.template.open_id)


@pytest.mark.parametrize("family", ["sentencepiece", "gemma", "byte_bpe_eos"])
def test_prepared_prompts_fit_the_prepared_tokenizer(family, tmp_path):
    """On TRL's command line prompts and tokenizer both come from disk."""
    model, tokenizer = base(family)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "docs.txt").write_text("\n".join(LINES))
    documents = {"train": str(tmp_path / "docs.txt")}
    work = (ModelConfig(path=str(tmp_path / "base")), tmp_path / "out", {"positions": "random"}, documents)
    if family in WITH_EOS:
        with pytest.raises(ConfigError, match="ends every text"):
            prepare(*work)
        return
    assert prepare(*work)["train"] == len(LINES)
    again = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    data = load_dataset(str(tmp_path / "out" / "prompts"))["train"]
    owner, config = parse_section({"name": "rlp"})
    objective = owner(config, again)
    check_prompts(again, data["prompt"], [objective.prompt(position_of(row)).token_ids for row in data])


def test_prompts_that_a_trainer_would_read_otherwise_are_refused(tmp_path):
    """A dataset made by ids, given to a trainer that tokenises; and a tokenizer that the trainer has in
    another setting.
    """
    for family, how, changed in (
        ("sentencepiece_bos_eos", {"by_ids": True}, False),
        ("sentencepiece", {}, True),
    ):
        model, tokenizer = base(family)
        reward = InformationGainReward(model, tokenizer, cut="force_close", positions="random")
        data = reward.dataset(LONG, **how)
        given = make("sentencepiece_bos_eos") if changed else tokenizer
        ensure_delimiters(given)
        with pytest.raises(
            ConfigError, match=r"tokenises the prompt .* to other ids than those of its document"
        ):
            trl.GRPOTrainer(
                model,
                reward_funcs=[reward],
                callbacks=[reward.callback],
                processing_class=given,
                train_dataset=data,
                args=settings(tmp_path, max_steps=1),
            ).train()


TOO_LONG = "the model has 64 positions, but a document of the prompt dataset .* lower max_completion_length"


def test_rows_that_are_too_long_are_refused_before_anything_is_sampled(tmp_path):
    """Close tag and target included: 64 positions hold 50 tokens of a document and a thought of 12, and
    not of 13.
    """
    model, tokenizer = base("byte_bpe", max_position_embeddings=64)
    sampled = Sampled(model)
    ids = tokenizer(" ".join(LINES))["input_ids"][:50]
    text = tokenizer.decode(ids)
    assert tokenizer(text)["input_ids"] == ids
    last = {"positions": "every_k", "every": 50, "min_context": 49}  # one place, whose context is 49 tokens

    def train(most: int, path: str) -> None:
        reward = InformationGainReward(model, tokenizer, cut="force_close", **last)
        data, more = reward.dataset([text] * 8), {"reward_funcs": [reward], "callbacks": [reward.callback]}
        lengths = {"max_steps": 1, "max_completion_length": most}
        if path == "rlp":
            fields = {"positions": "every_k", "objective_fields": {"every": 50, "min_context": 49}}
            args = settings(tmp_path, RLPConfig, cut="force_close", max_length=51, **fields, **lengths)
            texts = Dataset.from_dict({"text": [text] * 8})
            RLPTrainer(model, args=args, train_dataset=texts, processing_class=tokenizer).train()
            return
        if path == "stream":
            rows = IterableDataset.from_generator(lambda: ({"text": text} for _ in range(8)))
            data = reward.dataset(rows, max_length=50)
        elif path == "late":
            more = {"reward_funcs": [ObjectiveReward(cut="force_close", **last)]}
        elif path == "rollouts":
            more["rollout_func"] = Rollouts(reward, HFEngine(model, tokenizer=tokenizer), data)
        args = settings(tmp_path, **lengths)
        trl.GRPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, **more).train()

    for path in ("grpo", "stream", "rollouts", "rlp", "late"):
        most = 64 - 50 - 2  # context and target, the open tag and an injected close tag
        with pytest.raises(ConfigError, match=TOO_LONG):
            train(most + 1, path)
        if path != "late":  # which sees the trainer after its first thoughts
            assert not sampled.prompts, path
        sampled.prompts.clear()
        train(most, path)
        sampled.prompts.clear()


def test_documents_that_are_too_long_for_the_next_token_loss(tmp_path):
    model, tokenizer = base("byte_bpe", max_position_embeddings=64)
    long = " ".join(LINES)
    fields = {"cut": "force_close", "positions": "every_k", "objective_fields": {"every": 10}}
    args = settings(tmp_path, RLPConfig, **fields)
    with pytest.raises(
        ConfigError, match=r"all of which the next-token loss reads: set max_length to at most 64"
    ):
        RLPTrainer(
            model, args=args, train_dataset=Dataset.from_dict({"text": [long]}), processing_class=tokenizer
        )
    stream = IterableDataset.from_generator(lambda: ({"text": text} for text in LINES))
    with pytest.raises(ConfigError, match=r"the model has 64 positions.*max_length to at most \d+"):
        RLPTrainer(model, args=args, train_dataset=stream, processing_class=tokenizer).train()
