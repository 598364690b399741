"""The trainer's loss and gradient against the formulas, update by update (tests/reference/formulas.py)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlpretrain.corpora import dial
from tests.builders.tiny import tiny_model
from tests.reference import formulas as f
from tests.reference.recorded import Baselines, Record, Sampler, model_with, record

WORDS = list(dial.WORDS)
ID = {word: i for i, word in enumerate(WORDS)}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base of each architecture, with the vocabulary of the dial corpus."""
    folder = tmp_path_factory.mktemp("bases")
    for kind in ("qwen3", "llama", "gpt2", "gpt_neox", "mistral", "qwen3_moe"):
        tiny_model(kind, vocab_size=len(WORDS), seed=5).save_pretrained(folder / kind)
        dial.tokenizer().save_pretrained(folder / kind)
    return folder


def compare(
    found: Record,
    method: f.Method,
    settings: f.Settings,
    folder: str,
    baseline: tuple[str, float] = ("self", 0.0),
) -> None:
    """Every update's loss and gradient."""
    steps: dict[int, int] = {}
    references = Baselines(baseline[0], folder, found, baseline[1])
    assert found.updates and any(
        float(u.gradient[n].abs().max()) > 1e-4 for u in found.updates for n in u.gradient
    )
    for i, update in enumerate(found.updates):
        begun = steps.setdefault(update.step, i)
        model, first = model_with(folder, update.weights), model_with(folder, found.updates[begun].weights)
        batch = found.batches[update.step]
        loss = f.loss_of(
            model,
            first,
            (references.at(begun), references.at(i)),
            batch.groups,
            batch.documents,
            method,
            settings,
        )
        assert update.loss == pytest.approx(float(loss.detach()), rel=2e-5, abs=2e-5), f"update {i}"
        loss.backward()
        scale = max(float(g.abs().max()) for g in update.gradient.values())
        for name, p in model.named_parameters():
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(
                update.gradient[name].double(),
                gradient.double(),
                rtol=2e-3,
                atol=2e-4 * scale,
                msg=lambda m, name=name, i=i: f"update {i}, {name}: {m}",
            )


@dataclass
class Case:
    """A run and the same in formulas; `config` is laid over the suite's small values."""

    config: dict[str, Any]
    method: f.Method
    settings: f.Settings = field(default_factory=f.Settings)
    base: str = "qwen3"
    baseline: tuple[str, float] = ("self", 0.0)


AFTER = {"positions": "after", "marker": "shows", "target_length": 2}
RANDOM = {"positions": "random", "positions_per_document": 2, "target_length": 3}


def likelihood(score: str, **fields: Any) -> dict[str, Any]:
    return {"name": "likelihood", "score": score, **RANDOM, **fields}


