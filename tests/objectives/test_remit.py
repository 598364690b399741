"""ReMiT: weights of the next-token loss from a second model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.corpora import dial
from rlpretrain.objectives.remit import Config, ReMiT
from rlpretrain.training.run import Run
from rlpretrain.types import Document, Scores
from tests.builders.runs import SGD, launch, merged, one_step, same, trained, weights
from tests.builders.tiny import tiny_model

SIZES = (7, 4, 12)


@pytest.fixture(scope="module")
def other(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A second checkpoint with the vocabulary of the corpus."""
    folder = tmp_path_factory.mktemp("other")
    tiny_model("qwen3", vocab_size=len(dial.WORDS), seed=8).save_pretrained(folder)
    dial.tokenizer().save_pretrained(folder)
    return str(folder)


def remit_of(values: dict[str, Any], reference: str, *, packing: str = "tree", **settings: Any) -> dict:
    objective = {"name": "remit", **settings}
    return merged(values, objective=objective, reference=reference, packing=packing)


def weigh(reference: torch.Tensor, live: torch.Tensor, **settings: Any) -> torch.Tensor:
    """The weights of documents of `SIZES` predicted tokens."""
    objective: Any = ReMiT(Config(**settings), tokenizer=None)
    documents = [Document(str(n), tuple(range(n + 1)), "") for n in SIZES]
    empty = torch.zeros(0, 0)
    scores = Scores(empty[..., None], empty[..., None], empty, live, empty.bool(), empty.bool())
    scores = replace(scores, trunk_reference=reference, trunk_initial=live.detach())
    return objective.ntp_weights(SimpleNamespace(documents=documents), scores)


def logps(seed: int) -> torch.Tensor:
    return -torch.rand(sum(SIZES), generator=torch.Generator().manual_seed(seed)) * 6


@pytest.mark.parametrize("settings", [{}, {"scale": 3.0, "clip": 0.2}, {"against": "base", "clip": 1.0}])
def test_weights_are_the_formula_worked_token_by_token(settings):
    reference, live = logps(1), logps(2)
    got, s, e = weigh(reference, live, **settings), settings.get("scale", 1.0), settings.get("clip", 0.5)
    start = 0
    for size in SIZES:
        gaps = [float(reference[t]) - float(live[t]) for t in range(start, start + size)]
        for t, gap in enumerate(gaps):
            w = 2 / (1 + math.exp(-s * (gap - sum(gaps) / size)))
            assert float(got[start + t]) == pytest.approx(min(max(w, 1 - e), 1 + e), abs=1e-6)
        start += size


def test_rho_selects_the_largest_differences_of_each_document():
    reference, live = logps(1), logps(2)
    got = weigh(reference, live, weights="top_k", top_fraction=0.5)
    for gaps, part in zip((reference - live).split(SIZES), got.split(SIZES), strict=True):
        k = round(0.5 * len(gaps))
        chosen = set(sorted(range(len(gaps)), key=lambda t: -float(gaps[t]))[:k])
        assert {t for t in range(len(gaps)) if part[t] > 0} == chosen
        assert torch.allclose(part[part > 0], torch.tensor(len(gaps) / k))


def test_reductions():
    """What must not change the weights, and what must make them exactly those of ntp."""
    reference, live, ones = logps(1), logps(2), torch.ones(sum(SIZES))
    for settings in ({"scale": 0.0}, {"clip": 0.0}, {"weights": "top_k", "top_fraction": 1.0}):
        assert torch.equal(weigh(reference, live, **settings), ones)
    for kind in ("sigmoid", "top_k"):
        assert torch.equal(weigh(live, live, weights=kind, shuffled=True, normalise="document"), ones)
    shift = torch.cat([torch.full((n,), float(n)) for n in SIZES])
    assert torch.allclose(weigh(reference + shift, live), weigh(reference, live), atol=1e-6)
    normalised = weigh(reference, live, normalise="document")
    assert all(abs(float(part.mean()) - 1) < 1e-6 for part in normalised.split(SIZES))
    plain, shuffled = weigh(reference, live), weigh(reference, live, shuffled=True)
    assert not torch.equal(plain, shuffled)
    for a, b in zip(plain.split(SIZES), shuffled.split(SIZES), strict=True):
        assert torch.equal(a.sort().values, b.sort().values)


