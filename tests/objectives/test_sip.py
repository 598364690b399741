"""SIP: a judge chooses among continuations; DPO and the likelihood of the best as detached advantages."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlpretrain.config import ConfigError, LossConfig
from rlpretrain.config.io import build
from rlpretrain.corpora import dial, dial_judge
from rlpretrain.data.token_text import TokenReader
from rlpretrain.objectives import Setting
from rlpretrain.objectives.candidates import choose, given_thought, ids_after
from rlpretrain.objectives.sip import SIP, Config
from rlpretrain.training.advantages import Advantages
from rlpretrain.training.losses import LossInputs, Surrogate
from rlpretrain.training.run import Run
from rlpretrain.trl.reward import ObjectiveReward
from rlpretrain.types import Document, Scores
from rollout.types import FinishReason, Group, Position, Prompt, SamplingParams, Thought
from tests.builders import judges, tokenizers_family
from tests.builders.batches import logps_of
from tests.builders.runs import merged, one_step, same, trained, weights

TOKENIZER = dial.tokenizer()
LENGTHS = ((3, 7, 1), (2, 5, 8))
"""Tokens of the candidates of two prefixes."""
SCORES = ((0.5, 1.0, 0.0), (0.0, 0.5, 1.0))
"""The judge's."""


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Worked problems, some of them wrong."""
    folder = tmp_path_factory.mktemp("sip")
    dial_judge.write(folder, train=60, held_out=12)
    return folder


def sip_of(values: dict[str, Any], documents: Path, packing: str = "tree", **settings: Any) -> dict[str, Any]:
    """A small run."""
    data = {"path": str(documents / "train.jsonl"), "column": "question", "answer_column": "answer"}
    data |= {"answer_join": " ", "max_length": 48, "meta_columns": ["rewrite"]}
    objective = {"name": "sip", "positions": "answer", "target_length": 8}
    objective["judge_function"] = "tests.builders.judges:later"
    return merged(
        values,
        data=data,
        objective=objective | settings,
        packing=packing,
        sampling={"thoughts": 3, "max_thought_tokens": 8},
        loss={"ntp_coef": 0.0},
    )


def objective_of(thoughts: int = 2, progress: float = 0.0, **settings: Any) -> SIP:
    settings = {"judge_function": "tests.builders.judges:longer", "target_length": 8} | settings
    objective = SIP(Config(**settings), TOKENIZER)
    params = SamplingParams(max_thought_tokens=8)
    objective.setting = Setting(params, thoughts, 0.0, progress=progress)
    return objective


def words(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.convert_tokens_to_ids(text.split()))


class Says:
    """An engine that says the same texts after every prompt, and keeps the prompts."""

    version = 0

    def __init__(self, *texts: str):
        self.texts, self.prompts = texts, list[Prompt]()

    async def sample(self, prompts: Any, params: Any, n: int, seeds: Any) -> list[list[Thought]]:
        self.prompts += prompts
        said = [
            Thought(words(t), (-1.0,) * len(words(t)), FinishReason.LENGTH, 0, k)
            for k, t in enumerate(self.texts[:n])
        ]
        return [said for _ in prompts]


def judged(objective: SIP, engine: Any, *positions: Position) -> list[Group]:
    return asyncio.run(objective.rollout(engine, positions, range(len(positions))))


PLACE = Position("d", 3, words("ann has 6"), words("bob up3 9 ."), words("bob up3 9 cat ."))


# the losses


def tabular(loss: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[list[list[int]]]]:
    """(a table of next-token logits, its gradient by our surrogate, the reference's table, candidates)."""
    draw = torch.Generator().manual_seed(5)
    table, reference = (torch.randn(6, 6, dtype=torch.float64, generator=draw) for _ in range(2))
    table.requires_grad_()
    texts = [[torch.randint(0, 6, (n + 1,), generator=draw).tolist() for n in lengths] for lengths in LENGTHS]
    longest = max(map(max, LENGTHS))
    mask = torch.tensor([[[t < n for t in range(longest)] for n in lengths] for lengths in LENGTHS])

    def logps(logits: torch.Tensor) -> torch.Tensor:
        rows = [[text + [0] * (longest + 1 - len(text)) for text in group] for group in texts]
        ids = torch.tensor(rows)
        return logits.log_softmax(-1)[ids[..., :-1], ids[..., 1:]] * mask

    live, counted, none = logps(table), mask.any(-1), torch.zeros(2, 0)
    scores = Scores(live, torch.zeros(2, 3, 0), none, torch.zeros(0), none.bool(), counted)
    scores = replace(scores, thought_reference=logps(reference))
    micro: Any = SimpleNamespace(
        thought_mask=mask,
        token_weights=torch.ones(mask.shape),
        on_policy=False,
        behaviour_logps=torch.full(mask.shape, -9.0),  # another policy sampled them
        given=torch.tensor([[True, False, False]] * 2),
        counted=counted,
    )
    position = Position("d", 1, (0,), (0,))
    groups = [Group(str(b), position, Prompt((0,), ()), (), 0, rewards=SCORES[b]) for b in range(2)]
    objective = objective_of(loss=loss, beta=0.3)
    reward = objective.reward(groups, scores.detached()) if loss == "dpo" else torch.tensor(SCORES)
    thoughts = Advantages(reward, objective.advantage(reward, groups))
    output = Surrogate()(LossInputs(scores, micro, thoughts, objective, LossConfig()))
    assert output is not None
    (output.loss / Surrogate().count(micro)).backward()
    assert table.grad is not None
    return table, table.grad, reference, texts


def log_prob(logits: torch.Tensor, text: list[int]) -> torch.Tensor:
    """Of the tokens after the first, one by one."""
    pairs = zip(text, text[1:], strict=False)
    return torch.stack([logits[a].log_softmax(-1)[b] for a, b in pairs]).sum()


@pytest.mark.parametrize("loss", ["dpo", "rf_nll"])
def test_the_gradient_is_that_of_the_loss_itself(loss):
    """Golden: candidates of unequal lengths on a table, sampled by another policy, against autograd."""
    table, gradient, reference, texts = tabular(loss)
    logits, total = table.detach().clone().requires_grad_(), torch.zeros(())
    for own, scores in zip(texts, SCORES, strict=True):
        best, worst = own[int(np.argmax(scores))], own[int(np.argmin(scores))]
        if loss == "rf_nll":
            total = total - log_prob(logits, best)
            continue
        ratio = [log_prob(logits, text) - log_prob(reference, text) for text in (best, worst)]
        total = total - torch.nn.functional.logsigmoid(0.3 * (ratio[0] - ratio[1]))
    (total / 2).backward()
    assert logits.grad is not None and float((gradient - logits.grad).abs().max()) < 1e-12
    assert float(gradient.abs().max()) > 0.01


@pytest.mark.parametrize("packing", ["tree", "padded"])
def test_a_run_has_the_gradient_of_dpo_on_its_model(values, documents, tmp_path, packing):
    """With rows of several documents, and where a group is split over micro-batches."""
    config, kept = sip_of(values, documents, packing, candidates=["suffix", "rewrite", "rollouts"]), []
    config["objective"]["rewrite_column"] = "rewrite"

    def spy(run: Run) -> None:
        select = run.objective.select
        run.objective.select = lambda groups: kept.extend(select(groups)) or kept

    _, gradient = one_step(config, spy)
    model = AutoModelForCausalLM.from_pretrained(config["model"])
    total = torch.zeros(())
    for group in kept:
        best, worst = (
            logps_of(model, (*group.prompt.token_ids, *thought.token_ids))[
                len(group.prompt.token_ids) - 1 :
            ].sum()
            for thought in group.thoughts
        )
        # at the first step the reference is the model: z is 0, its derivative is not
        z = 0.1 * ((best - best.detach()) - (worst - worst.detach()))
        total = total - torch.nn.functional.logsigmoid(z) / len(kept)
    total.backward()
    own = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(kept) == 4 and all(group.rewards[0] > group.rewards[1] for group in kept)
    assert same(gradient, {n: own[n] for n in gradient}, within=1e-6)
    kept.clear()
    split, again = one_step(config, spy, token_budget=30, output_dir=str(tmp_path / "split"))
    assert same(gradient, again, within=1e-6) and split.step == 1


def test_the_suffix_alone_is_next_token_prediction_on_it(values, documents):
    config, kept = sip_of(values, documents, loss="rf_nll", candidates="suffix", judge_function=None), []

    def spy(run: Run) -> None:
        select = run.objective.select
        run.objective.select = lambda groups: kept.extend(select(groups)) or kept

    run, gradient = one_step(config, spy)
    model = AutoModelForCausalLM.from_pretrained(config["model"])
    for group in kept:
        ids, start = (*group.position.context_ids, *group.position.target_ids), group.position.index
        (-logps_of(model, ids)[start - 1 :].sum() / len(kept)).backward()
    own = {n: p.grad for n, p in model.named_parameters()}
    assert same(gradient, {n: own[n] for n in gradient}, within=1e-6)
    assert run.last["objective/judge_asked"] == 0 and run.last["objective/chosen_suffix"] == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"judge_function": "tests.builders.judges:first"},  # prefers a place: ties only
        {"judge_function": "tests.builders.judges:broken"},
        {"judge_function": "tests.builders.judges:first", "loss": "rf_nll"},
        {"beta": 0.0},
    ],
)
def test_without_a_preference_there_is_no_update(values, documents, settings):
    run, gradient = one_step(sip_of(values, documents, **settings), lambda run: None)
    assert not any(bool(g.any()) for g in gradient.values())
    if "beta" not in settings:
        assert run.last["objective/ties"] == 1 and run.last["batch/dropped_frac"] == 1
        assert "reward" not in run.last or settings.get("loss")  # the judge's numbers are not r


