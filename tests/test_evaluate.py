"""The evaluation: every number recomputed another way, from full logits, one row at a time."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from rlpretrain import models
from rlpretrain.compat import attention_of
from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.data.stream import read_all
from rlpretrain.evaluation import evaluate as evaluate_module
from rlpretrain.evaluation.evaluate import MEANING, Evaluation, Interrupted, by_meta, contrast, evaluate
from rlpretrain.objectives import load_objective
from rlpretrain.prompts import Delimiters
from rlpretrain.types import Document
from rollout.types import FinishReason
from tests.builders.configs import tiny_values
from tests.builders.runs import merged
from tests.builders.tiny import tiny_model


@pytest.fixture(scope="module")
def ready(corpus, tmp_path_factory):
    """(model, documents, make): `make(**changes)` gives an objective of the small configuration."""
    base = tiny_values(corpus, tmp_path_factory.mktemp("eval"))
    base = merged(
        base,
        data__path=str(corpus / "held_out.jsonl"),
        data__meta_columns=["depth"],
        sampling__max_thought_tokens=40,
    )
    model, tokenizer, _ = models.load_with_tokenizer(build(base).model, Delimiters())
    documents = read_all(build(base).data, tokenizer, limit=12)

    def make(**changes):
        return load_objective(build(merged(base, **changes)), tokenizer)

    return model, documents, make


@pytest.fixture(scope="module")
def other(ready):
    """Another model of the same vocabulary."""
    return tiny_model("qwen3", vocab_size=ready[0].get_input_embeddings().weight.shape[0], seed=11)


@pytest.fixture(scope="module")
def whole(ready, other) -> Evaluation:
    """Two target tokens, three thoughts, against another frozen model."""
    model, documents, make = ready
    return evaluate(model, make(objective__target_length=2), documents, frozen=other, thoughts=3, seed=5)


@torch.no_grad()
def after(model, ids, target) -> tuple[float, bool]:
    """(log p of the target after `ids`, whether every token of it is the likeliest), from full logits."""
    logits = model(input_ids=torch.tensor([[*ids, *target]])).logits[0].double()
    rows = torch.arange(len(ids) - 1, len(ids) + len(target) - 1)
    logps = logits.log_softmax(-1)[rows, torch.tensor(target)]
    return float(logps.sum()), logits[rows].argmax(-1).tolist() == list(target)


def with_thought(group, thought) -> tuple[int, ...]:
    close = () if thought.finish_reason is FinishReason.CLOSE else group.prompt.close_ids
    return (*group.prompt.token_ids, *thought.token_ids, *close)


# the numbers


def test_gains_and_hits_equal_those_from_full_logits(ready, other, whole):
    model = ready[0]
    reasons = set()
    for i, group in enumerate(whole.groups):
        target = group.position.target_ids
        alone, direct = after(model, group.position.context_ids, target)
        frozen, _ = after(other, group.position.context_ids, target)
        told = [after(model, with_thought(group, t), target) for t in group.thoughts]
        mean = np.mean([logp for logp, _ in told])
        reasons |= {t.finish_reason for t in group.thoughts}
        assert whole.values["direct"][i] == direct
        assert whole.values["think_sampled"][i] == pytest.approx(np.mean([hit for _, hit in told]))
        assert whole.values["gain"][i] == pytest.approx(mean - alone, abs=1e-4)
        assert whole.values["gain_frozen"][i] == pytest.approx(mean - frozen, abs=1e-4)
        unclosed = np.mean([t.finish_reason is not FinishReason.CLOSE for t in group.thoughts])
        assert whole.values["unclosed"][i] == pytest.approx(unclosed)
        assert whole.values["length"][i] == pytest.approx(np.mean([len(t.token_ids) for t in group.thoughts]))
    assert (
        FinishReason.CLOSE in reasons and len(reasons) > 1
    )  # closed and force-closed thoughts were both there


def test_the_direct_answer_is_the_likeliest_token(ready):
    """Targets replaced by what the model would say: every direct answer is right."""
    _, documents, make = ready
    model = tiny_model("llama", vocab_size=len(make().tokenizer))  # untied: it does not just repeat "shows"
    said = []
    for document in documents:
        place = document.token_ids.index(make().tokenizer.convert_tokens_to_ids("shows")) + 1
        with torch.no_grad():
            best = int(model(input_ids=torch.tensor([document.token_ids[:place]])).logits[0, -1].argmax())
        said.append(
            Document(document.id, (*document.token_ids[:place], best, *document.token_ids[place + 1 :]))
        )
    special = set(make().tokenizer.all_special_ids)
    said = [d for d in said if not special & set(d.token_ids[:-1])]
    assert len(said) >= 2
    assert evaluate(model, make(), said, thoughts=2).values["direct"].tolist() == [1.0] * len(said)


def test_greedy_thoughts_are_the_likeliest_tokens(ready):
    model, documents, make = ready
    objective = make(sampling__max_thought_tokens=5)
    found = evaluate(model, objective, documents[:4], thoughts=2)
    for i, group in enumerate(found.groups):
        ids, stops = list(group.prompt.token_ids), (*group.prompt.stop_ids, *objective.setting.params.eos_ids)
        for _ in range(5):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in stops:
                break
        if ids[-1] not in group.prompt.stop_ids:
            ids += group.prompt.close_ids
        assert found.values["think_greedy"][i] == after(model, ids, group.position.target_ids)[1]


def test_gain_against_itself_is_the_plain_gain(ready, whole):
    model, documents, make = ready
    objective = make(objective__target_length=2)
    alone = evaluate(model, objective, documents, thoughts=3, seed=5)
    assert np.array_equal(alone.values["gain"], alone.values["gain_frozen"])
    twin = evaluate(model, objective, documents, frozen=copy.deepcopy(model), thoughts=3, seed=5)
    np.testing.assert_allclose(twin.values["gain"], twin.values["gain_frozen"], atol=1e-5)
    np.testing.assert_allclose(
        twin.values["gain"], whole.values["gain"], atol=1e-5
    )  # whatever it is compared with
    assert not np.allclose(whole.values["gain"], whole.values["gain_frozen"])


def test_no_think_loss_is_transformers_own(ready, whole):
    model, documents, _ = ready
    for i, document in enumerate(documents):
        ids = torch.tensor([document.token_ids])
        with torch.no_grad():
            assert whole.losses[i] == pytest.approx(float(model(input_ids=ids, labels=ids).loss), abs=1e-5)
        assert whole.tokens[i] == len(document.token_ids) - 1
    summary = whole.summary()
    assert summary["no_think_loss"] == pytest.approx((whole.losses * whole.tokens).sum() / whole.tokens.sum())


def test_every_number_has_a_meaning_and_an_interval(whole):
    summary = whole.summary()
    names = {name.removesuffix("_ci") for name in summary}
    assert names == set(MEANING) - {
        "reward",
        "asked",
        "answer_loss",
        "not_finite",
    }  # RLP's needs log-probabilities, all of them are
    for name in names:
        low, high = summary[f"{name}_ci"]
        assert low - 1e-9 <= summary[name] <= high + 1e-9


# contrasts


def test_contrasts_keep_what_they_should(whole):
    groups = list(whole.groups)
    for group, emptied in zip(groups, contrast(groups, "empty"), strict=True):
        assert [t.token_ids for t in emptied.thoughts] == [group.prompt.close_ids]
    for group, mixed in zip(groups, contrast(groups, "shuffled", seed=2), strict=True):
        for a, b in zip(group.thoughts, mixed.thoughts, strict=True):
            assert sorted(a.token_ids) == sorted(b.token_ids) and a.finish_reason is b.finish_reason
            if a.finish_reason is FinishReason.CLOSE:
                assert b.token_ids[-1] == group.prompt.close_ids[0] == a.token_ids[-1]
            body = a.token_ids[:-1] if a.finish_reason is FinishReason.CLOSE else a.token_ids
            assert a.token_ids != b.token_ids or len(set(body)) < 2
    for group, foreign in zip(groups, contrast(groups, "other"), strict=True):
        assert foreign.position == group.position and foreign.prompt == group.prompt
        (source,) = [g for g in groups if g.thoughts == foreign.thoughts]
        assert source.position.document_id != group.position.document_id
    assert (
        contrast(groups, "shuffled", 2) == contrast(groups, "shuffled", 2) != contrast(groups, "shuffled", 3)
    )


def test_the_gain_of_an_empty_thought(ready, other, whole):
    model = ready[0]
    for i, group in enumerate(whole.groups):
        told, _ = after(model, (*group.prompt.token_ids, *group.prompt.close_ids), group.position.target_ids)
        frozen, _ = after(other, group.position.context_ids, group.position.target_ids)
        assert whole.values["empty"][i] == pytest.approx(told - frozen, abs=1e-4)


# how it runs


def test_deterministic_under_the_seed_and_whatever_the_batches(ready, whole):
    model, documents, make = ready
    objective = make()
    settings = {"thoughts": 2, "seed": 3, "greedy": False}
    first = evaluate(model, objective, documents, **settings)
    for again in (
        evaluate(model, objective, documents, **settings),
        evaluate(model, objective, documents, token_budget=1, **settings),
    ):
        assert [g.thoughts for g in again.groups] == [g.thoughts for g in first.groups]
        for name, values in first.values.items():
            np.testing.assert_allclose(again.values[name], values, atol=1e-5, err_msg=name)
    moved = evaluate(model, objective, documents, **settings | {"seed": 4})
    assert [g.thoughts for g in moved.groups] != [g.thoughts for g in first.groups]
    assert objective.setting.thoughts == 4  # as it was


def test_what_a_document_gets_does_not_depend_on_its_neighbours(ready, whole):
    """So that one rank and several evaluate the same thoughts, shuffled ones too."""
    model, documents, make = ready
    settings = {"thoughts": 2, "seed": 3, "greedy": False}
    together = evaluate(model, make(), documents, **settings)
    part = evaluate(model, make(), documents[5:7], **settings)
    for ours, theirs in zip(part.groups, together.groups[5:7], strict=True):
        assert [t.token_ids for t in ours.thoughts] == [t.token_ids for t in theirs.thoughts]
        for one, other in zip(
            ours.thoughts, theirs.thoughts, strict=True
        ):  # a matrix of other rows may round otherwise
            np.testing.assert_allclose(one.behaviour_logps, other.behaviour_logps, atol=1e-5)
    np.testing.assert_allclose(part.values["shuffled"], together.values["shuffled"][5:7], atol=1e-5)


def test_parts_give_the_numbers_of_the_whole(ready, other, whole, monkeypatch):
    """A part's thoughts of another document may belong to a later part."""
    model, documents, make = ready
    monkeypatch.setitem(evaluate_module.ROWS, "cpu", 6)
    done = []
    parts = evaluate(
        model,
        make(objective__target_length=2),
        documents,
        frozen=other,
        thoughts=3,
        seed=5,
        progress=lambda *numbers: done.append(numbers),
    )
    assert done == [(n, 12) for n in range(2, 13, 2)]
    assert [g.id for g in parts.groups] == [g.id for g in whole.groups]
    assert set(parts.values) == set(whole.values)
    for name, values in whole.values.items():
        np.testing.assert_allclose(parts.values[name], values, atol=1e-5, err_msg=name)


