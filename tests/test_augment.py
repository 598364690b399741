"""`rlpretrain augment`: thoughts written into documents, chosen, counted, resumed, and trained on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlpretrain import cli
from rlpretrain.config.io import build
from rlpretrain.corpora import augment as augment_module
from rlpretrain.corpora.augment_summary import Summary
from rlpretrain.corpora.row_file import RowFile, folder_of
from rlpretrain.prompts import strip_thoughts
from rlpretrain.training.pretrainer import Pretrainer
from tests.builders.runs import ROOT

MODEL = str(ROOT / "tests" / "data" / "dial_base")
SHOWS = "{positions: after, marker: shows, target_length: 2}"


@pytest.fixture
def data(corpus: Path, tmp_path: Path) -> Path:
    """Eleven documents of the dial corpus."""
    file = tmp_path / "docs.jsonl"
    lines = (corpus / "held_out.jsonl").read_text().splitlines()[:11]
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


def run(data: Path, out: Path, where: str, *words: str, model: str = MODEL) -> int:
    """The command's exit code."""
    command = ["augment", str(data), "--model", model, "--out", str(out), "--where", where]
    return cli.main([*command, "--device", "cpu", "--max-thought-tokens", "20", *words])


def scripted(**options: Any) -> list[str]:
    return ["--engine", "tests.builders.scripted:Scripted", "--engine.options", json.dumps(options)]


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def source(data: Path) -> list[str]:
    return [row["text"] for row in rows_of(data)]


def words(text: str) -> str:
    return " ".join(text.split())


def log_prob(model: Any, ids: list[int], target: int) -> float:
    """Log p of the last `target` ids after those before, from the logits."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    places = range(len(ids) - target, len(ids))
    return float(sum(logits[i - 1, ids[i]] for i in places))


# what is written


@pytest.mark.parametrize("where", ["after", "before"])
def test_a_row_for_a_row_with_its_thought_in_place(data, tmp_path, where):
    out = tmp_path / "out.jsonl"
    objective = ["--objective", SHOWS] if where == "before" else []
    assert run(data, out, where, *objective, "--seed", "3", "--data.meta_columns", "[depth]") == 0
    rows = rows_of(out)
    assert [row["row"] for row in rows] == list(range(11)) and sum(bool(r["thoughts"]) for r in rows) > 8
    for row, text, own in zip(rows, source(data), rows_of(data), strict=True):
        assert words(strip_thoughts(row["text"])) == text and row["depth"] == own["depth"]
        assert (row["where"], row["generator"], row["seed"]) == (where, MODEL, 3)
        for thought in row["thoughts"]:
            assert thought["finish_reason"] == "close" and thought["seed"] > 0
            at, written = thought["at"], f" <think>{thought['text']} </think>"
            assert row["text"] == text[:at] + written + text[at:]
            assert text[:at] == (text if where == "after" else text[: text.index("shows") + 5])
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    all_ids = [tokenizer(row["text"])["input_ids"] for row in rows]
    assert sum(row["document_tokens"] + row["thought_tokens"] for row in rows) == sum(map(len, all_ids))


def test_the_gain_is_that_of_the_text_as_it_stands(data, tmp_path):
    """Independent of the library's scoring: from the logits of the written text, tokenised anew."""
    out = tmp_path / "out.jsonl"
    assert run(data, out, "inferable", "--objective", SHOWS, "--max-leak", "1", "--thoughts", "4") == 0
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    kept = 0
    for row, text in zip(rows_of(out), source(data), strict=True):
        for thought in row["thoughts"]:
            kept += 1
            before, after = tokenizer(text)["input_ids"], tokenizer(row["text"])["input_ids"]
            assert after[-2:] == before[-2:]  # the target: the number and the full stop
            without, with_ = log_prob(model, before, 2), log_prob(model, after, 2)
            assert thought["logp_without"] == pytest.approx(without, abs=1e-4)
            assert thought["logp_with"] == pytest.approx(with_, abs=1e-4)
            assert thought["gain"] == pytest.approx(with_ - without, abs=1e-4) and thought["gain"] > 0
    assert kept >= 8
    assert (
        sum(row["sampled"] for row in rows_of(out))
        == 44
        == kept + sum(sum(row["dropped"].values()) for row in rows_of(out))
    )


def test_the_thought_that_helps_most_is_kept(data, tmp_path):
    """Useless, right and wrong traces: the first in the list is not the one that is kept."""
    (tmp_path / "one.jsonl").write_text('{"text": "ann has 5 bob up1 shows 6 ."}\n')
    say = ["so well", "5 bob up1 6", "5 bob up1 8"]
    found = []
    for texts in (say, say[::-1]):
        out = tmp_path / f"{len(found)}.jsonl"
        options = ["--objective", SHOWS, "--thoughts", "3", "--max-leak", "1"]
        assert run(tmp_path / "one.jsonl", out, "inferable", *options, *scripted(say=texts)) == 0
        found += rows_of(out)
    assert [row["thoughts"][0]["text"].strip() for row in found] == ["5 bob up1 6"] * 2
    assert found[0]["dropped"].keys() <= {"gain", "spare"} and sum(found[0]["dropped"].values()) == 2
    assert found[0]["thoughts"][0]["gain"] == pytest.approx(found[1]["thoughts"][0]["gain"], abs=1e-5)


