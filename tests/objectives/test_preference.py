"""Pretraining with human preferences: losses by scores of segments, control tokens, and their controls."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from rewards import log_complement
from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.corpora import dial
from rlpretrain.data.scores import SEGMENT_STARTS
from rlpretrain.evaluation.evaluate import evaluate_losses
from rlpretrain.models.lengths import Limit, check_rows
from rlpretrain.objectives import banned_ids
from rlpretrain.objectives.ntp import NTP
from rlpretrain.objectives.ntp import Config as NTPConfig
from rlpretrain.objectives.preference import Config, Preference
from rlpretrain.prompts import ControlTokens, ensure_delimiters
from rlpretrain.training.run import Run
from rlpretrain.types import Document, Scores
from tests.builders.runs import merged, one_step, same, trained, weights
from tests.builders.tiny import tiny_model, word_tokenizer

LOSSES: dict[str, dict[str, Any]] = {
    "filter": {"threshold": 0.4},
    "conditional": {"threshold": 0.0, "drop": 0.2},
    "unlikelihood": {"threshold": 0.0, "alpha": 0.5},
    "rwr": {"beta": 0.3},
    "awr": {"beta": 0.3, "alpha": 0.5},
}


def made(loss: str, **settings: Any) -> Any:
    """The objective with a tokenizer that has the control tokens; ids 3 and 4 are good and bad."""
    tokenizer = word_tokenizer(["<|good|>", "<|bad|>", *"abcdef"])
    return Preference(Config(loss=loss, **settings), tokenizer)  # type: ignore[arg-type]


def document(scores: tuple[float, ...], starts: list[int] | None = None, name: str = "d") -> Document:
    meta = None if starts is None else {SEGMENT_STARTS: starts}
    return Document(name, tuple(range(5, 5 + len(scores))), name, meta, scores=scores)


def scored_logps(documents: list[Document], logps: torch.Tensor) -> tuple[Any, Scores]:
    empty = torch.zeros(0, 0)
    scores = Scores(empty[..., None], empty[..., None], empty, logps, empty.bool(), empty.bool())
    return SimpleNamespace(documents=documents), scores


def losses_of(objective: Any, documents: list[Document], logps: torch.Tensor) -> torch.Tensor:
    return objective.trunk_loss(*scored_logps(documents, logps))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


DOCUMENTS = [
    document((0.0, 0.0, 0.7, 0.7, 0.2), [0, 2, 4], "a"),
    document((1.0, 1.0, 0.0, 0.0), [0, 2], "b"),
    document((0.0, 0.0, 0.0), [0], "c"),
]
LOGPS = -torch.rand(9, generator=torch.Generator().manual_seed(1)) * 4 - 1e-3
SCORES = [0.0, 0.7, 0.7, 0.2, 1.0, 0.0, 0.0, 0.0, 0.0]  # of the predicted tokens


# losses


def test_losses_are_the_formulas_worked_token_by_token():
    def expect(objective, formula):
        got = losses_of(objective, DOCUMENTS, LOGPS)
        wanted = [formula(s, float(lp)) for s, lp in zip(SCORES, LOGPS, strict=True)]
        assert got.tolist() == pytest.approx(wanted, abs=1e-5)

    expect(made("rwr", beta=0.3), lambda s, lp: -lp * math.exp(-s / 0.3))
    expect(made("rwr", beta=0.3, weight_cap=0.5), lambda s, lp: -lp * min(math.exp(-s / 0.3), 0.5))
    expect(made("awr", beta=0.3, alpha=0.5, value="none"), lambda s, lp: -lp * 0.5 * math.exp(-s / 0.3))
    hard = made("unlikelihood", threshold=0.2, alpha=0.5)
    expect(hard, lambda s, lp: -lp if s <= 0.2 else -0.5 * math.log(1 - math.exp(lp)))
    soft = made("unlikelihood", alpha=0.5)
    expect(soft, lambda s, lp: -(1 - s) * lp - s * 0.5 * math.log(1 - math.exp(lp)))


def test_values_of_awr_are_means_by_position():
    """The same tokens grouped by floor(log2(place)), counted by hand."""
    objective = made("awr", beta=0.5, alpha=1.0)
    objective.inspect(iter(DOCUMENTS))
    means = {0: -(0.0 + 1.0 + 0.0) / 3, 1: -(0.7 + 0.7 + 0.0 + 0.0 + 0.0) / 5, 2: -0.2}
    assert objective.values.tolist() == pytest.approx([means[k] for k in range(3)])
    longer = [replace(DOCUMENTS[0], token_ids=tuple(range(12)), scores=(0.3,) * 12, meta=None)]
    got = losses_of(objective, longer, -torch.ones(11))  # places 8 to 11 have the last value
    expected = [math.exp((-0.3 - means[min(int(math.log2(t)), 2)]) / 0.5) for t in range(1, 12)]
    assert got.tolist() == pytest.approx(expected, rel=1e-5)


def test_reductions_are_exact():
    plain, ids = -LOGPS, [d.token_ids for d in DOCUMENTS]
    for objective in (
        made("mle"),
        made("rwr", beta=1e30),
        made("unlikelihood", threshold=math.inf),
        made("conditional", threshold=0.0, drop=1.0),
        made("filter", threshold=math.inf),
    ):
        prepared = [objective.prepare(d, rng()) for d in DOCUMENTS]
        assert [d.token_ids for d in prepared] == ids
        assert torch.equal(losses_of(objective, prepared, LOGPS), plain)
    token_filter = losses_of(made("unlikelihood", threshold=0.2, alpha=0.0), DOCUMENTS, LOGPS)
    assert torch.equal(token_filter, torch.where(torch.tensor(SCORES) <= 0.2, plain, 0.0))
    constant = [replace(d, scores=(0.3,) * len(d.token_ids), meta=None) for d in DOCUMENTS]
    own_value = made("awr", alpha=0.25, beta=0.1)  # V = R
    own_value.inspect(iter(constant))
    assert torch.allclose(losses_of(own_value, constant, LOGPS), 0.25 * plain, atol=1e-6)


def test_rwr_is_the_tilted_distribution():
    """Minimising the weighted loss over a table gives p ∝ p_data · exp(R / β), its closed form."""
    p_data, scores = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), [0.0, 1.0, 0.4]
    objective = made("rwr", beta=0.7)
    documents = [document((0.0, s), None, str(k)) for k, s in enumerate(scores)]
    weight = objective.ntp_weights(*scored_logps(documents, -torch.ones(3, dtype=torch.float64)))
    expected = p_data * torch.tensor([math.exp(-s / 0.7) for s in scores], dtype=torch.float64)
    logits = (expected / expected.sum()).log().requires_grad_()
    (p_data * weight * -logits.log_softmax(-1)).sum().backward()
    assert logits.grad is not None and float(logits.grad.abs().max()) < 1e-12


def test_log_complement_is_stable():
    logps = torch.tensor([-1e-12, -1e-6, -0.3, -0.7, -5.0, -60.0], dtype=torch.float64, requires_grad=True)
    got = log_complement(logps)
    expected = [
        math.log(-math.expm1(lp)) if lp > -0.69 else math.log1p(-math.exp(lp)) for lp in logps.tolist()
    ]
    assert got.tolist() == pytest.approx(expected, rel=1e-9)
    got.sum().backward()
    slopes = [-math.exp(lp) / -math.expm1(lp) for lp in logps.tolist()]
    assert logps.grad is not None and logps.grad.tolist() == pytest.approx(slopes, rel=1e-9)


@given(gap=st.floats(0, 200))
def test_the_gradient_of_unlikelihood_is_finite_as_p_nears_1(gap):
    """To the logits, in float32: it is p where that can be told, and never more."""
    logits = torch.zeros(4)
    logits[0] = gap
    logits.requires_grad_()
    logp = logits.log_softmax(-1)[:1]
    loss = losses_of(made("unlikelihood", threshold=0.0), [document((0.0, 1.0))], logp).sum()
    loss.backward()
    assert math.isfinite(loss.item()) and logits.grad is not None and bool(logits.grad.isfinite().all())
    p = math.exp(float(logp.detach()))
    assert -1e-6 <= float(logits.grad[0]) <= 1.01
    assert gap > 12 or float(logits.grad[0]) == pytest.approx(p, rel=0.02)


# control tokens


def test_control_tokens_stand_before_their_segments():
    objective = made("conditional", threshold=0.2, drop=0.0)
    first, second, _ = (objective.prepare(d, rng()) for d in DOCUMENTS)
    assert first.token_ids == (3, 5, 6, 4, 7, 8, 3, 9)
    assert first.scores == (0, 0, 0, 0.7, 0.7, 0.7, 0.2, 0.2)
    assert second.token_ids == (4, 5, 6, 3, 7, 8)
    assert objective.notes() == {"preference/good_frac": 4 / 6} and not objective.notes()
    assert made("conditional", threshold=0.2, drop=0.0, max_length=4).prepare(
        DOCUMENTS[0], rng()
    ).token_ids == (3, 5, 6, 4)
    equal = document((0.0,) * 4, [0, 2])  # two segments, though their scores are equal
    assert objective.prepare(equal, rng()).token_ids == (3, 5, 6, 3, 7, 8)
    assert objective.prepare(replace(equal, meta=None), rng()).token_ids == (3, 5, 6, 7, 8)
    objective.tokenizer.bos_token = "a"  # id 5: what begins every text stays first
    assert objective.prepare(equal, rng()).token_ids == (5, 3, 6, 3, 7, 8)


@given(seed=st.integers(0, 2**31), drop=st.floats(0, 1))
def test_dropping_depends_on_the_seed_alone(seed, drop):
    """The text stays, each kept token says what its segment is, and the same draw gives the same document."""
    objective = made("conditional", threshold=0.2, drop=drop)
    prepared = [objective.prepare(DOCUMENTS[0], rng(seed)) for _ in range(2)]
    assert prepared[0] == prepared[1]
    ids = prepared[0].token_ids
    assert tuple(i for i in ids if i > 4) == DOCUMENTS[0].token_ids
    before = {ids[k + 1]: ids[k] for k in range(len(ids) - 1) if ids[k] in (3, 4)}
    assert before.items() <= {5: 3, 7: 4, 9: 3}.items()


def test_an_evaluation_is_of_the_text_without_control_tokens():
    """The loss of a conditional objective is exactly that of ntp on the same text; nothing is filtered."""
    model, documents = tiny_model("qwen3", vocab_size=32), [replace(d, meta=None) for d in DOCUMENTS]
    plain = evaluate_losses(model, NTP(NTPConfig(), None), documents)
    for loss in ("conditional", "filter"):
        got = evaluate_losses(model, made(loss, threshold=0.0), [replace(d, scores=None) for d in documents])
        assert got.losses.tolist() == plain.losses.tolist() and got.tokens.tolist() == plain.tokens.tolist()


def test_new_control_tokens_start_at_the_mean_and_can_be_banned():
    tokenizer, model = word_tokenizer("abc"), tiny_model("qwen3", vocab_size=6)
    old = model.get_input_embeddings().weight.detach().clone()
    tokens = ("<|good|>", "<|bad|>")
    assert ensure_delimiters(tokenizer, model, ControlTokens(tokens)) == list(tokens)
    rows = model.get_input_embeddings().weight.detach()
    assert torch.equal(rows[:6], old) and torch.allclose(rows[6:8], old.mean(0).expand(2, -1), atol=1e-7)
    assert ensure_delimiters(tokenizer, model, ControlTokens(tokens)) == []
    assert banned_ids(tokens, tokenizer) == (6, 7)
    with pytest.raises(ConfigError, match="banned_tokens: '<|no|>' is not a token"):
        banned_ids(("<|no|>",), tokenizer)


# the control, and the threshold


def test_permuted_scores_are_those_of_random_segments():
    objective = made("rwr", permuted=True)
    objective.inspect(iter(DOCUMENTS))
    pool = [0.0, 0.7, 0.2, 1.0, 0.0, 0.0]
    assert objective.pool.tolist() == pool
    many = [objective.prepare(DOCUMENTS[0], rng(seed)).scores for seed in range(600)]
    for scores in many:
        assert scores[0] == scores[1] and scores[2] == scores[3]  # a segment has one score
    firsts = [scores[0] for scores in many]
    for value in set(pool):
        assert firsts.count(value) / 600 == pytest.approx(pool.count(value) / 6, abs=0.09)
    assert abs(np.corrcoef(firsts, [scores[4] for scores in many])[0, 1]) < 0.15
    filtered = made("filter", threshold=0.2, permuted=True)
    filtered.inspect(iter(DOCUMENTS))
    kept = sum(filtered.prepare(DOCUMENTS[2], rng(seed)) is not None for seed in range(600)) / 600
    assert kept == pytest.approx(1 / 3, abs=0.09)  # of the three documents, c alone is good


def test_filter_keeps_documents_by_their_mean():
    objective = made("filter", threshold=0.4)
    assert [objective.prepare(d, rng()) is not None for d in DOCUMENTS] == [True, False, True]
    assert objective.notes() == {"preference/good_frac": pytest.approx(2 / 3)}


@pytest.mark.parametrize("loss", ["filter", "conditional", "unlikelihood"])
def test_a_threshold_that_divides_nothing_is_refused(loss):
    unit = "3 documents" if loss == "filter" else "6 segments"
    with pytest.raises(ConfigError, match=rf"threshold is 1: all of {unit} are good.*from 0 to"):
        made(loss, threshold=1.0).inspect(iter(DOCUMENTS))
    with pytest.raises(ConfigError, match=rf"threshold is -1: none of {unit} are good"):
        made(loss, threshold=-1.0).inspect(iter(DOCUMENTS))
    made(loss, threshold=0.0).inspect(iter(DOCUMENTS))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "filter"}, "objective.loss 'filter' needs objective.threshold"),
        ({"loss": "conditional"}, "needs objective.threshold"),
        ({"loss": "rwr", "threshold": 0.0}, "threshold is not used by objective.loss 'rwr'"),
        ({"loss": "mle", "permuted": True}, "permuted has no effect"),
        ({"loss": "awr", "value": "head"}, "value 'head' needs the hidden states"),
        ({"loss": "conditional", "threshold": 0.0, "bad": "<|good|>"}, "two different tokens"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        made(**settings)


def test_scores_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="d: the document has no scores.*set data.score_column"):
        made("rwr").prepare(replace(document((0.0, 1.0)), scores=None), rng())
    with pytest.raises(ConfigError, match=r"scores have to be in \[0, 1\]"):
        made("unlikelihood").prepare(document((0.0, 2.0)), rng())


# whole runs


@pytest.fixture(scope="module")
def scored(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Documents of the corpus in two segments: the second one is bad where the answer is odd."""
    file = tmp_path_factory.mktemp("scored") / "scored.jsonl"
    with file.open("w") as out:
        for line in (corpus / "train.jsonl").read_text().splitlines()[:24]:
            row = json.loads(line)
            at = row["text"].index("shows")
            score = int(row["answer"]) % 2
            spans = [[0, at, 0.0], [at, len(row["text"]), float(score)]]
            out.write(json.dumps({"text": row["text"], "spans": spans}) + "\n")
    return str(file)