def test_weights_carry_no_gradient():
    """Gradient of the loss by finite differences of Σ w · −log p with w held, on a table of logits."""
    table = torch.randn(sum(SIZES), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    labels, reference = torch.arange(sum(SIZES)) % 5, logps(1).double()

    def live(logits: torch.Tensor) -> torch.Tensor:
        return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]

    logits = table.clone().requires_grad_()
    fixed = weigh(reference, live(table))
    (-weigh(reference, live(logits)) * live(logits)).sum().backward()
    step = torch.zeros_like(table)
    step[4, 2] = 1e-5
    numeric = -(fixed * (live(table + step) - live(table - step))).sum() / 2e-5
    assert logits.grad is not None and float(logits.grad[4, 2]) == pytest.approx(float(numeric), abs=1e-8)


@pytest.mark.parametrize("packing", ["tree", "padded"])
@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_equal_models_train_as_ntp_does(values, tmp_path, packing, lora):
    """Bit by bit: against base in a whole run, against live until the learner has moved."""
    common = {"policy": {"backend": "torch", "lora": lora}}
    runs = {}
    for name, steps in (("base", 3), ("live", 1)):
        plain = merged(values, objective="ntp", packing=packing, max_steps=steps, **common)
        mine = merged(
            remit_of(values, values["model"], packing=packing, against=name), max_steps=steps, **common
        )
        for kind, config in (("ntp", plain), ("remit", mine)):
            runs[kind] = trained(config, output_dir=str(tmp_path / f"{kind}-{name}"))
        assert same(runs["ntp"], runs["remit"])


def test_packing_and_micro_batches_do_not_change_the_gradient(values, other, tmp_path):
    gradients = []
    for packing, budget in (("tree", 16384), ("tree", 64), ("padded", 16384), ("padded", 64)):
        config = remit_of(values, other, packing=packing, shuffled=True)
        folder = str(tmp_path / f"{packing}-{budget}")
        gradients.append(one_step(config, token_budget=budget, output_dir=folder)[1])
    _, plain = one_step(merged(values, objective="ntp"), output_dir=str(tmp_path / "ntp"))
    assert all(same(gradients[0], gradient, within=1e-5) for gradient in gradients[1:])
    assert not same(gradients[0], plain, within=1e-4)


def test_a_resumed_run_ends_with_the_same_weights(values, other, tmp_path):
    """Over several epochs, so that caches of reference and initial model are used."""
    file = tmp_path / "eight.jsonl"
    file.write_text("".join(Path(values["data"]["path"]).read_text().splitlines(True)[:8]))
    settings = {"against": "base", "shuffled": True}
    config = merged(remit_of(values, other, **settings), data__path=str(file), max_steps=6)
    config["checkpoint"] = {"every": 3, "keep": 3}
    whole = trained(config, output_dir=str(tmp_path / "whole"))
    folder = tmp_path / "whole"
    trained(config, resume=str(folder / "checkpoint-3"), output_dir=str(folder))
    assert same(whole, weights(folder / "model"))


def test_two_ranks_train_as_one_does(values, other, tmp_path):
    run = merged(remit_of(values, other), optim=SGD)
    configs = [run | {"output_dir": str(tmp_path / name)} for name in ("one", "two")]
    one = trained(configs[0])
    launch([{"config": configs[1]}], tmp_path)
    assert same(one, weights(tmp_path / "two" / "model"), within=1e-5)


def test_it_needs_a_second_model(values):
    with pytest.raises(ConfigError, match="ReMiT needs a second model: set reference.path"):
        Run(build(merged(values, objective="remit")), None)
    with pytest.raises(ConfigError, match="clip"):
        Run(build(remit_of(values, values["model"], clip=1.5)), None)
