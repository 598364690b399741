"""Distillation: soft targets from a frozen teacher, and the controls."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.corpora import dial
from rlpretrain.objectives.distill import Config, Distill
from rlpretrain.tools.dry_run import dry_run
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from rlpretrain.types import Document, Likeliest
from tests.builders.runs import SGD, launch, merged, one_step, same, trained, weights
from tests.builders.tiny import tiny_model, word_tokenizer

V = len(dial.WORDS)


@pytest.fixture(scope="module")
def other(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A teacher with the vocabulary of the corpus."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny_model("qwen3", vocab_size=V, seed=8, initializer_range=0.3).save_pretrained(folder)
    dial.tokenizer().save_pretrained(folder)
    return str(folder)


def distilled(values: dict[str, Any], reference: str | None, **settings: Any) -> dict[str, Any]:
    """A run with the teacher at `reference`; `settings` of the objective, and of the run with a prefix."""
    run = {name[4:]: settings.pop(name) for name in list(settings) if name.startswith("run_")}
    objective = {"name": "distill", "until": 1.0, **settings}
    return merged(values, objective=objective, **({"reference": reference} if reference else {}), **run)


def targets(logps: torch.Tensor, own: list[int], **settings: Any) -> dict[int, dict[int, float]]:
    """For each token of a document, the probabilities by id; `logps` [M, V] are the teacher's."""
    objective: Any = Distill(Config(until=1.0, **settings), dial.tokenizer())
    documents = [Document("d", (0, *own))]
    micro: Any = SimpleNamespace(trunk_labels=torch.tensor(own), documents=documents)

    def teacher(_: Any, count: int, temperature: float) -> Likeliest:
        top = (logps / temperature).log_softmax(-1).topk(count, dim=1)
        return Likeliest(top.indices, top.values)

    soft = objective.soft_targets(micro, teacher)
    found: dict[int, dict[int, float]] = {}
    for t, (ids, probs) in enumerate(zip(soft.ids.tolist(), soft.probs.tolist(), strict=True)):
        found[t] = {}
        for i, p in zip(ids, probs, strict=True):
            found[t][i] = found[t].get(i, 0.0) + p
    return found


LOGITS = torch.randn(6, V, generator=torch.Generator().manual_seed(2)) * 2
OWN = [3, 7, 1, 4, 4, 2]


@pytest.mark.parametrize("tail", ["drop", "gold"])
def test_the_mixture_is_the_formula_worked_token_by_token(tail):
    found = targets(LOGITS, OWN, weight=0.3, top_k=5, temperature=2.0, tail=tail)
    for t, own in enumerate(OWN):
        p = (LOGITS[t].double() / 2).softmax(-1).tolist()
        best = sorted(range(V), key=lambda i: -p[i])[:5]
        mass = sum(p[i] for i in best)
        wanted = {own: 0.7 + (0.3 * (1 - mass) if tail == "gold" else 0.0)}
        for i in best:
            wanted[i] = wanted.get(i, 0.0) + 0.3 * p[i] / (mass if tail == "drop" else 1.0)
        assert found[t] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("top_k", [1, 4, V])
@pytest.mark.parametrize("settings", [{}, {"tail": "gold"}, {"teacher": "random"}, {"teacher": "uniform"}])
def test_every_token_has_a_mass_of_one(top_k, settings):
    for probs in targets(LOGITS, OWN, weight=0.6, top_k=top_k, **settings).values():
        assert sum(probs.values()) == pytest.approx(1.0, abs=1e-6) and min(probs.values()) >= 0


def test_the_random_teacher_has_the_teachers_probabilities_on_other_tokens():
    plain, random = (targets(LOGITS, OWN, weight=1.0, teacher=name) for name in ("model", "random"))
    order: dict[int, int] = {}
    for t in plain:
        mine, others = ({p: i for i, p in sorted(found[t].items()) if p > 0} for found in (plain, random))
        assert mine.keys() == others.keys() and len(mine) == 16
        for p, token in mine.items():
            assert order.setdefault(token, others[p]) == others[p]  # one order for all places
    assert len(set(order.values())) == len(order) and sum(a != b for a, b in order.items()) > 30


def test_documents_are_selected_by_the_teachers_median_loss_on_learnable_tokens():
    logits, losses = LOGITS.clone(), []
    for t, own in enumerate(OWN[:4]):
        logits[t, own] += 4.0  # so that most tokens are learnable, and not all
    for t, own in enumerate(OWN):
        logps = logits[t].double().log_softmax(-1)
        if own in logps.topk(10).indices.tolist():
            losses.append(-float(logps[own]))
    assert 2 <= len(losses) < len(OWN)
    losses.sort()
    middle = len(losses) // 2
    median = losses[middle] if len(losses) % 2 else (losses[middle - 1] + losses[middle]) / 2
    for low, high, kept in (
        (median - 0.01, None, 1.0),
        (None, median + 0.01, 1.0),
        (median + 0.01, None, 0.0),
    ):
        settings = {"selection": "teacher", "score_min": low, "score_max": high, "weight": 0.0, "top_k": 12}
        found = targets(logits, OWN, **settings)
        assert [sum(probs.values()) for probs in found.values()] == pytest.approx([kept] * len(OWN))