def preference_of(values: dict[str, Any], scored: str, loss: str, **settings: Any) -> dict[str, Any]:
    objective = {"name": "preference", "loss": loss, **LOSSES[loss], **settings}
    return merged(values, objective=objective, data__path=scored, data__score_column="spans")


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_logs_and_resumes_bit_by_bit(values, scored, tmp_path, loss):
    """The control tokens of `conditional`, and no others, are in the saved tokenizer."""
    config = preference_of(values, scored, loss, permuted=loss == "rwr") | {"max_steps": 4}
    config["checkpoint"] = {"every": 2, "keep": 3}
    whole = trained(config, output_dir=str(tmp_path / "whole"))
    folder = tmp_path / "whole"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if "threshold" in LOSSES[loss]:
        assert 0 < np.mean([row["preference/good_frac"] for row in rows]) < 1
    if loss in ("rwr", "awr"):
        assert all(0 < row["ntp/weight_ess"] <= 1 and row["ntp/weight_mean"] > 0 for row in rows)
    assert ("<|good|>" in AutoTokenizer.from_pretrained(folder / "model").get_vocab()) == (
        loss == "conditional"
    )
    trained(config, resume=str(folder / "checkpoint-2"), output_dir=str(folder))
    assert same(whole, weights(folder / "model"))


