"""The likelihood family in the loop: its reductions to RLP, its direct term, and prompts with answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlpretrain.config import ConfigError, DataConfig
from rlpretrain.config.io import build
from rlpretrain.data.stream import DocumentStream
from rlpretrain.objectives import parse_section
from rlpretrain.training.loop import train
from rlpretrain.training.losses import target_loss
from rlpretrain.training.run import Run
from tests.builders.runs import merged, one_step
from tests.builders.tiny import word_tokenizer

SCORES = ("log_prob", "mean_log_prob", "prob", "mean_prob", "debiased_prob", "jepo", "perplexity_gain")
HERE = {"positions": "after", "marker": "shows", "target_length": 2}


def close(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(
            ours[name], grad, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("score", ["log_prob", "jepo"])
def test_log_prob_and_jepo_with_one_sample_train_like_rlp(values, tmp_path, score):
    _, rlp = one_step(values, objective={"name": "rlp", **HERE})
    extra = {"samples": 1} if score == "jepo" else {}
    _, ours = one_step(
        values,
        objective={"name": "likelihood", "score": score, **HERE, **extra},
        output_dir=str(tmp_path / "b"),
    )
    close(ours, rlp)


def test_jepos_direct_term_with_one_sample_is_that_of_log_prob(values, tmp_path):
    _, one = one_step(values, objective={"name": "likelihood", "direct": 0.7, **HERE})
    jepo = {"name": "likelihood", "score": "jepo", "samples": 1, "direct": 0.7, **HERE}
    _, two = one_step(values, objective=jepo, output_dir=str(tmp_path / "b"))
    close(two, one)
    _, reader = one_step(
        values, objective={"name": "rlp", **HERE}, loss__reader_coef=0.8, output_dir=str(tmp_path / "c")
    )
    close(one, reader)  # .7 on top of the default .1


@pytest.mark.parametrize("score", [s for s in SCORES if s != "perplexity_gain"])
def test_the_direct_term_is_the_derivative_of_the_score(values, score):
    """target_loss has minus the derivative of the mean score by every log-prob of the targets, by finite
    differences.
    """
    run = Run(
        build(
            merged(
                values,
                objective={"name": "likelihood", "score": score, "direct": 1.0, **HERE},
                loss__reader_coef=0.0,
            )
        ),
        None,
    )
    batch = run.next_batch()
    (micro,) = run.pack(batch, run.count(batch))
    scores = run.policy.score(micro).detached()
    run.close()

    def value(logps: torch.Tensor) -> torch.Tensor:
        reward = run.objective.reward(micro.groups, replace(scores, target_logps=logps)).masked_fill(
            ~micro.counted, torch.nan
        )
        if score != "jepo":
            return reward.nansum()
        kept = [r[~r.isnan()] for r in reward]
        return sum(len(r) * (r.logsumexp(0) - torch.tensor(float(len(r))).log()) for r in kept)

    leaf = scores.target_logps.double().requires_grad_()
    loss = target_loss(replace(scores, target_logps=leaf), run.objective.target_weights(micro.groups, scores))
    (ours,) = torch.autograd.grad(loss, leaf)
    for b in range(len(micro.groups)):
        for t in range(int(micro.target_mask[b].sum())):
            step = torch.zeros_like(leaf)
            step[b, 1, t] = 1e-5
            slope = (value(leaf.detach() + step) - value(leaf.detach() - step)) / 2e-5
            assert float(ours[b, 1, t]) == pytest.approx(-float(slope), rel=1e-4, abs=1e-7)
    assert float(ours.abs().max()) > 0


@pytest.mark.parametrize("score", SCORES)
def test_every_score_trains(values, score):
    direct = 0.0 if score == "perplexity_gain" else 0.5
    objective = {"name": "likelihood", "score": score, "direct": direct, "steps": True, **HERE}
    run = Run(build(merged(values, objective=objective)), None)
    train(run)
    run.close()
    assert run.last["grad_norm"] > 0 and run.step == 3


def test_a_group_that_jepo_cannot_see_whole_is_refused(values):
    spread = {"objective": {"name": "likelihood", "score": "jepo", "direct": 1.0, **HERE}, "token_budget": 40}
    run = Run(build(merged(values, **spread)), None)
    with pytest.raises(ConfigError, match=r"needs all of its thoughts at once: raise token_budget \(40\)"):
        train(run)
    run.close()
    spread |= {"objective": {"name": "likelihood", "score": "jepo", **HERE}, "output_dir": f"{run.folder}2"}
    run = Run(build(merged(values, **spread)), None)
    train(run)  # advantages are judged over whole groups
    run.close()
    assert run.has_split_groups


def test_bad_settings_are_refused(values):
    for section, said in (
        ({"score": "prop"}, "objective.score"),
        ({"direct": -1.0}, "objective.direct"),
        ({"samples": 0}, "objective.samples"),
    ):
        with pytest.raises(ConfigError, match=said):
            parse_section({"name": "likelihood", **section})
    with pytest.raises(ConfigError, match="no direct term"):
        Run(
            build(
                merged(
                    values,
                    objective={"name": "likelihood", "score": "perplexity_gain", "direct": 1.0, **HERE},
                )
            ),
            None,
        )


# prompts with answers


def questions(folder: Path) -> str:
    rows = [
        {"question": f"what is w{i}", "answer": " ".join(f"w{i}" for _ in range(i % 3 + 1))}
        for i in range(24)
    ]
    rows += [
        {"question": "blank", "answer": " "},
        {"question": " ", "answer": "w1"},
        {"question": "w " * 60, "answer": "w1"},
    ]
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "qa.jsonl")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_document_of_a_prompt_and_its_answer(tmp_path, streaming):
    tokenizer = word_tokenizer(["what", "is", "so", "w", *(f"w{i}" for i in range(24))])
    data = DataConfig(
        path=questions(tmp_path),
        column="question",
        answer_column="answer",
        answer_join=" so",
        max_length=20,
        shuffle=False,
        streaming=streaming,
        meta_columns=("answer",),
    )
    stream = DocumentStream(data, tokenizer)
    documents = stream.take(24)
    assert stream.dropped == 3 and stream.take(1)[0].id == "0"
    for i, document in enumerate(documents):
        at = document.answer_at
        assert tokenizer.decode(document.token_ids[:at]) == f"what is w{i} so"
        assert tokenizer.decode(document.token_ids[at:-1]) == document.meta["answer"]
        assert document.token_ids[-1] == tokenizer.eos_token_id


def test_thoughts_between_prompts_and_answers(values, tmp_path):
    from rlpretrain.corpora import dial

    texts = [json.loads(line)["text"] for line in Path(values["data"]["path"]).read_text().splitlines()]
    rows = [dict(zip(("question", "answer"), text.rsplit(" shows ", 1), strict=True)) for text in texts]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "path": str(tmp_path / "qa.jsonl"),
        "column": "question",
        "answer_column": "answer",
        "answer_join": " shows",
        "max_length": 64,
    }
    objective = {"name": "likelihood", "positions": "answer", "target_length": 8, "score": "mean_log_prob"}
    run = Run(build(merged(values, data=data, objective=objective)), None)
    batch = run.next_batch()
    tokenizer = dial.tokenizer()
    for group, document in zip(batch.groups, batch.documents, strict=True):
        assert tokenizer.decode(group.position.context_ids).endswith(" shows")
        assert group.position.target_ids == document.token_ids[group.position.index :][:8]
        assert (
            group.position.target_ids[-1] == tokenizer.eos_token_id
        )  # an answer ends where its document does
    train(run)
    run.close()


def test_positions_answer_need_answers(values):
    run = Run(build(merged(values, objective={"name": "likelihood", "positions": "answer"})), None)
    with pytest.raises(ConfigError, match=r"\[\d+\] has no answer; set data\.answer_column"):
        run.next_batch()
    run.close()