def test_candidates_of_one_text_are_one_candidate_for_the_likelihood():
    """A rewrite that copies a good suffix is no preference, and no reason to leave the suffix out."""
    same = Group("g", PLACE, Prompt((1,), ()), (given_thought((1, 2), 0),) * 2, 0, rewards=(0.5, 0.5))
    assert choose(same, only_best=True) == (0,) and choose(same, only_best=False) is None
    other = replace(same, thoughts=(given_thought((1, 2), 0), given_thought((1, 3), 0)))
    assert choose(other, only_best=True) is None
    assert choose(replace(other, rewards=(0.0, 1.0)), only_best=True) == (1,)
    assert choose(replace(other, rewards=(0.0, 1.0)), only_best=False) == (1, 0)


def test_a_rewrite_does_not_begin_with_a_space_of_the_tokenizer():
    """A tokenizer of the Llama 2 kind begins every text with a space of its own."""
    tokenizer = tokenizers_family.make("sentencepiece_legacy")
    reader = TokenReader(tokenizer)
    before = tokenizer("so ", add_special_tokens=False)["input_ids"]
    ids = ids_after(before, "6 sheep", tokenizer, reader)
    own = tokenizer("6 sheep", add_special_tokens=False)["input_ids"]
    wanted = reader.text(before) + "6 sheep"
    assert reader.text([*before, *ids]) == wanted != reader.text([*before, *own])