EMBEDDED = {
    "rlp, as in the paper": Case(
        {
            "objective": {"name": "rlp", "positions_per_document": 2},
            "loss": {"ntp_coef": 0.0, "reader_coef": 0.0},
            "sampling__temperature": 0.7,
            "baseline": {"name": "ema", "decay": 0.5},
            "max_steps": 2,
        },
        f.Method(f.information_gain()),
        f.Settings(temperature=0.7, ntp=0.0, reader=0.0),
        baseline=("ema", 0.5),
    ),
    "rlp, inner epochs, clipped gains of a long target, moving baseline": Case(
        {
            "objective": {"name": "rlp", **RANDOM, "discount": 0.8, "clip": 0.5},
            "loss": {"inner_epochs": 2, "clip_low": 0.02, "clip_high": 0.03},
            "baseline": {"name": "ema", "decay": 0.5},
            "max_steps": 2,
            "optim__lr": 5e-3,
        },
        f.Method(f.information_gain(0.8, clip=0.5)),
        f.Settings(clip_low=0.02, clip_high=0.03),
        "llama",
        ("ema", 0.5),
    ),
    "rlp, masked, mean over tokens, groups in parts": Case(
        {
            "objective": {"name": "rlp", **RANDOM, "reduction": "mean", "discount": 0.5, "clip": 1.0},
            "loss__reduction": "token_mean",
            "sampling__cut": "mask",
            "sampling__max_thought_tokens": 25,
            "token_budget": 60,
            "baseline__name": "none",
        },
        f.Method(f.information_gain(0.5, mean=True, clip=1.0)),
        f.Settings("mask", reduction="token_mean"),
        "gpt2",
        ("none", 0.0),
    ),
    "rlp, penalised, padded, sum, two epochs of parts": Case(
        {
            "objective": {"name": "rlp", **RANDOM, "clip": 0.3},
            "loss": {"reduction": "sum", "inner_epochs": 2},
            "sampling__cut": "penalise",
            "sampling__cut_penalty": 0.7,
            "packing": "padded",
            "token_budget": 150,
            "baseline__name": "frozen",
            "sampling__max_thought_tokens": 12,
        },
        f.Method(f.information_gain(clip=0.3)),
        f.Settings("penalise", 0.7, reduction="sum"),
        "gpt_neox",
        ("frozen", 0.0),
    ),
    "rlp, stale thoughts of a copy, sliding window": Case(
        {
            "objective": {"name": "rlp", **RANDOM},
            "engine__max_staleness": 1,
            "max_steps": 2,
            "optim__lr": 2e-2,
            "loss__importance_cap": 1.02,
            "sampling__temperature": 1.3,
        },
        f.Method(f.information_gain()),
        f.Settings(temperature=1.3, cap=1.02),
        "mistral",
    ),
    "rlp, experts": Case(
        {"objective": {"name": "rlp", **RANDOM}}, f.Method(f.information_gain()), base="qwen3_moe"
    ),
    "log_prob, half of the direct term": Case(
        {"objective": likelihood("log_prob", direct=0.5)},
        f.Method(f.log_prob, slopes=lambda group, judged: [[0.5] * len(j.after) for j in judged]),
    ),
    "VeriFree: a sum over tokens": Case(
        {
            "objective": likelihood("prob", direct=1.0, target_length=1),
            "loss": {"reader_coef": 0.0, "inner_epochs": 2},
        },
        f.Method(f.prob, slopes=f.prob_slopes),
        f.Settings(reduction="sum", reader=0.0),
    ),
    "JEPO: a sum over tokens": Case(
        {"objective": likelihood("jepo", direct=1.0, samples=2), "loss__reader_coef": 0.0},
        f.Method(f.log_prob, f.jepo_advantages(2), f.jepo_slopes(2)),
        f.Settings(reduction="sum", reader=0.0),
    ),
    "VeriFree as the user wants it": Case(
        {"objective": likelihood("mean_prob", direct=1.0), "loss__reduction": "thought_mean"},
        f.Method(f.mean_prob, slopes=f.mean_prob_slopes),
    ),
    "RLPR": Case(
        {"objective": likelihood("debiased_prob", direct=0.3)},
        f.Method(
            f.debiased_prob, slopes=lambda g, j: [[0.3 * x for x in row] for row in f.debiased_slopes(g, j)]
        ),
    ),
    "VR-CLI": Case(
        {
            "objective": likelihood("perplexity_gain"),
            "sampling__cut": "mask",
            "sampling__max_thought_tokens": 25,
        },
        f.Method(f.perplexity_gain),
        f.Settings("mask"),
    ),
    "random_reward": Case(
        {"objective": {"name": "random_reward", **AFTER, "probability": 0.4}},
        f.Method(
            lambda group, judged: [
                float(
                    np.random.default_rng((j.thought.seed, 1, group.thoughts.index(j.thought))).random() < 0.4
                )
                for j in judged
            ]
        ),
    ),
    "format_only": Case(
        {"objective": {"name": "format_only", **AFTER, "least": 3}, "sampling__max_thought_tokens": 25},
        f.Method(
            lambda group, judged: [
                float(j.thought.finish_reason == "close" and len(j.thought.token_ids) >= 3) for j in judged
            ]
        ),
    ),
}


