"""Shares that follow losses: the formula, runs, ranks, resume, hooks of a user, learnt edges, bad input."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlpretrain import Pretrainer
from rlpretrain.config import ConfigError, DataConfig
from rlpretrain.config.io import build, parse
from rlpretrain.data.mixing import check_shares, make_hook, raise_to_floor
from rlpretrain.experiments.experiment import overlay
from rlpretrain.tools.dry_run import dry_run
from rlpretrain.training.run import Run
from tests.builders.mixing import SKILLS, drawn, mixed, rows_of, sources_of
from tests.builders.runs import launch, merged, same, trained, weights

EDGES = {"a": {"a": 1.0, "b": 0.5}, "b": {"c": 0.25}, "c": {"a": 0.1}}
FULL = {"a": [1.0, 0.5, 0.0], "b": [0.0, 1.0, 0.25], "c": [0.1, 0.0, 1.0]}
"""The same matrix with 1 for what is not named on the diagonal, 0 elsewhere; columns a, b, c."""


def hook_of(mixing: Any, names: str = "abc") -> Any:
    sources = {name: {"path": "x", "weight": 2.0} for name in names}
    return make_hook(parse(DataConfig, {"sources": sources, "mixing": mixing}, "data"))


# The formula


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.floats(0, 9), min_size=3, max_size=3), min_size=1, max_size=6), st.floats(0, 3))
def test_skill_it_is_its_formula(course, eta):
    """Algorithm 1 written out with sums of Python floats, for every update of a course of losses."""
    hook = hook_of({"name": "skill_it", "edges": EDGES, "window": 2, "eta": eta})
    for t, losses in enumerate(course):
        shares = hook(0.5, dict(zip("abc", losses, strict=True)))
        exponents = {}
        for i in "abc":
            terms = [FULL[i][j] * course[tau][j] for tau in range(max(0, t - 1), t + 1) for j in range(3)]
            exponents[i] = math.exp(eta * math.fsum(terms))
        for i in "abc":
            assert shares[i] == pytest.approx(exponents[i] / sum(exponents.values()), rel=1e-9)


def test_skill_it_at_its_limits():
    """No step gives equal shares; constant losses those of A·1; targets select columns; large losses hold."""
    losses = {"a": 1.0, "b": 5.0, "c": 2.0}
    assert hook_of({"name": "skill_it", "edges": EDGES, "eta": 0})(0, losses) == pytest.approx(
        hook_of("stratified")(0, losses) | dict.fromkeys("abc", 1 / 3)
    )
    constant = hook_of({"name": "skill_it", "edges": EDGES, "eta": 0.5})(0, dict.fromkeys("abc", 2.0))
    weight = {i: math.exp(0.5 * 2.0 * sum(FULL[i])) for i in "abc"}
    assert constant == pytest.approx({i: weight[i] / sum(weight.values()) for i in "abc"})
    only_c = hook_of({"name": "skill_it", "edges": EDGES, "eta": 0.5, "targets": ["c"]})(0, losses)
    assert only_c["b"] / only_c["a"] == pytest.approx(math.exp(0.5 * 0.25 * 2.0))
    assert hook_of({"name": "skill_it", "edges": {}, "eta": 9})(0, {"a": 1e4, "b": 1.0, "c": 0.0})["a"] == 1.0


def test_the_order_of_sources_does_not_matter():
    mixing = {"name": "skill_it", "edges": EDGES}
    losses = {"a": 0.3, "b": 1.7, "c": 2.9}
    assert hook_of(mixing, "abc")(0, losses) == hook_of(mixing, "cab")(0, losses)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6).filter(lambda v: sum(v) > 1e-6), st.floats(0, 0.16))
def test_the_floor_is_kept_and_changes_only_what_it_must(given, floor):
    shares = {f"s{k}": value / sum(given) for k, value in enumerate(given)}
    raised = raise_to_floor(shares, floor)
    assert sum(raised.values()) == pytest.approx(1)
    assert min(raised.values()) >= floor * (1 - 1e-12)
    if min(shares.values()) >= floor:
        assert raised == pytest.approx(shares)
    above = [name for name in shares if raised[name] > floor * (1 + 1e-9)]
    for name in above:  # in proportion among those above
        assert raised[name] * shares[above[0]] == pytest.approx(raised[above[0]] * shares[name])


# Runs


def expected_shares(rows: list[dict[str, float]], losses: list[dict[str, float]]) -> list[float]:
    """The weight of `think` in each step, by the ramp and then by the formula from the losses of updates."""
    expected = []
    for step in range(len(rows)):
        updates = losses[: step // 2]
        if not updates:
            progress = step / len(rows)
            think, read = 1 - 0.8 * progress, 0.1 + 0.9 * progress
        else:
            total = {name: sum(update[name] for update in updates[-2:]) for name in ("think", "read")}
            think = math.exp(1.5 * (total["think"] + 0.3 * total["read"]))
            read = math.exp(1.5 * total["read"])
        share = think / (think + read)
        expected.append(min(0.99, max(0.01, share)) if updates else share)
    return expected


@pytest.mark.parametrize("held_out", [True, False])
def test_a_run_draws_by_its_losses(values, corpus, held_out):
    """The logged weights against the formula, from the logged losses; the drawn documents against both."""
    trained(mixed(values, corpus, held_out, objective="ntp", positions_per_step=40))
    folder = values["output_dir"]
    rows = rows_of(folder)
    if held_out:
        losses = [{n: row[f"eval/{n}/no_think_loss"] for n in ("think", "read")} for row in rows[1::2]]
    else:
        pairs = zip(rows[::2], rows[1::2], strict=True)
        losses = [
            {n: (one[f"source/{n}/loss"] + two[f"source/{n}/loss"]) / 2 for n in ("think", "read")}
            for one, two in pairs
        ]
    expected = expected_shares(rows, losses)
    for row, share in zip(rows, expected, strict=True):
        assert row["source/think/weight"] == pytest.approx(share, rel=1e-9)
        assert row["source/read/weight"] == pytest.approx(1 - share, rel=1e-9)
    assert len({round(share, 6) for share in expected}) >= 5  # the ramp, then other shares at each update
    tokens = [row["source/think/tokens"] for row in rows]
    everything = [tokens[k] + row["source/read/tokens"] for k, row in enumerate(rows)]
    for k in range(1, len(rows)):
        share = (tokens[k] - tokens[k - 1]) / (everything[k] - everything[k - 1])
        assert share == pytest.approx(expected[k], abs=0.12)


@pytest.mark.parametrize(("objective", "held_out"), [("rlp", True), ("ntp", False)])
def test_a_run_resumes_bit_identically_between_updates(values, corpus, tmp_path, objective, held_out):
    """On the ramp, with a half-filled window and losses since the last update; the average too."""
    objective = values["objective"] if objective == "rlp" else "ntp"
    run = mixed(values, corpus, held_out, objective=objective)
    trained(run, output_dir=str(tmp_path / "whole"))
    part = Path(shutil.copytree(tmp_path / "whole", tmp_path / "part"))
    for checkpoint in part.glob("checkpoint-*"):
        if checkpoint.name != "checkpoint-3":
            shutil.rmtree(checkpoint)
    again = trained(run, resume="auto", output_dir=str(part))
    assert same(weights(tmp_path / "whole" / "model"), again)
    assert same(weights(tmp_path / "whole" / "averaged"), weights(part / "averaged"))
    assert drawn(tmp_path / "whole") == drawn(part)
    names = [name for name in rows_of(part)[-1] if name.startswith("source/")]
    for ours, theirs in zip(rows_of(part), rows_of(tmp_path / "whole"), strict=True):
        assert [ours.get(name) for name in names] == [theirs.get(name) for name in names]


def test_the_checkpoint_of_the_best_evaluation_has_the_new_shares(values, corpus, tmp_path):
    """It is written in a step in which the shares change too."""
    run = mixed(values, corpus, objective="ntp", checkpoint={"every": 100, "keep": 9}, max_steps=5)
    trained(run, output_dir=str(tmp_path / "whole"))
    (tmp_path / "part").mkdir()
    assert (tmp_path / "whole" / "checkpoint-4").is_dir(), (
        "the loss falls, so the last evaluation is the best"
    )
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "part" / "checkpoint-4")
    again = trained(run, resume="auto", output_dir=str(tmp_path / "part"))
    assert same(weights(tmp_path / "whole" / "model"), again)


@pytest.mark.slow
def test_two_ranks_mix_like_one_and_resume(values, corpus, tmp_path):
    """In every step the same documents as one rank, by the same shares; bit-identical after a resume."""
    runs = {"rlp": mixed(values, corpus), "ntp": mixed(values, corpus, held_out=False, objective="ntp")}
    first = {name: merged(run, output_dir=str(tmp_path / name)) for name, run in runs.items()}
    again = {name: merged(run, output_dir=str(tmp_path / f"{name} again")) for name, run in runs.items()}
    launch([{"config": run} for run in first.values()], tmp_path)
    for name in runs:
        part = Path(shutil.copytree(tmp_path / name, tmp_path / f"{name} again"))
        for step in (6, 8):
            shutil.rmtree(part / f"checkpoint-{step}")
    launch([{"config": run, "resume": "auto"} for run in again.values()], tmp_path)
    for name, run in runs.items():
        trained(run, output_dir=str(tmp_path / f"{name} alone"))
        two, part, one = tmp_path / name, tmp_path / f"{name} again", tmp_path / f"{name} alone"
        assert same(weights(two / "model"), weights(part / "model"))
        assert same(weights(two / "averaged"), weights(part / "averaged"))
        assert drawn(two, 2) == drawn(part, 2)
        assert [sorted(ids) for ids in drawn(two, 2)] == [sorted(ids) for ids in drawn(one)]
        for ours, theirs in zip(rows_of(two), rows_of(one), strict=True):
            assert ours["source/read/weight"] == pytest.approx(theirs["source/read/weight"], rel=1e-4)


def test_batches_that_were_drawn_ahead_are_logged_with_their_own_shares(values, corpus, tmp_path):
    """With two batches ahead an update shows two steps late, in the documents and the log; resumed too."""
    run = mixed(values, corpus, positions_per_step=16, max_steps=8, engine={"max_staleness": 2})
    data = run["data"] | {"mixing": {"name": "stratified", "every": 3}}
    data["sources"] = sources_of(corpus, think=1.0, read=0.25)
    run = merged(run, data=data, eval={"data": None}, checkpoint={"every": 4, "keep": 9})
    trained(run, output_dir=str(tmp_path / "whole"))
    rows = rows_of(tmp_path / "whole")
    assert [row["source/think/weight"] for row in rows] == [0.8] * 5 + [0.5] * 3
    read = [sum(id_.startswith("read") for id_ in step) for step in drawn(tmp_path / "whole")]
    assert max(read[:5]) < min(read[5:])
    part = Path(shutil.copytree(tmp_path / "whole", tmp_path / "part"))
    shutil.rmtree(part / "checkpoint-8")
    trained(run, resume=str(part / "checkpoint-4"), output_dir=str(part))
    assert drawn(tmp_path / "whole") == drawn(part)
    assert [row["source/think/weight"] for row in rows_of(part)] == [0.8] * 5 + [0.5] * 3


def test_the_draws_of_a_source_stay_its_own(values, corpus, tmp_path):
    """Each source gives the first documents of its order, as without mixing; only more or fewer of them."""
    run = mixed(values, corpus, objective="ntp", positions_per_step=16)
    trained(run, output_dir=str(tmp_path / "mixed"))
    data = {key: value for key, value in run["data"].items() if key != "mixing"}
    trained(run, data=data, output_dir=str(tmp_path / "static"))
    differences = []
    for source in ("think", "read"):
        ours, theirs = (
            {id_ for step in drawn(tmp_path / kind) for id_ in step if id_.startswith(source)}
            for kind in ("mixed", "static")
        )
        assert ours <= theirs or theirs <= ours
        differences.append(len(ours) - len(theirs))
    assert differences[0] * differences[1] < 0  # one source gave more, the other less


def test_stratified_changes_to_equal_shares_at_the_same_clock(values, corpus):
    run = mixed(values, corpus, objective="ntp", max_steps=5)
    trained(run, data=run["data"] | {"mixing": {"name": "stratified", "every": 2}})
    shares = [row["source/think/weight"] for row in rows_of(values["output_dir"])]
    assert shares[0] != 0.5 and shares[2:] == [0.5] * 3


def test_of_prompts_with_answers_the_held_out_loss_of_the_answers_counts(values, corpus, tmp_path):
    """The logged loss against a plain forward of the saved model, and the last shares against the formula."""

    def split(name: str) -> str:
        rows = [json.loads(line) for line in (corpus / f"{name}.jsonl").read_text().splitlines()[:20]]
        cut = [row["text"].rpartition(" shows ") for row in rows]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(json.dumps({"q": q + " shows", "a": a}) for q, _, a in cut))
        return str(file)

    fields = {"column": "q", "answer_column": "a", "answer_join": " ", "max_length": 64}
    sources = {"asked": {"path": split("train"), **fields}, "read": {"path": str(corpus / "base.jsonl")}}
    held_out = {"asked": split("held_out"), "read": str(corpus / "held_out.jsonl")}
    rule = {"name": "skill_it", "edges": {}, "eta": 1.0, "every": 2, "floor": 0.0}
    changes = {"data": {"sources": sources, "mixing": rule, "max_length": 64}, "objective": "sft_mixed"}
    run = merged(values, **changes, max_steps=3, eval={"data": held_out, "every": 1, "documents": 20})
    trained(run)
    rows = rows_of(values["output_dir"])
    assert "eval/read/answer_loss" not in rows[-1]
    losses = [rows[1]["eval/asked/answer_loss"], rows[1]["eval/read/no_think_loss"]]
    assert rows[2]["source/asked/weight"] == pytest.approx(1 / (1 + math.exp(losses[1] - losses[0])))

    folder = Path(values["output_dir"]) / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = []
    for line in Path(held_out["asked"]).read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["q"], return_tensors="pt").input_ids
        ids = tokenizer(f"{row['q']} {row['a']} {tokenizer.eos_token}", return_tensors="pt").input_ids
        labels = torch.where(torch.arange(ids.shape[1]) < prompt.shape[1], -100, ids)
        found.append(model(input_ids=ids, labels=labels).loss.item())
    assert rows[-1]["eval/asked/answer_loss"] == pytest.approx(sum(found) / len(found), rel=1e-5)


# Hooks of a user


@pytest.fixture
def my_mix(monkeypatch) -> ModuleType:
    """A module of a user with a function and a class."""
    module = ModuleType("my_mix")

    class Turns:
        """All to one source after another; it counts its calls."""

        def __init__(self, weights: dict[str, float], first: int = 0):
            self.names, self.calls = sorted(weights), first

        def __call__(self, progress: float, losses: dict[str, float]) -> dict[str, float]:
            self.calls += 1
            return {name: float(k == self.calls % 2) for k, name in enumerate(self.names)}

        def state_dict(self) -> dict[str, Any]:
            return {"calls": self.calls}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.calls = state["calls"]

    seen: list[tuple[float, dict[str, float]]] = []

    def shares(progress: float, losses: dict[str, float], think: float = 1.0) -> dict[str, float]:
        seen.append((progress, losses))
        return {"think": think, "read": 1.0}

    def bad(progress: float, losses: dict[str, float], given: Any = None) -> Any:
        return given

    for name, value in {"Turns": Turns, "shares": shares, "bad": bad, "seen": seen, "number": 3}.items():
        setattr(module, name, value)
    module.one_argument = lambda progress: {}
    monkeypatch.setitem(__import__("sys").modules, "my_mix", module)
    return module


def with_hook(values: dict[str, Any], corpus: Path, **changes: Any) -> dict[str, Any]:
    mixing = {"every": 2, "floor": 0.0} | changes.pop("mixing")
    run = mixed(values, corpus, **{"objective": "ntp", "max_steps": 6} | changes)
    return merged(run, data=run["data"] | {"mixing": mixing})


def test_a_function_of_a_user_decides(values, corpus, my_mix):
    mixing = {"name": "my_mix:shares", "options": {"think": 3}, "floor": 0.3}
    trained(with_hook(values, corpus, mixing=mixing))
    rows = rows_of(values["output_dir"])
    assert [row["source/read/weight"] for row in rows[2:]] == pytest.approx(
        [0.3] * 4
    )  # 1/4 is below the floor
    assert [progress for progress, _ in my_mix.seen] == pytest.approx([2 / 6, 4 / 6, 1])
    assert my_mix.seen[0][1] == {n: rows[1][f"eval/{n}/no_think_loss"] for n in ("think", "read")}


def test_the_state_of_a_class_is_kept(values, corpus, my_mix, tmp_path):
    run = with_hook(values, corpus, mixing={"name": "my_mix:Turns", "options": {"first": 5}})
    trained(run)
    shares = [row["source/think/weight"] for row in rows_of(values["output_dir"])]
    assert shares[2:] == [0.0, 0.0, 1.0, 1.0]  # 6 calls, 7 calls
    part = Path(shutil.copytree(values["output_dir"], tmp_path / "part"))
    shutil.rmtree(part / "checkpoint-6")
    trained(run, resume="auto", output_dir=str(part))
    assert [row["source/think/weight"] for row in rows_of(part)] == shares


GIVEN = {
    "returned a NoneType, not {source: share}": None,
    "returned no share of read: every source needs one": {"think": 1.0},
    "returned a share of more: the sources are": {"think": 1.0, "read": 1.0, "more": 0.1},
    "returned -0.5 for 'read': expected a finite number": {"think": 1.0, "read": -0.5},
    "returned nan for 'think'": {"think": math.nan, "read": 1.0},
    "returned inf for 'think'": {"think": math.inf, "read": 1.0},
    "returned 'much' for 'read'": {"think": 1.0, "read": "much"},
    "returned shares that sum to 0.0": {"think": 0.0, "read": 0},
}


@pytest.mark.parametrize("message", GIVEN)
def test_what_is_no_share_is_refused(message):
    with pytest.raises(ConfigError) as error:
        check_shares(GIVEN[message], ["read", "think"], "data.mixing: 'my_mix:bad' at step 4")
    assert str(error.value).startswith(f"data.mixing: 'my_mix:bad' at step 4 {message}")


def test_an_objective_with_thoughts_needs_a_share_to_think_in(values, corpus, my_mix):
    mixing = {"name": "my_mix:bad", "options": {"given": {"think": 0, "read": 1}}}
    run = with_hook(values, corpus, mixing=mixing, objective=values["objective"])
    with pytest.raises(ConfigError, match="at step 2 left no share for the sources with use: think"):
        trained(run)


def test_without_a_loss_the_shares_stay(values, corpus, capsys):
    """A source that no step has drawn has no training loss; the run says so and goes on."""
    run = mixed(values, corpus, held_out=False, objective="ntp", max_steps=4, console=True)
    data = run["data"] | {"sources": sources_of(corpus, read=[[0, 0.0], [0.9, 0.0], [1, 1.0]])}
    trained(run, data=data)
    assert "step 2: the shares stay: no finite loss of read is known" in capsys.readouterr().out
    assert [row["source/think/weight"] for row in rows_of(values["output_dir"])] == [1.0] * 4


def test_a_loss_that_leaves_out_documents_does_not_count(values, corpus):
    """Means are over finite numbers only. A model with NaN somewhere decides nothing, as in evaluations."""
    run = Run(build(mixed(values, corpus, objective="ntp")), None)
    row = {"eval/think/no_think_loss": 1.0, "eval/read/no_think_loss": 2.0, "eval/read/not_finite": 0.1}
    assert run.mixing.observe(2, row, run.ranks) == (
        "step 2: the shares stay: no finite loss of read is known"
    )
    assert "shares from here on" in run.mixing.observe(2, row | {"eval/read/not_finite": 0.0}, run.ranks)
    run.close()


@pytest.mark.parametrize(
    ("first", "later"), [({}, {"sum": torch.ones(2)}), ({}, {"best": math.nan}), ({3: 1.0}, {})]
)
def test_a_state_that_no_checkpoint_keeps_is_refused_at_once(values, corpus, my_mix, first, later):
    """Before the first step, or in the step in which it appears; not when a checkpoint is due."""

    class Stateful(my_mix.Turns):
        def state_dict(self):
            return later if self.calls else first

    my_mix.Stateful = Stateful
    run = with_hook(values, corpus, mixing={"name": "my_mix:Stateful"}, checkpoint={"every": 0})
    with pytest.raises(ConfigError, match="its state cannot be kept in a checkpoint"):
        trained(run)
    assert Path(values["output_dir"], "metrics.jsonl").exists() is not bool(first)


def test_objects_that_would_lose_their_state_are_refused(my_mix):
    my_mix.made = my_mix.Turns({})
    my_mix.Half = type("Half", (), {"__init__": lambda s, w: None, "__call__": lambda s, p, q: q})
    my_mix.Half.state_dict = lambda self: {}
    with pytest.raises(ConfigError, match="'my_mix:made' is an object with a state: name its class Turns"):
        hook_of("my_mix:made")
    with pytest.raises(ConfigError, match="needs both state_dict and load_state_dict, or neither"):
        hook_of("my_mix:Half")


# Settings


WRONG = {
    "no 'skillit'; did you mean 'skill_it'?": {"name": "skillit"},
    "skill_it needs 'edges': a file of 'rlpretrain mix edges', or {}": "skill_it",
    "eta, edges: settings of skill_it alone": {"name": "stratified", "eta": 0.5, "edges": {}},
    "'options' are those of a function or Class of your own": {"name": "stratified", "options": {"a": 1}},
    "'mixing' names 'math', which is none of 'sources' (think, read)": {
        "name": "skill_it",
        "edges": {"think": {"math": 1}},
    },
    "'mixing' names 'web', which is none": {"name": "skill_it", "edges": {}, "targets": ["web"]},
    "expected a JSON file, or {source: {source: number of at least 0}}": {
        "name": "skill_it",
        "edges": {"think": {"read": -1}},
    },
    "'mixing.floor' 0.6 is too high: 2 sources leave at most 0.5": {"name": "stratified", "floor": 0.6},
    "data.mixing.every 3 is not a multiple of eval.every 2": {"name": "stratified", "every": 3},
    "data.mixing.every 8: a run of 8 steps never changes its shares": {"name": "stratified", "every": 8},
    "unknown key 'data.mixing.evry': did you mean 'every'": {"name": "stratified", "evry": 3},
    "cannot be loaded": "my_mix:missing",
    "'my_mix:number' is a int, not a function or class": "my_mix:number",
    "'my_mix:one_argument' cannot be called with (progress, losses)": "my_mix:one_argument",
    "data.mixing 'my_mix:Turns': TypeError": {"name": "my_mix:Turns", "options": {"second": 1}},
    "missing.json cannot be read": {"name": "skill_it", "edges": "missing.json"},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_settings_are_refused_early(values, corpus, my_mix, message, tmp_path):
    """By a dry run, and so before the model is loaded."""
    mixing = WRONG[message]
    mixing = mixing if isinstance(mixing, str) else {"every": 2} | mixing
    run = mixed(values, corpus, objective="ntp")
    with pytest.raises(ConfigError) as error:
        dry_run(build(merged(run, data=run["data"] | {"mixing": mixing})), tmp_path)
    assert message in str(error.value)


def test_settings_that_do_not_go_together_are_refused(values, corpus, tmp_path):
    run = mixed(values, corpus)
    data = run["data"]

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            Run(build(merged(run, **changes)), None)

    file = str(corpus / "held_out.jsonl")
    refused("eval.data has no file for read", eval={"data": {"think": file}, "every": 2})
    held_out = data | {"mixing": SKILLS | {"losses": "held_out"}}
    refused("has no file for think, read", data=held_out, eval={"data": file, "every": 2})
    refused("is not a multiple of eval.every 0", eval=run["eval"] | {"every": 0})
    unread = {
        "sources": {
            "think": data["sources"]["think"] | {"next_token": False},
            "read": data["sources"]["read"],
        }
    }
    refused("think has next_token: false and so none", data=data | unread, eval={"data": None})
    off = {"sources": sources_of(corpus, read=0.0)}
    refused("sources.read has weight 0 and so never one", data=data | off, eval={"data": None})
    refused("a replay draws no documents", replay=str(tmp_path))
    plain = {"path": str(corpus / "train.jsonl"), "mixing": "stratified"}
    refused("'mixing' is of 'sources', and there are none", data=plain)
    with pytest.raises(ConfigError, match="only samples has no losses"):
        Pretrainer(build(run)).rollout()
    for edges, message in {
        "[1]": "expected {source: {source: strength}}",
        '{"think": {"web": 1}}': "names 'web', which is none of data.sources",
        '{"think": {"read": "x"}}': "the edge think → read is 'x'",
    }.items():
        (tmp_path / "edges.json").write_text(edges)
        refused(message, data=data | {"mixing": SKILLS | {"edges": str(tmp_path / "edges.json")}})


def test_a_resumed_run_must_have_the_same_losses_and_edges(values, corpus, tmp_path):
    edges = tmp_path / "edges.json"
    edges.write_text(json.dumps({"edges": SKILLS["edges"]}))
    run = mixed(values, corpus, objective="ntp")
    run = merged(run, data=run["data"] | {"mixing": SKILLS | {"edges": str(edges)}})
    trained(run, max_steps=4)
    documents = merged(run, eval=run["eval"] | {"documents": 5})
    with pytest.raises(ConfigError, match="eval.documents differ from those of the checkpoint"):
        trained(documents, resume="auto")
    edges.write_text(json.dumps({"edges": {}}))
    with pytest.raises(ConfigError, match="the file has other edges than when the checkpoint was written"):
        trained(run, resume="auto")


def test_another_rule_replaces_the_whole_section():
    """In an experiment, `set` of a control drops the settings that are skill_it's."""
    merged_ = overlay({"data": {"mixing": SKILLS}}, {"data": {"mixing": {"name": "stratified", "every": 2}}})
    assert merged_ == {"data": {"mixing": {"name": "stratified", "every": 2}}}
    kept = overlay({"data": {"mixing": SKILLS}}, {"data": {"mixing": {"eta": 0.0}}})
    assert kept["data"]["mixing"] == SKILLS | {"eta": 0.0}