# candidates and the judge


def test_rollouts_are_whole_and_given_candidates_are_marked():
    objective = objective_of(candidates=["suffix", "rewrite", "rollouts"])
    engine = Says("bob up3 9 cat up1 8 .", "bob")
    (group,) = judged(objective, engine, PLACE)
    assert group.extra["kinds"] == ["suffix", "rewrite", "rollouts", "rollouts"]
    assert [thought.given for thought in group.thoughts] == [True, True, False, False]
    assert all(thought.finish_reason is FinishReason.CLOSE for thought in group.thoughts)
    assert group.rewards == pytest.approx((1 / 3, 2 / 3, 1, 0))  # by length
    (kept,) = objective.select([group])
    assert [len(thought.token_ids) for thought in kept.thoughts] == [7, 1]
    assert kept.extra["kinds"] == ["rollouts", "rollouts"] and kept.rewards == (1, 0)
    assert objective.select([kept]) == [kept]
    engine_prompts = {prompt.token_ids for prompt in engine.prompts}
    assert engine_prompts == {PLACE.context_ids}  # neither suffix nor rewrite is in a prompt


def test_notes_count_what_was_asked_and_chosen():
    objective = objective_of()
    judged_groups = judged(objective, Says("bob up3 9 cat up1 8 .", "bob"), PLACE)
    objective.select(judged_groups)
    notes = objective.notes()
    assert notes["objective/judge_asked"] == 6 and notes["objective/judge_cached"] == 0
    assert notes["objective/judge_rollouts"] == 0.5 and notes["objective/judge_suffix"] == 0.5
    assert notes["objective/chosen_length"] == 7 and notes["objective/rejected_length"] == 1
    assert notes["objective/chosen_rollouts"] == 1 and notes["objective/chosen_suffix"] == 0
    assert notes["objective/judge_length_corr"] > 0.9  # it likes long texts
    assert objective.notes()["objective/judge_asked"] == 0
    pivot = objective_of(judge="pivot")
    judged(pivot, Says("bob up3 9 cat up1 8 .", "bob"), PLACE)
    assert pivot.notes()["objective/judge_asked"] == 4