@pytest.mark.parametrize("name", EMBEDDED)
def test_thoughts_of_the_embedded_engine(values, bases, name):
    case = EMBEDDED[name]
    folder = str(bases / case.base)
    small = {"model": folder, "sampling__thoughts": 4, "positions_per_step": 2, "max_steps": 1}
    found = record(values, **small | case.config)
    compare(found, case.method, case.settings, folder, case.baseline)


# objectives that read what is written after a thought: thoughts and answers are drawn by a sampler that is
# often right


def next_word(documents: list[tuple[int, ...]]) -> Any:
    """An answer: the word that follows in the document, or another."""

    def answer(ids: list[int], rng: Any) -> list[int]:
        def shared(document: tuple[int, ...]) -> int:
            return next(
                (k for k, (a, b) in enumerate(zip(document, ids, strict=False)) if a != b),
                min(len(document), len(ids)),
            )

        best = max(documents, key=shared)
        at = shared(best)
        right = list(best[at : at + int(rng.integers(1, 3))])
        said = right if rng.random() < 0.5 else [int(rng.integers(8, 18))]
        return [ID["so"], ID["shows"], *said, ID["."]]

    return answer


def texts(values: dict[str, Any]) -> list[tuple[int, ...]]:
    lines = Path(values["data"]["path"]).read_text().splitlines()
    return [(*(ID[w] for w in json.loads(line)["text"].split()), ID["<eos>"]) for line in lines]


WRITTEN = {"template": "{context}", "opening": "shows", "closing": "."}
RPT = {
    "name": "rpt",
    **WRITTEN,
    "target_length": 3,
    "strip": True,
    "positions_per_document": 2,
    "positions": "random",
}


def budget(group: Any) -> int:
    return group.extra["budget"]


def unasked(document: Any, j: int, groups: Any) -> float:
    """RMT: a token that was thought about is not trained beside."""
    return float(all((g.position.document_id, g.position.index) != (document.id, j) for g in groups))


HITS = f.prefix_hits(WORDS, "shows", ".")


def dense(group: Any, judged: list[f.Judged]) -> list[float]:
    """RPT's dense reward: a hit, else the probability of the next token after all that was said."""
    return [max(hit, math.exp(seen.after[0])) for hit, seen in zip(HITS(group, judged), judged, strict=True)]


SAMPLED = {
    "rpt": Case({"objective": RPT, "loss__inner_epochs": 2}, f.Method(HITS, keep=f.differs, target=False)),
    "rmt, in parts": Case(
        {
            "objective": RPT
            | {
                "name": "rmt",
                "template": "{context}",
                "budget": 4,
                "length_weight": 0.3,
                "min_entropy": 0.0,
                "curriculum_from": 0.0,
                "curriculum_to": 0.0,
            },
            "packing": "padded",
            "token_budget": 150,
            "max_steps": 2,
        },
        f.Method(f.with_length(HITS, budget, 0.3), keep=f.differs, target=False, ntp_weight=unasked),
    ),
    "rpt, dense": Case(
        {"objective": RPT | {"match": "dense"}, "sampling__cut": "mask"}, f.Method(dense), f.Settings("mask")
    ),
    "rlpt, match": Case(
        {
            "objective": {
                "name": "rlpt",
                **WRITTEN,
                "segments": "tokens",
                "msr_weight": 0.0,
                "reward": "match",
                "min_words": 1,
                "target_length": 3,
                "positions_per_document": 2,
            }
        },
        f.Method(HITS, target=False),
    ),
}


def scripted(values: dict[str, Any], answer: Any) -> Any:
    def prepare(run: Any) -> None:
        run.source.engine = Sampler(run, [ID[w] for w in ("hmm", "well", "wait", "0", "1", "2")], answer)
        run.engine.shares_weights = False  # what this sampler drew is corrected for

    return prepare