def test_places_by_entropy_are_where_the_model_is_unsure(data, tmp_path):
    out = tmp_path / "out.jsonl"
    objective = "{target_length: 2, top_fraction: 0, positions_per_document: 1}"
    assert run(data, out, "inferable", "--objective", objective, "--min-gain", "-100", "--thoughts", "1") == 0
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for row, text in zip(rows_of(out), source(data), strict=True):
        ids = tokenizer(text)["input_ids"]
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        entropies = -(logps.exp() * logps).sum(-1)  # of the prediction of the next token
        best = int(entropies[: len(ids) - 2].argmax()) + 1
        for thought in row["thoughts"]:
            assert text[: thought["at"]].split() == text.split()[:best]


# limits


def test_a_generator_that_copies_the_target_leaks(data, tmp_path, capsys):
    options = ["--objective", SHOWS, *scripted(copy=2)]
    assert run(data, tmp_path / "a.jsonl", "inferable", *options) == 0
    rows = rows_of(tmp_path / "a.jsonl")
    assert not any(row["thoughts"] for row in rows) and all(row["dropped"] == {"leak": 8} for row in rows)
    assert "dropped: leak" in capsys.readouterr().out
    assert [row["text"] for row in rows] == source(data)
    assert run(data, tmp_path / "b.jsonl", "before", *options) == 0  # measured, and kept by default
    assert {row["thoughts"][0]["leak"] for row in rows_of(tmp_path / "b.jsonl")} == {1.0}
    assert run(data, tmp_path / "c.jsonl", "before", *options, "--max-leak", "0.9") == 0
    assert not any(row["thoughts"] for row in rows_of(tmp_path / "c.jsonl"))


def test_thoughts_that_cannot_stand_in_a_text(data, tmp_path):
    def counts(name: str, *more: str, **options: Any) -> tuple[Counter[str], list[dict[str, Any]]]:
        out = tmp_path / f"{name}.jsonl"
        assert run(data, out, "after", *more, *scripted(**options)) == 0
        rows = rows_of(out)
        return sum((Counter(row["dropped"]) for row in rows), Counter()), rows

    assert counts("cut", say=["so well"], ending="length")[0] == {"unfinished": 11}
    dropped, rows = counts("kept", "--unfinished", "keep", say=["so well"], ending="eos")
    assert not dropped and all(row["text"].endswith(". <think> so well </think>") for row in rows)
    assert Summary.of(rows).unfinished_kept == 11 and rows[0]["thoughts"][0]["finish_reason"] == "eos"
    assert counts("empty", say=[""])[0] == {"empty": 11}
    assert counts("special", say=["so <unk> well"])[0] == {"special": 11}
    assert counts("nested", say=["so <think> well"])[0] == {"special": 11}
    assert counts("long", "--longest", "2", say=["so well so"])[0] == {"long": 11}
    dropped, rows = counts("second", "--thoughts", "3", say=["", "so", "well"])
    assert dropped == {"empty": 11, "spare": 11} and rows[0]["thoughts"][0]["text"] == " so"


def test_rows_without_a_place_are_counted(data, tmp_path, capsys):
    texts = source(data)
    texts[3] = texts[7] = "ann has 5 bob up1 ."  # without the marker
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = tmp_path / "out.jsonl"
    assert run(data, out, "before", "--objective", SHOWS, *scripted(say=["so"])) == 0
    summary = Summary.of(rows_of(out))
    assert (summary.rows, summary.rows_without_places, summary.places) == (11, 2, 9)
    assert "2 rows have none" in capsys.readouterr().out


def test_long_documents_are_thought_about_piece_by_piece(data, tmp_path):
    split, cut = tmp_path / "split.jsonl", tmp_path / "cut.jsonl"
    assert run(data, split, "after", "--max-length", "5", *scripted(say=["so"])) == 0
    for row, text in zip(rows_of(split), source(data), strict=True):
        pieces = [words(part) for part in row["text"].split(" <think> so </think>")]
        tokens = text.split()
        wanted = [" ".join(tokens[i : i + 5]) for i in range(0, len(tokens), 5)]
        alone = len(tokens) % 5 == 1  # a piece of one token has no place
        assert pieces == (wanted if alone else [*wanted, ""])
        assert words(strip_thoughts(row["text"])) == text
    assert run(data, cut, "after", "--max-length", "5", "--data.long", "truncate", *scripted(say=["so"])) == 0
    for row, text in zip(rows_of(cut), source(data), strict=True):
        assert row["text"] == " ".join(text.split()[:5]) + " <think> so </think>"
        assert row["document_tokens"] == 5


