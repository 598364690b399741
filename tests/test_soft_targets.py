"""`soft_targets`: several tokens with probabilities in place of each document token, in every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rewards.tiled_logps import EVERY_TOKEN
from rlpretrain.config.io import build
from rlpretrain.objectives import ntp, rlp
from rlpretrain.scoring.logp_cache import LogpCache
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from rlpretrain.types import MicroBatch, Scores, SoftTargets
from tests.builders.runs import SGD, merged, one_step, same


class Smooth(rlp.RLP):
    """RLP whose next-token loss is smoothed, and that keeps what its loss was given."""

    needs = frozenset({"target", "reference", "teacher"})
    seen: list[tuple[MicroBatch, Scores]] = []
    tops: list[tuple[MicroBatch, Any]] = []

    def soft_targets(self, micro, teacher):
        own = micro.trunk_labels[:, None]
        Smooth.tops.append((micro, teacher(micro, 3, 2.0)))
        ids = torch.cat([own, torch.full_like(own, EVERY_TOKEN), torch.zeros_like(own)], 1)
        return SoftTargets(ids, torch.tensor([0.75, 0.25, 0.0]).expand(ids.shape))

    def trunk_loss(self, micro, scores):
        self.seen.append((micro, scores.detached()))
        return super().trunk_loss(micro, scores)


class Wrong(ntp.NTP):
    """Soft targets as a test sets them."""

    made: Any = None

    def soft_targets(self, micro, teacher):
        return Wrong.made(micro)


def logps_of(model: Any, document: Any, heat: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        return (model(torch.tensor([document.token_ids])).logits[0, :-1] / heat).log_softmax(-1)


@pytest.mark.parametrize("packing", ["tree", "padded"])
@pytest.mark.parametrize("budget", [16384, 60])
def test_with_thoughts_in_every_layout(values, packing, budget):
    """Against transformers' logits of each document alone; 60 tokens split groups over micro-batches."""
    Smooth.seen, Smooth.tops = [], []
    changes = {"packing": packing, "token_budget": budget, "max_steps": 1}
    run = Run(build(merged(values, objective__name=f"{__name__}:Smooth", **changes)), None)
    train(run)
    run.close()
    model = AutoModelForCausalLM.from_pretrained(values["model"])
    documents = 0
    for micro, scores in Smooth.seen:
        logps = [logps_of(model, document) for document in micro.documents]
        whole = torch.cat([*logps, torch.zeros(0, model.config.vocab_size)])
        gold = whole.gather(1, micro.trunk_labels[:, None])[:, 0]
        assert scores.soft_logps is not None and scores.trunk_reference is not None
        for ours, theirs in (
            (scores.trunk_logps, gold),
            (scores.soft_logps[:, 0], gold),
            (scores.soft_logps[:, 1], whole.mean(1)),
            (scores.soft_logps[:, 2], torch.zeros_like(gold)),  # probability 0: not read
            (scores.trunk_reference, gold),
        ):
            assert torch.allclose(ours, theirs, atol=1e-5)
        documents += len(micro.documents)
    for micro, top in Smooth.tops:
        for document, ids, logps in zip(
            micro.documents,
            top.ids.split([len(d.token_ids) - 1 for d in micro.documents]),
            top.logps.split([len(d.token_ids) - 1 for d in micro.documents]),
            strict=True,
        ):
            best = logps_of(model, document, 2.0).topk(3, dim=1)
            assert torch.allclose(logps, best.values, atol=1e-5) and torch.equal(ids, best.indices)
    assert documents == 4


def test_the_own_token_with_probability_one_is_the_next_token_loss(values, tmp_path):
    Wrong.made = lambda micro: SoftTargets(
        micro.trunk_labels[:, None], torch.ones(len(micro.trunk_labels), 1)
    )
    gradients = []
    for name in ("ntp", f"{__name__}:Wrong"):
        config = merged(values, objective=name, output_dir=str(tmp_path / name[-5:]))
        gradients.append(one_step(config)[1])
    assert same(*gradients, within=1e-6)


@pytest.mark.parametrize("stage", [0, 3])
def test_deepspeed_reads_them_too(values, tmp_path, stage):
    pytest.importorskip("deepspeed")
    Wrong.made = lambda micro: SoftTargets(
        torch.stack([micro.trunk_labels, micro.trunk_labels * 0 + 5], 1),
        torch.tensor([0.5, 0.5]).expand(len(micro.trunk_labels), 2),
    )
    ends = []
    for policy in ({"backend": "torch"}, {"backend": "deepspeed", "zero_stage": stage}):
        folder = str(tmp_path / policy["backend"])
        config = merged(
            values, objective=f"{__name__}:Wrong", policy=policy, optim=SGD, max_steps=1, output_dir=folder
        )
        run = Run(build(config), None)
        train(run)
        ends.append({name: value.detach().clone() for name, value in run.policy.weights()})
        run.close()
    assert same(*ends, within=1e-5)


@pytest.mark.parametrize(
    ("ids", "probs", "match"),
    [
        ((0, 2), (0, 2), "must be .*, K., a row for each document token"),
        ((None, 2), (None, 3), r"gave ids .* and probs .*: both must be"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(values, ids, probs, match):
    def make(micro: MicroBatch) -> SoftTargets:
        sizes = [[len(micro.trunk_labels) if n is None else n for n in shape] for shape in (ids, probs)]
        return SoftTargets(torch.zeros(sizes[0], dtype=torch.int64), torch.ones(sizes[1]))

    Wrong.made = make
    with pytest.raises(ValueError, match=match):
        one_step(merged(values, objective=f"{__name__}:Wrong"))


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_numbers_that_are_no_probabilities_are_refused(values, value):
    Wrong.made = lambda micro: SoftTargets(
        micro.trunk_labels[:, None], torch.full((len(micro.trunk_labels), 1), value)
    )
    with pytest.raises(ValueError, match="soft_targets gave probs that are negative, NaN or infinite"):
        one_step(merged(values, objective=f"{__name__}:Wrong"))


def test_the_cache_counts_all_numbers_and_reads_older_states():
    cache = LogpCache(keep=20)
    for i in range(3):
        cache.add(str(i), torch.full((2, 4), float(i)))
    assert list(cache.known) == ["1", "2"] and cache.kept == 16
    cache.add("one", torch.arange(3.0))
    other = LogpCache(keep=20)
    other.load_state_dict(cache.state_dict())
    assert all(torch.equal(cache[key], other[key]) for key in cache.known) and other.kept == cache.kept
    old = {"keys": ["a", "b"], "sizes": [1, 2], "logps": torch.arange(3.0)}
    other.load_state_dict(old)
    assert torch.equal(other["b"], torch.tensor([1.0, 2.0]))