def test_a_step_in_which_most_prefixes_tie_can_be_left_out():
    for share, kept in ((0.5, 1), (0.51, 0)):
        objective = objective_of(min_preferred=share)
        (group,) = judged(objective, Says("bob up3", "bob"), PLACE)
        tie = replace(group, id="tie", rewards=(0.5, 0.5, 0.5))
        assert len(objective.select([group, tie])) == kept
        assert objective.notes()["objective/ties"] == 0.5


def test_aborted_rollouts_and_ties_for_the_best():
    objective = objective_of(loss="rf_nll", thoughts=3)
    (group,) = judged(objective, Says("bob up3 9 cat", "bob up1 9 .", "bob"), PLACE)
    assert group.rewards == pytest.approx((2 / 3, 2 / 3, 2 / 3, 0))
    assert objective.select([group])[0].extra["kinds"] == ["suffix"]  # the first of equals
    broken = replace(group.thoughts[1], finish_reason=FinishReason.ABORT)
    engine = Says("bob")
    engine.sample = lambda *_: _async([[broken]])  # type: ignore[method-assign]
    (group,) = judged(objective, engine, PLACE)
    assert math.isnan(group.rewards[1]) and objective.select([group])[0].extra["kinds"] == ["suffix"]


async def _async(value: Any) -> Any:
    return value


def test_rollouts_begin_at_a_share_of_the_run():
    settings = {"candidates": ["suffix", "rewrite", "rollouts"], "rollouts_from": 0.5}
    engine = Says("bob", "cat")
    (early,) = judged(objective_of(progress=0.49, **settings), engine, PLACE)
    assert early.extra["kinds"] == ["suffix", "rewrite"] and not engine.prompts
    (late,) = judged(objective_of(progress=0.5, **settings), engine, PLACE)
    assert len(late.thoughts) == 4 and early.id == late.id


def test_texts_of_candidates_are_data_for_the_judge():
    """What a rollout says stays in its string, and special tokens are left out."""
    judges.ASKED.clear()
    place = replace(PLACE, target_ids=(*words("bob up3 9 ."), TOKENIZER.eos_token_id))
    judged(objective_of(thoughts=1), Says("so so so so so"), place)
    assert {each["context"] for each in judges.ASKED} == {"ann has 6"}
    said = {each["first"].strip() for each in judges.ASKED}
    assert said == {"bob up3 9 .", "so so so so so"}


def test_rewrites_are_continuations_of_the_prefix():
    objective = objective_of(candidates=["suffix", "rewrite"], positions="answer", rewrite_column="better")
    ids = (*words("ann has 6 bob up3 . so 6"), TOKENIZER.eos_token_id)
    document = Document("d", ids, "", {"better": "6 bob up3 9 ."}, answer_at=7)
    rng = np.random.default_rng(0)
    (place,) = objective.positions(document, rng)
    assert place.suffix_ids == (*words("6 bob up3 9 ."), TOKENIZER.eos_token_id)
    (none,) = objective.positions(replace(document, meta={"better": None}), rng)
    assert none.suffix_ids == ()


# runs


def test_a_resumed_run_ends_with_the_same_weights(values, documents, tmp_path):
    """The reference of the rest of the run is the model at its start."""
    config = sip_of(values, documents, candidates=["suffix", "rewrite", "rollouts"], rewrite_column="rewrite")
    config |= {"checkpoint": {"every": 2, "keep": 3}, "max_steps": 4}
    whole = trained(config, output_dir=str(tmp_path / "whole"))
    trained(config, resume=str(tmp_path / "whole" / "checkpoint-2"), output_dir=str(tmp_path / "whole"))
    assert same(whole, weights(tmp_path / "whole" / "model"))


