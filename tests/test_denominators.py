"""What a step divides by: NaN rewards that only the scores could tell, and documents that are drawn twice
(issue 15.6).
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlpretrain.config.io import build
from rlpretrain.objectives import rlp
from rlpretrain.objectives.base import Objective
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from tests.builders.runs import launch, merged, one_step, trained


def applies(thought: Any) -> bool:
    """Whether a thought's reward is a number: by chance, so that groups have any number of them, also
    none.
    """
    return bool(thought.seed % 3) and sum(thought.token_ids) % 5 not in (0, 1)


class Live(rlp.RLP):
    """RLP in which some thoughts turn out not to be judged: nobody knows before they are scored."""

    def reward(self, groups, scores):
        gain = super().reward(groups, scores)
        for b, group in enumerate(groups):
            for g, thought in enumerate(group.thoughts):
                if not applies(thought):
                    gain[b, g] = math.nan
        return gain


class Known(rlp.RLP):
    """The same thoughts left out, by a stored NaN: the denominators know it from the start."""

    async def add_rewards(self, engine, groups):
        return [
            dataclasses.replace(g, rewards=tuple(0.0 if applies(t) else math.nan for t in g.thoughts))
            for g in groups
        ]


def close(ours, theirs, rtol=1e-4, atol=2e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(
            ours[name], grad, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


def objective(owner: type[Objective]) -> dict[str, Any]:
    return {
        "name": f"tests.test_denominators:{owner.__name__}",
        "positions": "after",
        "marker": "shows",
        "target_length": 2,
    }


BASE = {"positions_per_step": 6, "loss__reader_coef": 0.5, "loss__ntp_coef": 0.7}
KINDS: dict[str, dict[str, Any]] = {
    "thought_mean": {},
    "token_mean": {
        "loss__reduction": "token_mean",
        "sampling__cut": "mask",
        "sampling__max_thought_tokens": 20,
    },
    "sum": {"loss__reduction": "sum", "sampling__cut": "penalise", "sampling__cut_penalty": 0.5},
    "parts": {"token_budget": 60, "loss__reduction": "token_mean"},
    "small": {"token_budget": 250, "packing": "padded"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_live_reward_of_nan_counts_nowhere(values, tmp_path, kind):
    """One gradient and one log, whether the NaN was stored or is found while the step is trained."""
    changes = BASE | KINDS[kind]
    live, ours = one_step(values, objective=objective(Live), output_dir=str(tmp_path / "live"), **changes)
    known, theirs = one_step(
        values, objective=objective(Known), output_dir=str(tmp_path / "known"), **changes
    )
    assert 0 < known.last["thought/uncounted_frac"] < 1
    close(ours, theirs)
    for name in (
        "loss",
        "policy_loss",
        "reward",
        "reader/loss",
        "ntp/loss",
        "ig/mean",
        "thought/uncounted_frac",
        "reward_std",
        "batch/micro_batches",
        "completions/mean_length",
    ):
        assert live.last[name] == pytest.approx(known.last[name], rel=1e-4, abs=1e-6), name


def test_a_live_reward_of_nan_counts_nowhere_in_inner_epochs(values, tmp_path):
    """Several updates: the weights after them agree."""
    changes = BASE | {"loss__inner_epochs": 3, "max_steps": 2, "loss__reduction": "token_mean"}
    live, _ = one_step(values, objective=objective(Live), output_dir=str(tmp_path / "live"), **changes)
    known, _ = one_step(values, objective=objective(Known), output_dir=str(tmp_path / "known"), **changes)
    for a, b in zip(live.policy.model.parameters(), known.policy.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_live_reward_of_nan_counts_nowhere_under_deepspeed(values, tmp_path, stage):
    """What had been gathered when the NaN turned up is dropped there, too."""
    changes = BASE | {"loss__reduction": "token_mean", "token_budget": 150, "max_steps": 2}
    known = trained(values, objective=objective(Known), output_dir=str(tmp_path / "known"), **changes)
    policy = {"backend": "deepspeed", "zero_stage": stage}
    live = trained(
        values, objective=objective(Live), output_dir=str(tmp_path / "live"), policy=policy, **changes
    )
    for name, tensor in known.items():
        torch.testing.assert_close(
            live[name], tensor, rtol=1e-4, atol=3e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_nothing_is_scored_twice_where_all_rewards_are_numbers(values):
    """The step is judged first only when a NaN turns up."""
    run = Run(build(merged(values, max_steps=1, packing="padded", token_budget=200)), None)
    seen, score = [], run.policy.score
    run.policy.score = lambda micro, *a: seen.append(micro) or score(micro, *a)
    train(run)
    run.close()
    assert len(seen) == run.last["batch/micro_batches"] > 1


@pytest.mark.parametrize("inner", [1, 2])
def test_broken_log_probs_are_no_reward_that_does_not_apply(values, inner):
    """A NaN that the model makes skips the step; it does not leave out the thought."""
    changes = {"max_steps": 2, "loss__inner_epochs": inner, "baseline__name": "none", "packing": "padded"}
    run = Run(build(merged(values, **changes)), None)
    score = run.policy.score

    def bad(micro, *args):
        scores = score(micro, *args)
        logps = scores.target_logps.clone()
        logps[0, 0] = math.nan
        return dataclasses.replace(scores, target_logps=logps)

    run.policy.score = bad
    train(run)
    run.close()
    assert run.skipped == 2


# documents that are drawn twice


def few(values: dict[str, Any], folder: Path, n: int) -> dict[str, Any]:
    """Data of n documents of different lengths."""
    texts = [json.loads(line)["text"] for line in Path(values["data"]["path"]).read_text().splitlines()]
    texts = [" ".join(texts[i : i + 1 + i % 3]) for i in range(0, 3 * n, 3)]
    (folder / "few.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"path": str(folder / "few.jsonl"), "max_length": 128, "shuffle": False}


RMT = {
    "name": "rmt",
    "template": "{context}",
    "opening": "shows",
    "closing": ".",
    "budget": 5,
    "min_entropy": 0.0,
    "curriculum_from": 0.0,
    "curriculum_to": 0.0,
    "target_length": 1,
    "positions_per_document": 2,
    "dynamic_sampling": False,
    "positions": "random",
}
TWICE: dict[str, dict[str, Any]] = {
    "rlp": {"objective": {"name": "rlp", "positions_per_document": 2}, "positions_per_step": 16},
    "rmt": {"objective": RMT, "positions_per_step": 16},
    "ntp": {"objective": "ntp", "positions_per_step": 10},
}


@pytest.mark.slow
def test_documents_drawn_twice_and_rewards_of_nan_on_two_ranks(values, tmp_path):
    """Three documents, eight draws: their next-token loss counts once for each draw, whoever drew it and
    whoever trains it.
    """
    plain = {
        "policy": {"backend": "torch"},
        "token_budget": 400,
        "optim__clip_grad_norm": 0.0,
        "max_steps": 1,
    }
    kinds = {name: plain | changes | {"data": few(values, tmp_path, 3)} for name, changes in TWICE.items()}
    kinds["padded"] = kinds["rlp"] | {"packing": "padded"}
    kinds["nan"] = plain | BASE | {"objective": objective(Live), "loss__reduction": "token_mean"}
    alone = {
        name: one_step(values, output_dir=str(tmp_path / name), **changes) for name, changes in kinds.items()
    }
    launch(
        [
            {
                "config": merged(values, output_dir=str(tmp_path / f"two {name}"), **changes),
                "gradient": str(tmp_path / f"gradient {name}"),
            }
            for name, changes in kinds.items()
        ],
        tmp_path,
    )
    for name, (_, whole) in alone.items():
        shares = [torch.load(tmp_path / f"gradient {name}-{rank}.pt")["gradient"] for rank in (0, 1)]
        close({n: shares[0][n] + shares[1][n] for n in whole}, whole, atol=1e-5)


@pytest.mark.parametrize("packing", ["tree", "padded"])
@pytest.mark.parametrize("budget", [60, 400])
def test_a_document_counts_as_often_as_it_is_drawn(values, tmp_path, packing, budget):
    run = Run(
        build(
            merged(
                values, packing=packing, token_budget=budget, data=few(values, tmp_path, 3), **TWICE["rlp"]
            )
        ),
        None,
    )
    batch = run.next_batch()
    totals = run.count(batch)
    assert [d.id for d in batch.documents] == [
        "0",
        "1",
        "2",
        "0",
        "1",
        "2",
        "0",
        "1",
    ]  # two positions for each draw
    sizes = [len(d.token_ids) - 1 for d in batch.documents]
    assert totals.trunk == sum(sizes)
    micros = run.pack(batch, totals)
    run.close()
    told = [d for m in micros for d in m.documents]
    assert sorted(d.id for d in told) == sorted(d.id for d in batch.documents)
    for micro in micros:
        labels = micro.trunk_labels.split([len(d.token_ids) - 1 for d in micro.documents])
        assert [tuple(part.tolist()) for part in labels] == [d.token_ids[1:] for d in micro.documents]


def test_next_token_prediction_on_few_documents_is_a_plain_loops(values, tmp_path):
    """Ten documents a step from three: what a data loader gives twice is trained twice."""
    run, ours = one_step(values, data=few(values, tmp_path, 3), **TWICE["ntp"])
    model = AutoModelForCausalLM.from_pretrained(values["model"])
    loss, n = 0.0, 0
    texts = [json.loads(line)["text"] for line in (tmp_path / "few.jsonl").read_text().splitlines()]
    for k in range(10):
        ids = torch.tensor([[*run.tokenizer(texts[k % 3])["input_ids"], run.tokenizer.eos_token_id]])
        loss = loss + model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)
        n += ids.shape[1] - 1
    (loss / n).backward()
    close(ours, {name: p.grad for name, p in model.named_parameters()}, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ahead", [0, 2])
def test_draws_are_told_apart_after_a_resume(values, tmp_path, ahead):
    """Spare positions keep the number of their draw."""
    changes = {
        "data": few(values, tmp_path, 1),
        "objective": {"name": "rlp", "positions_per_document": 3},
        "positions_per_step": 4,
        "max_steps": 6,
    }
    changes |= {"engine__max_staleness": ahead} if ahead else {}
    run = Run(build(merged(values, **changes)), None)
    run.next_batch()
    state = run.source.state_dict()
    later = [run.next_batch() for _ in range(3)]
    run.close()
    again = Run(build(merged(values, **changes | {"output_dir": f"{values['output_dir']}2"})), None)
    again.source.load_state_dict(state)
    found = [again.next_batch() for _ in range(3)]
    again.close()
    assert [[d.id for d in b.documents] for b in found] == [[d.id for d in b.documents] for b in later]
    assert all(len(b.documents) == 2 for b in later)  # four positions of two draws, which are of one document


def test_a_checkpoint_without_numbers_of_draws_is_read(values):
    run = Run(
        build(merged(values, objective={"name": "rlp", "positions_per_document": 3}, positions_per_step=4)),
        None,
    )
    run.next_batch()
    state = run.source.state_dict()
    old = [{k: v for k, v in row.items() if k != "draw"} for row in state["spare"]]
    names = [row["document"]["id"] for row in old]
    run.source.load_state_dict(state | {"spare": old})
    assert [p.document.id for p in run.source._spare] == names
    assert len({p.draw for p in run.source._spare}) == len(set(names)) < len(old)
    run.close()