def test_an_interrupted_evaluation_has_the_parts_that_were_done(ready, other, whole, monkeypatch):
    model, documents, make = ready
    monkeypatch.setitem(evaluate_module.ROWS, "cpu", 6)

    def interrupt(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    settings = {"frozen": other, "thoughts": 3, "seed": 5}
    with pytest.raises(Interrupted) as caught:
        evaluate(model, make(objective__target_length=2), documents, progress=interrupt, **settings)
    done = caught.value.done
    assert [d.id for d in done.documents] == [d.id for d in documents[:4]]
    for name, values in whole.values.items():
        np.testing.assert_allclose(done.values[name], values[:4], atol=1e-5, err_msg=name)


def test_a_tree_and_padded_rows_give_the_same_numbers(ready, other, whole):
    model, documents, make = ready
    settings = {"frozen": other, "thoughts": 3, "seed": 5}
    before = attention_of(model), attention_of(other)
    padded = evaluate(model, make(objective__target_length=2), documents, tree=False, **settings)
    for name, values in whole.values.items():
        np.testing.assert_allclose(padded.values[name], values, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(padded.losses, whole.losses, atol=1e-5)
    assert (attention_of(model), attention_of(other)) == before


def test_a_model_that_no_tree_fits_is_scored_in_padded_rows(ready):
    """Its configuration does not say that it mixes tokens outside attention; the first document does."""
    _, documents, make = ready
    model = tiny_model("llama", vocab_size=len(make().tokenizer))
    mixer = model.model.layers[0].mlp
    forward = mixer.forward
    mixer.forward = lambda hidden: forward(hidden) + hidden.cumsum(1)
    settings = {"thoughts": 2, "seed": 5, "greedy": False}
    found = evaluate(model, make(), documents[:4], **settings)
    padded = evaluate(model, make(), documents[:4], tree=False, **settings)
    for name, values in padded.values.items():
        np.testing.assert_allclose(found.values[name], values, atol=1e-5, err_msg=name)


def test_several_positions_of_a_document(ready, other):
    model, documents, make = ready
    objective = make(
        objective={"name": "rlp", "positions": "random", "positions_per_document": 3, "min_context": 4}
    )
    settings = {"frozen": other, "thoughts": 2, "seed": 5}
    first = evaluate(model, objective, documents[:4], **settings)
    found = evaluate(model, objective, documents[:4], positions=3, **settings)
    assert [d.id for d in found.documents] == [d.id for d in documents[:4] for _ in range(3)]
    assert len({g.id for g in found.groups}) == 12
    assert [g.position for g in found.groups[::3]] == [g.position for g in first.groups]
    for name in ("gain", "gain_frozen", "shuffled", "empty", "direct"):  # `other` has other partners
        np.testing.assert_allclose(found.values[name][::3], first.values[name], atol=1e-5, err_msg=name)
    assert found.summary()["no_think_loss"] == pytest.approx(first.summary()["no_think_loss"])
    for i, group in enumerate(found.groups):
        alone, _ = after(other, group.position.context_ids, group.position.target_ids)
        told = [after(model, with_thought(group, t), group.position.target_ids)[0] for t in group.thoughts]
        assert found.values["gain_frozen"][i] == pytest.approx(np.mean(told) - alone, abs=1e-4)


def test_documents_stay_in_order_and_those_without_a_position_are_left_out(ready):
    model, documents, make = ready
    barren = Document("none", documents[0].token_ids[:5], meta={"depth": 9})
    found = evaluate(
        model, make(), [documents[3], barren, *documents[:3]], thoughts=2, controls=False, greedy=False
    )
    assert [d.id for d in found.documents] == [documents[i].id for i in (3, 0, 1, 2)]
    assert [g.position.document_id for g in found.groups] == [d.id for d in found.documents]
    assert all(len(values) == 4 for values in (*found.values.values(), found.losses, found.tokens))


def test_split_by_a_column_and_joined_again(whole):
    parts = by_meta(whole, "depth")
    assert list(parts) == ["1", "2", "3", "4", "5", "6"]
    for depth, part in parts.items():
        assert {str(d.meta["depth"]) for d in part.documents} == {depth}
        assert len(part.documents) == len(part.groups) == len(part.losses) == len(part.values["gain"]) == 2
    joined = Evaluation.join(list(parts.values()))
    assert sorted(joined.values["gain"]) == sorted(whole.values["gain"]) and len(joined.documents) == 12
    assert list(by_meta(whole, "nothing")) == ["None"]


def test_entropy_positions_are_those_of_the_frozen_model(ready, other):
    model, documents, make = ready
    objective = make(objective={"name": "rlp", "positions": "entropy", "top_fraction": 0.0})
    found = evaluate(model, objective, documents[:4], frozen=other, thoughts=2, controls=False, greedy=False)
    for group, document in zip(found.groups, documents[:4], strict=True):
        with torch.no_grad():
            logps = other(input_ids=torch.tensor([document.token_ids])).logits[0].log_softmax(-1)
        entropies = -(logps.exp() * logps).sum(-1)[
            : len(document.token_ids) - 2
        ]  # of tokens 1.., the end of text aside
        assert group.position.index == int(entropies.argmax()) + 1


def test_an_objective_without_positions_gives_the_loss_alone(ready, whole):
    model, documents, make = ready
    found = evaluate(model, make(objective="ntp"), documents)
    assert found.values == {} and found.groups == []
    np.testing.assert_allclose(found.losses, whole.losses, atol=1e-6)
    assert set(found.summary()) == {"no_think_loss", "no_think_loss_ci"}


def test_too_few_documents_are_an_error(ready):
    model, documents, make = ready
    with pytest.raises(ConfigError, match="none of the 1 held-out documents has a position"):
        evaluate(model, make(), [Document("none", documents[0].token_ids[:5])])
    with pytest.raises(ConfigError, match="need two held-out documents"):
        evaluate(model, make(), documents[:1])
    assert len(evaluate(model, make(), documents[:1], controls=False).documents) == 1