@pytest.mark.parametrize("packing", ["tree", "padded"])
@pytest.mark.parametrize("kind", ["salt", "self"])
def test_without_weight_or_stage_it_is_ntp_bit_by_bit(values, other, tmp_path, packing, kind):
    reference = other if kind == "salt" else None
    plain = trained(merged(values, objective="ntp", packing=packing), output_dir=str(tmp_path / "ntp"))
    for name, settings in (("weight", {"weight": 0.0}), ("until", {"until": 0.0})):
        config = distilled(values, reference, kind=kind, run_packing=packing, **settings)
        assert same(plain, trained(config, output_dir=str(tmp_path / name)))


def test_the_loss_switches_exactly_at_until(values, other, tmp_path):
    """Four steps: two with soft targets, two with the loss of ntp."""
    trained(distilled(values, other, until=0.5, run_max_steps=4), output_dir=str(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["ntp/soft_frac"] for row in rows] == [1, 1, 0, 0]
    assert all(abs(row["loss"] - row["ntp/loss"]) > 1e-3 for row in rows[:2])
    assert all(row["loss"] == pytest.approx(row["ntp/loss"], abs=1e-6) for row in rows[2:])


@pytest.mark.parametrize("settings", [{}, {"tail": "gold", "temperature": 2.0}, {"teacher": "uniform"}])
def test_the_gradient_is_that_of_full_logits(values, other, tmp_path, settings):
    """Against a loss worked with transformers' logits of each document alone."""
    weight, k, heat = 0.4, 5, settings.get("temperature", 1.0)
    reference = None if settings.get("teacher") == "uniform" else other
    config = distilled(values, reference, weight=weight, top_k=k, **settings)
    batches: list[Any] = []

    def keep(run: Run) -> None:
        take = run.next_batch
        run.next_batch = lambda: batches.append(take()) or batches[-1]

    _, gradient = one_step(config, keep, output_dir=str(tmp_path / "run"))
    model = AutoModelForCausalLM.from_pretrained(values["model"])
    teacher = AutoModelForCausalLM.from_pretrained(other)
    losses: list[torch.Tensor] = []
    for document in batches[0].documents:
        ids = torch.tensor([document.token_ids])
        own = ids[0, 1:, None]
        logps = model(ids).logits[0, :-1].log_softmax(-1)
        with torch.no_grad():
            p = (teacher(ids).logits[0, :-1] / heat).softmax(-1)
        q = torch.zeros_like(p)
        if settings.get("teacher") == "uniform":
            q += 1 / V
        else:
            best = p.topk(k, dim=1)
            q.scatter_(1, best.indices, best.values)
            q = q / q.sum(1, keepdim=True) if "tail" not in settings else q
            q.scatter_add_(1, own, 1 - q.sum(1, keepdim=True))
        q = weight * q
        q.scatter_add_(1, own, torch.full(own.shape, 1 - weight))
        losses.append(-(q * logps).sum(1))
    torch.cat(losses).mean().backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    assert same(gradient, wanted, within=2e-6 * max(1.0, max(float(g.abs().max()) for g in wanted.values())))


def test_a_teacher_that_is_the_learner_has_no_gradient_over_the_whole_vocabulary(values, tmp_path):
    largest = {}
    for top_k in (V, 4):
        config = distilled(values, None, kind="self", weight=1.0, top_k=top_k)
        _, gradient = one_step(config, output_dir=str(tmp_path / str(top_k)))
        largest[top_k] = max(float(g.abs().max()) for g in gradient.values())
    assert largest[V] < 1e-6 < 1e-3 < largest[4]


def test_packing_and_micro_batches_do_not_change_the_gradient(values, other, tmp_path):
    gradients = []
    for packing, budget in (("tree", 16384), ("tree", 64), ("padded", 16384), ("padded", 64)):
        selection = {"selection": "teacher", "score_max": 3.0}
        config = distilled(values, other, run_packing=packing, run_token_budget=budget, **selection)
        gradients.append(one_step(config, output_dir=str(tmp_path / f"{packing}-{budget}"))[1])
    _, plain = one_step(merged(values, objective="ntp"), output_dir=str(tmp_path / "ntp"))
    assert all(same(gradients[0], gradient, within=1e-5) for gradient in gradients[1:])
    assert not same(gradients[0], plain, within=1e-4)


def few(values: dict[str, Any], tmp_path: Path, **row: Any) -> str:
    """A file with the first eight documents; `row` gives further columns by the number of a document."""
    lines = [json.loads(line) for line in Path(values["data"]["path"]).read_text().splitlines()[:8]]
    lines = [line | {name: make(i) for name, make in row.items()} for i, line in enumerate(lines)]
    file = tmp_path / "eight.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def test_the_cache_holds_k_per_token_and_a_resumed_run_ends_with_the_same_weights(values, other, tmp_path):
    config = distilled(values, other, top_k=5, run_max_steps=6, run_checkpoint={"every": 3, "keep": 3})
    config = merged(config, data__path=few(values, tmp_path))
    folder = tmp_path / "whole"
    whole = trained(config, output_dir=str(folder))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["reference/cached_frac"] for row in rows] == [0, 0, 1, 1, 1, 1]
    state = torch.load(next((folder / "checkpoint-3").glob("rank*")), weights_only=False)["reference"][
        "cache"
    ]
    assert set(state["widths"]) == {10} and len(state["keys"]) == 8
    trained(config, resume=str(folder / "checkpoint-3"), output_dir=str(folder))
    assert same(whole, weights(folder / "model"))
    uncached = merged(config, reference={"path": other, "cache_tokens": 0})
    assert same(whole, trained(uncached, output_dir=str(tmp_path / "uncached")))