@pytest.mark.parametrize("loss", ["conditional", "unlikelihood", "rwr"])
def test_packing_does_not_change_the_gradient(values, scored, tmp_path, loss):
    gradients = []
    for packing, budget in (("tree", 16384), ("padded", 64)):
        config = preference_of(values, scored, loss) | {"packing": packing}
        folder = str(tmp_path / f"{packing}-{budget}")
        gradients.append(one_step(config, token_budget=budget, output_dir=folder)[1])
    assert same(*gradients, within=1e-5)


@pytest.mark.parametrize("loss", ["mle", "rwr"])
def test_reductions_train_as_ntp_does(values, scored, tmp_path, loss):
    settings = {"beta": 1e30} if loss == "rwr" else {}
    mine = merged(values, objective={"name": "preference", "loss": loss, **settings}, data__path=scored)
    mine["data"]["score_column"] = "spans"
    ours = trained(mine, output_dir=str(tmp_path / "mine"))
    plain = trained(merged(values, objective="ntp", data__path=scored), output_dir=str(tmp_path / "ntp"))
    assert same(ours, plain)


def test_lora_trains_control_tokens(values, scored, tmp_path):
    config = preference_of(values, scored, "conditional")
    config["policy"] = {"backend": "torch", "lora": {"r": 4}}
    trained(config, output_dir=str(tmp_path / "lora"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "lora" / "model")
    rows = model.get_input_embeddings().weight.detach()[len(dial.WORDS) :]
    assert len(rows) >= 2 and not torch.equal(rows[0], rows[1])  # they started equal


def test_a_run_refuses_what_it_cannot_train_on(values, scored):
    with pytest.raises(ConfigError, match="all of 48 segments are good"):
        Run(build(preference_of(values, scored, "conditional", threshold=2.0)), None)
    without = preference_of(values, scored, "filter")
    del without["data"]["score_column"]
    with pytest.raises(ConfigError, match="data.score_column: objective.loss filter needs the column"):
        Run(build(without), None)
    awr = made("awr", value="position")
    with pytest.raises(ConfigError, match="a replay has not: set none"):
        awr.check_run(build(preference_of(values, scored, "awr") | {"replay": "runs/other"}))


def test_documents_have_room_for_their_control_tokens():
    limit = Limit(256, "the model takes 256 tokens")
    check_rows(made("conditional", threshold=0.0, max_length=256), 200, limit)
    check_rows(made("conditional", threshold=0.0), 128, limit)
    with pytest.raises(ConfigError, match="may have 400 .*set objective.max_length to at most 256"):
        check_rows(made("conditional", threshold=0.0), 200, limit)