@pytest.mark.parametrize("name", SAMPLED)
def test_what_is_written_after_a_thought(values, bases, name):
    case = SAMPLED[name]
    folder = str(bases / case.base)
    small = {"model": folder, "sampling__thoughts": 4, "positions_per_step": 4, "max_steps": 1}
    found = record(values, scripted(values, next_word(texts(values))), **small | case.config)
    earned = {r for batch in found.batches for g in batch.groups for r in g.rewards}
    assert len(earned) > 1  # hits and misses
    compare(found, case.method, case.settings, folder)


NAMING, OPENING, HIDDEN = "shows", "maybe", "<unk>"


def of_words(document: tuple[int, ...]) -> list[str]:
    return [WORDS[i] for i in document if WORDS[i] != "<eos>"]


def name_or_find(documents: list[tuple[int, ...]]) -> Any:
    """The generator names one or two words of its paragraph, the predictor what is hidden, or another
    word.
    """

    def answer(ids: list[int], rng: Any) -> list[int]:
        context = ids[: ids.index(ID["<think>"])]
        if ID[HIDDEN] not in context:
            at = int(rng.integers(0, min(6, len(context) - 1)))
            return [ID[NAMING], *context[at : at + int(rng.integers(1, 3))], ID["."]]
        at = context.index(ID[HIDDEN])
        right: list[int] = []
        for document in documents:
            end = (
                at + len(document) - len(context)
            )  # of what is hidden; the document ends with an end of text
            if list(document[:at]) == context[:at] and list(document[end:-1]) == context[at + 1 :]:
                right = list(document[at:end])
        return [ID[OPENING], *(right if rng.random() < 0.5 else [ID["bob"]]), ID["."]]

    return answer


class Zero:
    """PretrainZero, arXiv 2512.03442: the predictor earns 1 for the span, the generator 1 - accuracy, but
    0 at accuracy 0.
    """

    def __init__(self, documents: list[tuple[int, ...]]):
        self.documents = documents
        self.groups: list[Any] = []

    def span(self, group: Any, thought: Any) -> tuple[str, ...] | None:
        """What a thought of the generator names, if it stands in the paragraph and is no tag."""
        found, words = (
            f.written(WORDS, thought, NAMING, "."),
            of_words(self.documents[int(group.position.document_id)]),
        )
        if not found or set(found) & {NAMING, OPENING, HIDDEN, "<think>", "</think>"}:
            return None
        places = sum(words[k : k + len(found)] == found for k in range(len(words)))
        return tuple(found) if 0 < places <= 7 else None

    def hit(self, group: Any, thought: Any) -> float:
        """Whether a thought of the predictor names what is hidden from it."""
        document = self.documents[int(group.position.document_id)]
        shown = [WORDS[i] for i in group.position.context_ids]
        at, words = shown.index(HIDDEN), of_words(document)
        return float(f.written(WORDS, thought, OPENING, ".") == words[at : at + len(words) - len(shown) + 1])

    def accuracy(self, group: Any, span: tuple[str, ...]) -> float:
        """Of the predictors that were asked for a span of this paragraph."""
        words = of_words(self.documents[int(group.position.document_id)])
        first = next(k for k in range(len(words)) if tuple(words[k : k + len(span)]) == span)
        hidden = [*words[:first], HIDDEN, *words[first + len(span) :]]
        asked = [
            g
            for g in self.groups
            if g.parent_id == group.id and [WORDS[i] for i in g.position.context_ids] == hidden
        ]
        (one,) = asked
        return sum(self.hit(one, t) for t in one.thoughts) / len(one.thoughts)

    def reward(self, group: Any, judged: list[f.Judged]) -> list[float]:
        if group.role == "predictor":
            return [self.hit(group, seen.thought) for seen in judged]
        out = []
        for seen in judged:
            span = self.span(group, seen.thought)
            share = self.accuracy(group, span) if span else 0.0
            out.append(1 - share if share > 0 else 0.0)
        return out


