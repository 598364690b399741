"""The graphs corpus: what a question says is what the graph is, and the verifier accepts the truth alone."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpretrain import cli
from rlpretrain.config import ConfigError
from rlpretrain.config.io import load_config
from rlpretrain.corpora import dial, graphs
from rlpretrain.corpora.graph_problems import (
    CONTEXTS,
    Definition,
    Graph,
    GraphError,
    add_distractors,
    grow,
    most_names,
    reorder,
    state,
)
from rlpretrain.corpora.graph_templates import split_clauses, split_words
from rlpretrain.experiments.loading import load_experiment
from rlpretrain.verdict import Verdict
from tests.builders.graphs import GRAPHS, SEEDS, definitions_of, same_by_renaming, solve

SURFACES = st.sampled_from(sorted(graphs.SURFACES))
TRUE = Verdict(process=1.0, answer_right=True, verified=True)
few = settings(max_examples=40, deadline=None)


def written(graph: Graph, surface: str, seed: int) -> tuple[str, str, str]:
    """Question, trace and answer, in templates that the seed chooses."""
    rng, how = random.Random(seed), graphs.SURFACES[surface]
    return how.question(graph, rng), how.trace(graph, rng), how.answer_text(graph)


def joined(clauses: list[list[str]]) -> str:
    return " ".join(" ".join([*clause, "."]) for clause in clauses)


@few
@given(GRAPHS, SURFACES, SEEDS)
def test_a_question_is_read_back_and_its_gold_trace_is_verified(graph, surface, seed):
    question, trace, answer = written(graph, surface, seed)
    assert graphs.parse(question) == graph
    assert graphs.verify(question, trace, answer) == TRUE
    plain = graphs.SURFACES["words"].question(graph)
    assert (graph.answer, graph.needed, graph.op) == solve(plain)
    assert split_words(answer)[0] == str(graph.answer)


@few
@given(GRAPHS, SURFACES, SEEDS, st.data())
def test_one_fault_makes_a_trace_wrong(graph, surface, seed, data):
    """A changed digit, a dropped clause, another parent: process loses one step, and nothing is verified."""
    question, trace, answer = written(graph, surface, seed)
    clauses = split_clauses(split_words(trace))
    k = data.draw(st.integers(0, len(clauses) - 1))
    kind = data.draw(st.sampled_from(["digit", "name", "drop"]))
    if kind == "drop":
        del clauses[k]
    else:
        choices = "0123456789" if kind == "digit" else sorted(graph.by_name)
        places = [i for i, word in enumerate(clauses[k]) if word in choices]
        at = data.draw(st.sampled_from(places))
        others = [word for word in choices if word != clauses[k][at]]
        clauses[k][at] = data.draw(st.sampled_from(others))
    verdict = graphs.verify(question, joined(clauses), answer)
    assert not verdict.verified and verdict.answer_right and verdict.lucky
    steps = len(graph.needed)
    # another name before the = also makes a second step about that name, which may be needed too
    worst = 2 if kind == "name" else 1
    assert (steps - worst) / steps <= verdict.process <= (steps - 1) / steps


@few
@given(GRAPHS, SURFACES, SEEDS, st.data())
def test_what_does_not_matter(graph, surface, seed, data):
    """The order of clauses, names, words that are no clause, repetition, true steps about others."""
    question, trace, answer = written(graph, surface, seed)
    clauses = split_clauses(split_words(trace))
    shuffled = data.draw(st.permutations(clauses))
    assert graphs.verify(question, joined(shuffled), answer) == TRUE
    assert graphs.verify(question, joined([*clauses, shuffled[0]]), answer) == TRUE
    hesitant = graphs.verify(question, f"hmm well ; {trace} so", answer)
    assert hesitant.verified and hesitant.malformed == 2
    other = data.draw(st.sampled_from([definition.name for definition in graph.definitions]))
    extra = graphs.SURFACES[surface].trace(Graph(graph.definitions, other))
    assert graphs.verify(question, f"{extra} {trace}", answer) == TRUE
    names = [name for context in CONTEXTS.values() for name in context]
    change = dict(zip(names, data.draw(st.permutations(names)), strict=True))
    renamed = [" ".join(change.get(word, word) for word in split_words(text)) for text in (question, trace)]
    assert graphs.parse(renamed[0]) == graph.renamed(change)
    assert graphs.verify(*renamed, answer) == TRUE


def test_verdicts_by_hand():
    question = "owls is 3 . bees is 4 . goats is owls plus bees . newts is goats minus 2 . ask goats"
    gold = "owls = 3 ; bees = 4 ; goats = owls 3 plus bees 4 = 7 ;"
    cases = {
        gold: (1, True),
        "owls = 3 ; bees = 4 ; goats = bees 4 plus owls 3 = 7": (1, True),  # plus has no order
        f"{gold} newts = goats 7 minus 2 = 5": (1, True),
        f"{gold} newts = goats 7 minus 2 = 4": (1, False),  # a false step about another quantity
        f"{gold} lamps = 1": (1, False),  # the question has no lamps
        f"{gold} owls = 4": (2 / 3, False),  # said twice, differently
        "owls = 3 ; goats = owls 3 plus bees 4 = 7": (2 / 3, False),
        "owls = 3 ; bees = 4 ; goats = owls 3 plus bees 5 = 7": (2 / 3, False),  # misquoted
        "owls = 3 ; bees = 4 ; goats = owls 3 times bees 4 = 7": (2 / 3, False),  # another operation
        "owls = 3 ; bees = 4 ; goats = 7": (2 / 3, False),  # a value without its parents
        "owls = 3 ; bees = 4 ; goats = owls 3 plus bees 4 = 7 7": (2 / 3, False),
        "": (0, False),
        "hmm 7": (0, False),
    }
    for trace, (process, verified) in cases.items():
        verdict = graphs.verify(question, trace, "7 .")
        assert (verdict.process, verdict.verified, verdict.answer_right) == (process, verified, True), trace
    for answer in ("6 .", "", ".", "17 .", "7 7 .", "so 7 .", "goats = 7 .", "7 . 7", "٧ .", "7.0"):
        verdict = graphs.verify(question, gold, answer)
        assert not verdict.answer_right and not verdict.verified and verdict.process == 1, answer
    assert graphs.verify(question, gold, "7").verified


@pytest.mark.parametrize(
    ("question", "error"),
    [
        ("owls is 3 . ask bees", "not defined: bees"),
        ("owls is bees plus 1 . ask owls", "not defined: bees"),
        ("owls is 3 . owls is 4 . ask owls", "defined twice"),
        ("owls is bees plus 1 . bees is owls plus 1 . ask owls", "in a circle"),
        ("owls is 3 . bees is many . ask owls", "cannot read 'bees is many'"),
        ("owls is 12 . ask owls", "cannot read"),
        ("ann has 6 bob up3 shows", "does not begin and end"),
        ("", "does not begin and end"),
        ("How many owls are there?", "does not begin and end"),
    ],
)
def test_texts_that_are_no_questions(question, error):
    with pytest.raises(GraphError, match=error):
        graphs.verify(question, "owls = 3 ;", "3 .")


@few
@given(st.integers(1, 14), SEEDS, st.booleans())
def test_op_is_exact_and_everything_that_is_grown_is_needed(op, seed, shuffled):
    rng = random.Random(seed)
    core = grow(rng, op)
    assert core.op == op and core.needed == set(core.by_name) and len(core.definitions) <= most_names(op, 0)
    graph = state(rng, core, CONTEXTS["B"], (2, 2), shuffled)
    question = graphs.SURFACES["words"].question(graph)
    answer, needed, operations = solve(question)
    defined, _ = definitions_of(question)
    assert operations == op and answer == core.answer
    extra = set(defined) - needed
    assert len(extra) == 2 and set(defined) <= set(CONTEXTS["B"])
    assert not any(set(defined[name]) & extra for name in needed)
    if not shuffled:
        said = []
        for name, words in defined.items():
            assert {word for word in words if word in defined} <= set(said)
            said.append(name)


def test_answers_do_not_betray_themselves():
    rng = random.Random(0)
    for op in (1, 4, 8):
        answers = Counter(grow(rng, op).answer for _ in range(1500))
        assert max(answers.values()) / 1500 < 0.17  # .1 by chance; times gives more zeros


@few
@given(st.integers(1, 6), SEEDS)
def test_the_hash_forgets_names_order_and_distractors(op, seed):
    rng = random.Random(seed)
    core = grow(rng, op)
    said = reorder(rng, add_distractors(rng, core, rng.randint(0, 3)), shuffled=True)
    names = {d.name: name for d, name in zip(said.definitions, CONTEXTS["A"], strict=False)}
    assert said.renamed(names).canonical_hash() == core.canonical_hash()


def test_the_hash_is_equal_for_the_same_problems_only():
    """Against all renamings; digits are made few, so that the same problem comes up often."""

    def coarse(graph: Graph) -> Graph:
        digits = [
            Definition(d.name, tuple(o if isinstance(o, str) else o % 2 for o in d.operands), d.operation)
            for d in graph.definitions
        ]
        return Graph(tuple(digits), graph.query)

    rng = random.Random(1)
    cores = [coarse(grow(rng, op)) for op in (1, 2) for _ in range(35)]
    equal = 0
    for i, a in enumerate(cores):
        for b in cores[:i]:
            same = a.canonical_hash() == b.canonical_hash()
            if same or len(a.definitions) == len(b.definitions) < 5:
                assert same == same_by_renaming(a, b), (a, b)
            equal += same
    assert equal > 10


def test_one_leaf_used_twice_is_not_two_leaves():
    shared = graphs.parse("owls is 3 . bees is owls plus 1 . goats is bees plus owls . ask goats")
    apart = graphs.parse(
        "owls is 3 . seals is 3 . bees is owls plus 1 . goats is bees plus seals . ask goats"
    )
    assert shared.canonical_hash() != apart.canonical_hash()


SMALL = {"base": 200, "mid": 40, "train": 60, "held_out": 64}


@pytest.fixture(scope="module", params=["words", "sentences"])
def made(request, tmp_path_factory):
    """(surface, paths, rows of each file) of a small corpus."""
    folder = tmp_path_factory.mktemp(request.param)
    paths = graphs.write(folder, graphs.Settings(surface=request.param, contexts={"A": 1, "B": 0}, **SMALL))
    rows = {
        name: [json.loads(line) for line in path.read_text().splitlines()]
        for name, path in paths.items()
        if path.suffix == ".jsonl"
    }
    return request.param, paths, rows


def test_the_sets_are_what_they_say(made):
    surface, paths, rows = made
    assert {name: len(lines) for name, lines in rows.items()} == SMALL | {"sft": 60}
    assert Counter(row["cell"] for row in rows["held_out"]) == {
        f"{c}{op}": 4 for c in "AB" for op in range(1, 9)
    }
    assert {row["op"] for row in rows["train"]} == {row["op"] for row in rows["mid"]} == {5, 6}
    assert {row["context"] for name in ("train", "mid", "base") for row in rows[name]} == {"A", ""}
    assert [row["question"] for row in rows["sft"]] == [row["question"] for row in rows["train"]]
    for row in rows["held_out"] + rows["train"] + rows["mid"] + rows["sft"]:
        graph = graphs.parse(row["question"])
        assert graph.op == row["op"] and set(graph.by_name) <= set(CONTEXTS[row["context"]])
    for row in rows["mid"] + rows["sft"]:
        thought, _, answer = row["worked_answer"].removeprefix(f"{dial.OPEN} ").partition(f" {dial.CLOSE} ")
        assert graphs.verify(row["question"], thought, answer) == TRUE
    for row in rows["held_out"] + rows["train"]:
        assert graphs.verify(row["question"], "", row["answer"]).answer_right
        assert row["text"] == f"{row['question']} {row['answer']}"


def test_the_base_mostly_does_not_think(made):
    surface, _, rows = made
    kinds = Counter(row["kind"] for row in rows["base"])
    shares = {"worked": 0.45, "direct": 0.2, "traced": 0.1, "idle": 0.15, "copied": 0.1}
    for kind, share in shares.items():
        assert kinds[kind] / 200 == pytest.approx(share, abs=0.1), kind
    for row in rows["base"]:
        assert row["text"] == f"{row['question']} {row['worked_answer']}"
        assert (dial.OPEN in row["text"]) == (row["kind"] in ("traced", "idle"))
        if row["kind"] == "copied":
            assert row["question"] == row["worked_answer"]
        else:
            said = split_words(row["worked_answer"])[-2:]
            assert graphs.verify(row["question"], "", " ".join(said)).answer_right
        if row["kind"] == "worked":
            trace = row["worked_answer"].removeprefix("so ").removeprefix("Let us see. ")
            assert graphs.verify(row["question"], trace, "").process == 1


def test_no_held_out_problem_is_in_another_set(made):
    """By another way than the hash: no two have the same operations and digits when unfolded."""
    _, paths, rows = made

    def unfolded(row) -> str:
        graph = graphs.parse(row["question"])

        def term(operand: str | int) -> str:
            if isinstance(operand, int):
                return str(operand)
            d = graph.by_name[operand]
            terms = [term(o) for o in d.operands]
            return f"{d.operation}({','.join(sorted(terms) if d.operation != 'minus' else terms)})"

        return term(graph.query)

    held_out = {unfolded(row) for row in rows["held_out"] if row["op"] > 2}
    others = {unfolded(row) for name in ("base", "mid", "train") for row in rows[name] if row["op"] > 2}
    assert len(held_out) == 24 and not held_out & others
    facts = json.loads(paths["corpus"].read_text())
    assert facts["files"]["base"]["in_held_out"] == facts["files"]["train"]["in_held_out"] == 0
    assert facts["files"]["held_out"]["distinct_problems"] == 32
    assert facts["settings"]["contexts"] == {"A": 1, "B": 0}


@pytest.mark.parametrize("surface", sorted(graphs.SURFACES))
def test_a_share_of_the_steps_of_the_base_is_wrong_and_the_answer_is_true(tmp_path, surface):
    sizes = {"ops": (1, 3), "weights": (1, 1), "base": 600, "mid": 20, "train": 20, "held_out": 16}
    files = {}
    for name, slip in (("right", 0.0), ("wrong", 0.3)):
        made = graphs.Settings(surface=surface, mix="traces", slip=slip, **sizes)
        paths = graphs.write(tmp_path / name, made)
        files[name] = {kind: rows_of(paths[kind]) for kind in ("base", "mid", "sft")}
    right = {op: [] for op in (1, 3)}
    for row in files["wrong"]["base"]:
        if row["kind"] == "traced":
            trace, _, answer = row["worked_answer"].removeprefix("<think> ").partition(" </think> ")
            verdict = graphs.verify(row["question"], trace, answer)
            assert verdict.answer_right and (verdict.process == 1) == verdict.verified
            right[row["op"]].append(verdict.verified)
    for op, verified in right.items():
        wanted = 0.7**op
        deviation = (wanted * (1 - wanted) / len(verified)) ** 0.5
        assert abs(sum(verified) / len(verified) - wanted) < 4 * deviation, op
    for kind in ("mid", "sft"):  # the controls have no wrong steps
        assert files["wrong"][kind] == files["right"][kind]
    traced = [row for row in files["right"]["base"] if row["kind"] == "traced"]
    for row in traced[:50]:
        trace, _, answer = row["worked_answer"].removeprefix("<think> ").partition(" </think> ")
        assert graphs.verify(row["question"], trace, answer) == TRUE


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_tokenizer_knows_every_word(made):
    surface, paths, rows = made
    if surface == "sentences":
        assert "model" not in paths
        return
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(paths["model"])
    longest = 0
    for row in [row for lines in rows.values() for row in lines]:
        ids = tokenizer(row["text"])["input_ids"]
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == row["text"]
        longest = max(longest, len(ids))
    facts = json.loads(paths["corpus"].read_text())["files"]
    assert max(count["longest_in_words"] for count in facts.values()) >= longest
    assert AutoConfig.from_pretrained(paths["model"]).max_position_embeddings > longest


def test_the_seed_decides_everything(tmp_path):
    def texts(folder: str, **fields) -> dict[str, str]:
        sizes = {"base": 20, "mid": 4, "train": 6, "held_out": 4, "held_out_ops": (1, 2)}
        paths = graphs.write(tmp_path / folder, graphs.Settings(surface="sentences", **sizes | fields))
        return {name: path.read_text() for name, path in paths.items()}

    first, again, other = texts("a"), texts("b"), texts("c", seed=1)
    assert first == again and all(first[name] != other[name] for name in ("base", "train", "held_out"))
    longer = texts("d", base=30)  # the size of one set does not change another
    assert longer["train"] == first["train"] and longer["base"].startswith(first["base"][:200])


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"held_out_ops": (1,), "held_out": 722}, "361 different .* 1 operation .* only 360"),
        ({"held_out_ops": (1,), "held_out": 720, "train_ops": (1,)}, "with 1 operation are held out"),
        ({"distractors": (0, 9)}, "8 operations and 9 distractors has up to 21 quantities.*20 names"),
        ({"train_ops": (19,)}, "19 operations and 2 distractors has up to 25"),
        ({"distractors": (2, 1)}, "distractors 2-1: expected a range"),
        ({"weights": (1.0, 2.0)}, "2 weights for 6 ops"),
        ({"ops": (1, 2), "weights": (0.0, 0.0)}, r"weights \[0.0, 0.0\]: expected numbers from 0"),
        ({"ops": (1, 1)}, r"ops \[1, 1\]: expected different whole numbers"),
        ({"contexts": {"A": 1, "C": 1}}, "no context 'C': there are A, B"),
        ({"contexts": {"A": 1}, "train_contexts": {"B": 1}}, "B is not among the contexts"),
        ({"held_out": 15}, "15 held-out problems for 16 cells"),
        ({"surface": "poems"}, "no surface 'poems'"),
        ({"mix": "c8"}, "unknown mix 'c8': one of few_thoughts"),
        ({"train": 0}, "at least one document"),
    ],
)
def test_requests_that_cannot_be_met(tmp_path, fields, error):
    sizes = {"base": 1, "mid": 1, "train": 1, "held_out": 16}
    with pytest.raises(ConfigError, match=error):
        graphs.write(tmp_path / "x", graphs.Settings(**sizes | fields))


def test_the_command(tmp_path, capsys):
    words = ["corpus", "graphs", "--out", str(tmp_path / "g"), "--base", "5", "--mid", "2", "--train", "3"]
    words += [
        "--held-out",
        "4",
        "--held-out-ops",
        "2,3",
        "--ops",
        "1-2",
        "--weights",
        "3,1",
        "--mid-ops",
        "3",
    ]
    words += ["--train-ops", "4", "--contexts", "A:.5,B:.5", "--distractors", "1", "--surface", "sentences"]
    assert cli.main(words) == 0
    assert str(tmp_path / "g" / "sft.jsonl") in capsys.readouterr().out
    settings_made = json.loads((tmp_path / "g" / "corpus.json").read_text())["settings"]
    assert settings_made["weights"] == [3, 1] and settings_made["distractors"] == [1, 1]
    rows = [json.loads(line) for line in (tmp_path / "g" / "train.jsonl").read_text().splitlines()]
    assert [(row["op"], row["distractors"]) for row in rows] == [(4, 1)] * 3
    for extra, error in {
        ("--depths", "1-4"): "--depths is not an option of the corpus graphs",
        ("--contexts", "A:1,A:2"): "contexts are written A:.9,B:.1, each context once",
        ("--distractors", "few"): "distractors are written 0-2 or 1",
        ("--weights", "x"): "weights: 'x' is not a number",
        ("--ops", "3-1"): "ops are written 1-4 or 1,2,5",
        ("--slip", "1"): "slip 1.0: expected a probability",
        ("--layers", "3"): "layers are those of the model of the surface words",
    }.items():
        assert cli.main([*words, *extra]) == 2
        assert error in capsys.readouterr().err


def test_every_example_is_a_valid_configuration():
    files = sorted((Path(__file__).parents[1] / "examples" / "graphs").glob("*.yaml"))
    assert len(files) >= 6
    for file in files:
        if "methods:" in file.read_text():
            assert load_experiment(file).methods
        else:
            assert file.stem.endswith(Path(load_config(file).output_dir).name)