def test_answers_and_rows_without_text(tmp_path):
    file, out = tmp_path / "problems.jsonl", tmp_path / "out.jsonl"
    problems = [
        {"question": "ann has 5 bob up1 shows", "answer": "6 eve"},
        {"question": "", "answer": "6 ."},
        {"question": "leo has 4 ann up3 shows", "answer": None},
        {"question": "leo has 4 " * 80, "answer": "6 ."},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in problems))
    answers = ["--column", "question", "--answer-column", "answer", "--answer-join", " "]
    assert run(file, out, "before", *answers, *scripted(say=["5 bob up1 6 eve"])) == 0
    rows = rows_of(out)
    assert rows[0]["text"] == "ann has 5 bob up1 shows <think> 5 bob up1 6 eve </think> 6 eve"
    assert rows[0]["thoughts"][0]["leak"] == 1.0  # the whole answer is the target
    assert [row["places"] for row in rows] == [1, 0, 0, 0]
    out = tmp_path / "half.jsonl"
    assert run(file, out, "before", *answers, *scripted(say=["5 bob up1 6"])) == 0
    assert rows_of(out)[0]["thoughts"][0]["leak"] == 0.0  # of its two tokens in this order
    assert rows[2]["text"] == "leo has 4 ann up3 shows" and rows[3]["text"].endswith("4  6 .")


# going on


def test_an_interrupted_command_goes_on_where_it_stopped(data, tmp_path, capsys, monkeypatch):
    """Killed inside a row and inside a batch: the file equals that of a command that was left alone."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    command = ["--objective", SHOWS, "--temperature", "1", "--batch", "4"]
    assert run(data, whole, "before", *command) == 0
    append, calls = RowFile.append, []

    def interrupted(self: RowFile, rows: Any) -> None:
        calls.append(rows)
        if len(calls) == 2:
            append(self, rows[:1])
            with self.part.open("a") as file:
                file.write('{"text": "ann')
            raise KeyboardInterrupt
        append(self, rows)

    monkeypatch.setattr(RowFile, "append", interrupted)
    assert run(data, out, "before", *command) == 130
    assert "the same command goes on there" in capsys.readouterr().err and not out.exists()
    assert run(data, out, "before", *command, "--seed", "1") == 2
    assert "was begun with other settings: seed was 0, is 1" in capsys.readouterr().err
    with data.open("a") as file:
        file.write('{"text": "so"}\n')
    assert run(data, out, "before", *command) == 2
    assert "rows was 11, is 12" in capsys.readouterr().err
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:11]))
    assert run(data, out, "before", *command) == 0
    assert "5 of 11 rows are done" in capsys.readouterr().out
    assert [len(rows) for rows in calls[2:]] == [4, 2]
    assert out.read_bytes() == whole.read_bytes() and not (folder_of(out) / "rows.jsonl").exists()

    def not_again(*args: Any) -> None:
        raise AssertionError("a finished command loads no model")

    monkeypatch.setattr(augment_module, "load_samplers", not_again)
    assert run(data, out, "before", *command) == 0
    assert "thoughts kept" in capsys.readouterr().out and out.read_bytes() == whole.read_bytes()


def test_two_commands_do_not_write_one_file(data, tmp_path, capsys):
    out, options = tmp_path / "out.jsonl", scripted(say=["so"])
    first = RowFile(out, {}, 11)
    with pytest.raises(Exception, match="another process writes its rows now"):
        RowFile(out, {}, 11)
    first.close()
    assert run(data, out, "after", *options) == 2  # they were begun with no settings at all
    assert "was begun with other settings" in capsys.readouterr().err


# reductions


def test_without_a_thought_it_is_next_token_training(data, tmp_path, corpus):
    """--min-gain inf keeps no thought: the same texts, and the same weights after two steps."""
    out = tmp_path / "out.jsonl"
    options = ["--objective", SHOWS, "--min-gain", "inf", *scripted(say=["5 bob up1 6"])]
    assert run(data, out, "inferable", *options) == 0
    assert [row["text"] for row in rows_of(out)] == source(data)
    weights = [trained_on(file, tmp_path / name) for name, file in (("a", data), ("b", out))]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def trained_on(file: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The weights after two steps of next-token training on a file and the plain documents, as sources."""
    plain = {"path": str(file.parent / "docs.jsonl"), "weight": 0.5}
    values = {
        "model": MODEL,
        "data": {"sources": {"plain": plain, "thoughts": {"path": str(file), "weight": 0.5}}},
        "objective": "ntp",
        "positions_per_step": 4,
        "max_steps": 2,
        "optim": {"lr": 1e-3, "warmup_steps": 1},
        "policy": {"backend": "torch"},
        "checkpoint": {"every": 0},
        "console": False,
        "device": "cpu",
        "output_dir": str(folder),
    }
    values["data"]["max_length"] = 128
    Pretrainer(build(values)).train()
    return AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