def test_pretrain_zero(values, bases):
    documents = texts(values)
    objective = {
        "name": "pretrain_zero",
        "template": "{context}",
        "predictor_template": "{context}",
        "naming": NAMING,
        "opening": OPENING,
        "closing": ".",
        "mask": HIDDEN,
    }
    folder = str(bases / "qwen3")
    found = record(
        values,
        scripted(values, name_or_find(documents)),
        model=folder,
        objective=objective,
        sampling__thoughts=4,
        positions_per_step=3,
        max_steps=1,
    )
    method = Zero(documents)
    method.groups = [g for batch in found.batches for g in batch.groups]
    kept = {g.role for g in method.groups if f.differs(g, g.rewards)}
    assert kept == {"generator", "predictor"}
    compare(found, f.Method(method.reward, keep=f.differs, target=False), f.Settings(), folder)


def test_rlpt_segments_from_both_sides(values, tmp_path):
    from tests.builders.rlpt import BPE, TEXT

    folder = tmp_path / "bpe"
    tiny_model("llama", vocab_size=len(BPE), seed=2).save_pretrained(folder)
    BPE.save_pretrained(folder)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    objective = {
        "name": "rlpt",
        "msr_weight": 1.0,
        "msr_template": "{context}",
        "min_segment_tokens": 1,
        "target_length": 4,
        "positions_per_document": 3,
        "clip": 0.5,
    }
    found = record(
        values,
        model=str(folder),
        data={"path": str(tmp_path / "text.jsonl"), "max_length": 200},
        objective=objective,
        sampling__thoughts=3,
        positions_per_step=6,
        max_steps=1,
    )
    groups = found.batches[0].groups
    assert {bool(g.position.suffix_ids) for g in groups} == {True, False} and len(
        found.batches[0].documents
    ) == 2

    def no_think(group: Any) -> tuple[int, ...] | None:
        """In the middle of a text the arm without a thought sees what comes after, too: the prompt without
        its tag.
        """
        return group.prompt.token_ids[:-1] if group.position.suffix_ids else None

    method = f.Method(f.information_gain(mean=True, clip=0.5), no_think=no_think)
    compare(found, method, f.Settings(), str(folder))


# objectives without thoughts


def nothing(group: Any, judged: Any) -> list[float]:
    raise AssertionError("there are no groups")


@pytest.mark.parametrize("inner", [1, 2])
def test_ntp_whose_documents_come_again(values, bases, tmp_path, inner):
    lines = Path(values["data"]["path"]).read_text().splitlines()[:3]
    (tmp_path / "three.jsonl").write_text("\n".join(lines) + "\n")
    folder = str(bases / "gpt2")
    found = record(
        values,
        model=folder,
        data={"path": str(tmp_path / "three.jsonl"), "max_length": 64},
        objective="ntp",
        positions_per_step=5,
        max_steps=2,
        loss__inner_epochs=inner,
        token_budget=100,
    )
    assert [len(b.documents) for b in found.batches] == [5, 5]
    compare(found, f.Method(nothing), f.Settings(ntp=1.0), folder)


def test_sft_mixed_trains_answers_only(values, bases, tmp_path):
    rows = [
        {"question": f"ann has {i} {'hmm ' * i}", "answer": "<think> 3 </think> shows 7 ."} for i in range(4)
    ]
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {
        f"ntp {i}": len(row["question"].split()) + 1 for i, row in enumerate(rows)
    }  # with "bob" of the join
    folder = str(bases / "qwen3")
    traces = {
        "path": str(tmp_path / "traces.jsonl"),
        "column": "question",
        "answer_column": "answer",
        "answer_join": " bob",
    }
    found = record(
        values,
        model=folder,
        objective={"name": "sft_mixed", "share": 0.4},
        ntp_data=traces,
        positions_per_step=10,
        max_steps=2,
    )

    def answers(document: Any, j: int, groups: Any) -> float:
        return float(j >= asked.get(document.id, 0))

    assert sum(d.id in asked for b in found.batches for d in b.documents) == 8
    compare(found, f.Method(nothing, ntp_weight=answers), f.Settings(ntp=1.0), folder)