def test_documents_are_selected_by_a_column_in_the_first_stage_alone(values, other, tmp_path):
    settings = {"selection": "column", "score_column": "score", "score_max": 3, "until": 0.5}
    config = distilled(values, other, run_max_steps=4, run_positions_per_step=4, **settings)
    config = merged(config, data__path=few(values, tmp_path, score=float), data__meta_columns=["score"])
    run = Run(build(config), None)
    batches, take = [], run.next_batch
    run.next_batch = lambda: batches.append(take()) or batches[-1]
    train(run)
    run.close()
    scores = [[document.meta["score"] for document in batch.documents] for batch in batches]
    assert max(scores[0] + scores[1]) <= 3 and max(scores[2] + scores[3]) > 3
    held_out = Document("d", (1, 2), meta={"score": 9.0})
    objective: Any = run.objective.at(0.0)
    assert objective.prepare(held_out, None) is None
    assert objective.prepare_held_out(held_out, None) is held_out
    with pytest.raises(ConfigError, match="score_column 'score': document d has None, not a number"):
        objective.prepare(Document("d", (1, 2)), None)


@pytest.mark.parametrize("kind", ["salt", "self"])
def test_with_lora(values, other, tmp_path, kind):
    """The adapters are trained; the teacher of `self` is the model without them."""
    lora = {"backend": "torch", "lora": {"r": 4}}
    config = distilled(values, other if kind == "salt" else None, kind=kind, run_policy=lora, weight=1.0)
    base = AutoModelForCausalLM.from_pretrained(values["model"])
    assert not same(dict(base.named_parameters()), trained(config, output_dir=str(tmp_path / "run")))


def test_two_ranks_train_as_one_does(values, other, tmp_path):
    run = merged(distilled(values, other), optim=SGD)
    configs = [run | {"output_dir": str(tmp_path / name)} for name in ("one", "two")]
    one = trained(configs[0])
    launch([{"config": configs[1]}], tmp_path)
    assert same(one, weights(tmp_path / "two" / "model"), within=1e-5)


def test_bad_settings_are_refused(values, other, tmp_path):
    for match, reference, settings in (
        ("Distill needs a second model: set reference.path", None, {}),
        ("'reference.path' is set, but objective Distill uses no reference", other, {"teacher": "uniform"}),
        ("weight", other, {"weight": 1.5}),
        ("until", other, {"until": -0.1}),
        ("temperature", other, {"temperature": 0}),
        ("top_k", other, {"top_k": 0}),
        ("selection: column and objective.score_column need", other, {"selection": "column", "score_min": 1}),
        ("selection needs objective.score_min or", other, {"selection": "teacher"}),
        ("selection needs objective.score_min or", other, {"score_max": 2.0}),
        ("score_min 3.0 is above", other, {"selection": "teacher", "score_min": 3, "score_max": 2}),
        (
            "learnable_k 10 is above objective.top_k 4",
            other,
            {"selection": "teacher", "score_min": 1, "top_k": 4},
        ),
        (
            "with teacher uniform there is none",
            None,
            {"selection": "teacher", "score_min": 1, "teacher": "uniform"},
        ),
    ):
        for start in (lambda config: Run(config, None), lambda config: dry_run(config, tmp_path)):
            with pytest.raises(ConfigError, match=match):
                start(build(distilled(values, reference, **settings)))


def test_vocabularies_must_be_equal(values, tmp_path):
    tiny_model("qwen3", vocab_size=V).save_pretrained(tmp_path / "words")
    word_tokenizer(["shows", "dial"]).save_pretrained(tmp_path / "words")
    with pytest.raises(ConfigError, match="another tokenizer than the model"):
        Run(build(distilled(values, str(tmp_path / "words"))), None)