def test_stored_rollouts_keep_candidates_and_scores(values, documents, tmp_path):
    """A replay asks no judge, and may use another loss."""
    config = sip_of(values, documents) | {"max_steps": 2}
    stored = trained(config, output_dir=str(tmp_path / "stored"), save_rollouts=True)
    replay = {"replay": str(tmp_path / "stored"), "objective__judge_function": "tests.builders.judges:broken"}
    assert same(stored, trained(config, output_dir=str(tmp_path / "again"), **replay))
    nll = trained(config, output_dir=str(tmp_path / "nll"), objective__loss="rf_nll", **replay)
    assert not same(stored, nll)


def test_adapters_train_against_the_model_without_them(values, documents, tmp_path):
    config = sip_of(values, documents) | {"policy": {"backend": "torch", "lora": {"r": 4}}, "max_steps": 2}
    before = AutoModelForCausalLM.from_pretrained(config["model"])
    after = trained(config, output_dir=str(tmp_path / "lora"))
    assert not same(dict(before.named_parameters()), after)


@pytest.mark.parametrize(
    ("settings", "other", "message"),
    [
        ({}, {"sampling__temperature": 0.7}, "sampling.temperature is 0.7"),
        ({}, {"loss__inner_epochs": 2}, "loss.inner_epochs is 2"),
        ({}, {"loss__reduction": "thought_mean"}, "loss.reduction thought_mean"),
        (
            {},
            {"sampling__max_thought_tokens": 9},
            "max_thought_tokens is 9, but objective.target_length is 8",
        ),
        ({"candidates": ["suffix"]}, {}, "objective.candidates has only one candidate"),
        ({"candidates": ["suffix", "suffix"]}, {}, "objective.candidates: .* each once"),
        ({"candidates": ["suffix", "prefix"]}, {}, "objective.candidates"),
        ({"judge_function": None}, {}, "objective.judge_url or objective.judge_function"),
        ({"candidates": ["suffix", "rewrite"]}, {}, "set objective.rewrite_column"),
        ({"rewrite_column": "rewrite"}, {}, "objective.rewrite_column is set"),
        (
            {"candidates": ["suffix", "rewrite"], "rewrite_column": "better"},
            {},
            "data.meta_columns lacks objective.rewrite_column 'better'",
        ),
        (
            {"candidates": ["suffix", "rewrite"], "rewrite_column": "rewrite", "positions": "random"},
            {},
            "objective.positions must be answer",
        ),
        ({"template": "rlp"}, {}, "objective.template"),
        ({"rollouts_from": 0.5}, {}, "objective.rollouts_from is 0.5, and before it .* has 1 of the 2"),
        ({"beta": -0.1}, {}, "beta"),
    ],
)
def test_settings_that_do_not_fit_are_refused(values, documents, settings, other, message):
    with pytest.raises(ConfigError, match=message):
        Run(build(merged(sip_of(values, documents, **settings), **other)), None)


def test_it_is_no_reward_for_trl():
    with pytest.raises(ConfigError, match="objective sip trains on texts of its choice"):
        ObjectiveReward(name="sip", loss="rf_nll", judge_function="tests.builders.judges:longer")


def test_the_oracle_of_the_dial_corpus():
    context, right = "ann has 6 bob up3 cat times3 . so", "6 bob up3 9 cat times3 7 ."
    assert dial_judge.quality(context, right) == 1 and dial_judge.quality("the old boat", right) == 0
    assert dial_judge.quality(context, "6 bob up3 8 cat times3 4 .") == 3 / 8
    assert dial_judge.quality(context, right + " .") == 8 / 9
    objective = objective_of(judge_function="rlpretrain.corpora.dial_judge:exact", target_length=16)
    position = Position("d", 9, words(context), words(right))
    (group,) = judged(objective, Says("6 bob up3 8 cat times3 4 .", "so so"), position)
    assert group.rewards == (1, 0.5, 0)
    questions = [f'x\n\n{{"context": "{context}", "candidate": "{right}{" ." * n}"}}\n' for n in range(400)]
    exact = asyncio.run(dial_judge.exact(questions))
    for judge, share in ((dial_judge.flips_10, 0.1), (dial_judge.flips_30, 0.3), (dial_judge.chance, 0.5)):
        replies = asyncio.run(judge(questions))
        flipped = np.mean([a != b for a, b in zip(exact, replies, strict=True)])
        assert abs(flipped - share) < 0.08 and replies == asyncio.run(judge(questions))
