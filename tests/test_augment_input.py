"""`rlpretrain augment`: input that it refuses, every family of tokenizers, and chat templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlpretrain import cli
from rlpretrain.config import ConfigError
from rlpretrain.config.io import build, load_config
from rlpretrain.corpora.augment_parts import chat_template
from rlpretrain.corpora.text_places import RowReader
from rlpretrain.corpora.thought_texts import Candidate, Limits, ThoughtReader, choose
from rlpretrain.objectives import config_of, load_objective
from rlpretrain.prompts import TEMPLATES, Delimiters, ThoughtPrompt, ensure_delimiters, strip_thoughts
from rollout.types import FinishReason, Position, Thought
from tests.builders import tokenizers_family
from tests.builders.runs import ROOT

MODEL = str(ROOT / "tests" / "data" / "dial_base")


def test_bad_input_is_refused_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    data, out = tmp_path / "docs.jsonl", tmp_path / "out.jsonl"
    data.write_text('{"text": "ann has 5 bob up1 shows 6 .", "seed": 1}\n')
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "foreign.jsonl").write_text("mine\n")
    (tmp_path / "folder.jsonl").mkdir()
    monkeypatch.setattr("rlpretrain.models.load_with_tokenizer", None)

    def refused(message: str, *words: str, path: Path = data, to: Path = out, where: str = "after") -> None:
        command = ["augment", str(path), "--model", MODEL, "--out", str(to), "--where", where]
        assert cli.main([*command, "--device", "cpu", "--max-thought-tokens", "9", *words]) == 2
        assert message in capsys.readouterr().err and not out.exists()

    refused("has no column 'body'; its columns: text", "--column", "body")
    refused("is empty", path=tmp_path / "empty.jsonl")
    refused("no such file", path=tmp_path / "missing.jsonl")
    refused("is a folder: name a file", to=tmp_path / "folder.jsonl")
    refused("end the name with .jsonl", to=tmp_path / "out.json")
    refused("exists, and is not of this command", to=tmp_path / "foreign.jsonl")
    refused("no such engine; did you mean 'vllm_local'?", "--engine", "vllm_locl")
    refused("a setting of engine ray", "--engine.num_engines", "2")
    refused("'nowhere:Engine' cannot be loaded", "--engine", "nowhere:Engine")
    refused("unknown option --optim.lr: augment takes fields of model, data", "--optim.lr", "1")
    refused("--sampling.thoughts: here it is --thoughts", "--sampling.thoughts", "4")
    refused("--scorer is for --where inferable", "--scorer", MODEL)
    refused("--max-leak is for thoughts before a target", "--max-leak", "0.5")
    refused("--max-leak is a share from 0 to 1", "--max-leak", "2", where="before")
    refused("--min-gain is a number of nats", "--min-gain", "nan", where="inferable")
    refused("name the answers (--answer-column COLUMN)", where="before")
    refused("need a scorer, which only", "--objective", "{positions: entropy}", where="before")
    refused("objective ntp has no thoughts", "--objective", "ntp")
    refused("use rlp or likelihood", "--objective", "rpt", where="inferable")
    refused("without 'streaming'", "--data.streaming", "true")
    refused("every row out has a column seed of its own", "--data.meta_columns", "[seed]")
    refused("the tokenizer has no chat template", "--chat")
    refused("makes rows of up to", "--max-length", "1000")
    refused("lower --max-thought-tokens", "--max-thought-tokens", "300")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("augment is one process")


@pytest.mark.parametrize("family", list(tokenizers_family.FAMILIES))
def test_places_and_thoughts_with_every_tokenizer(family, tmp_path):
    """The text before a place is that of the tokens before it, and the tags are found again in the text."""
    tokenizer = tokenizers_family.make(family)
    ensure_delimiters(tokenizer)
    file = tmp_path / "docs.jsonl"
    lines = tokenizers_family.LINES[:3]
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    config = build({"model": "none", "data": {"path": str(file), "append_eos": False}})
    objective = load_objective(config, tokenizer)
    rows = list(RowReader(config.data, tokenizer, 2, cells=False)({"text": lines}, range(3)))
    reader, places, usable = ThoughtReader(objective, Limits()), 0, 0
    for row, line in zip(rows, lines, strict=True):
        (piece,) = row.pieces
        ids = piece.document.token_ids
        for i in range(1, len(ids)):
            cut = piece.cut(i)
            if cut is None:
                continue
            places += 1
            before = tokenizer.decode(ids[:i], skip_special_tokens=True).strip()
            if family in tokenizers_family.LOSSLESS:
                assert before == line[:cut].strip()
            said = tuple(tokenizer("two apples", add_special_tokens=False)["input_ids"])
            thought = Thought((*said, reader.close), (0.0,) * (len(said) + 1), FinishReason.CLOSE, 0, 1)
            position = Position(piece.document.id, i, ids[:i], ids[i : i + 2])
            candidate = reader(thought, piece, position, cut)
            usable += candidate.problem is None
            whole = line[:cut] + candidate.written + line[cut:]
            assert strip_thoughts(whole).replace(" ", "") == line.replace(" ", "")
        end = Position(piece.document.id, len(ids), ids, ())
        assert piece.end() == len(line) and reader(thought, piece, end, len(line)).problem is None
    assert places >= 15 and usable == places


def test_a_tag_that_is_spelled_out_is_found(tmp_path):
    """Ordinary pieces that spell a tag would be read as the tag in training."""
    tokenizer = tokenizers_family.make("byte_bpe")
    spelled = tuple(tokenizer("two </think> two", add_special_tokens=False)["input_ids"])
    ensure_delimiters(tokenizer)
    config = build({"model": "none", "data": str(tmp_path / "none.jsonl"), "output_dir": str(tmp_path)})
    reader = ThoughtReader(load_objective(config, tokenizer), Limits())
    (row,) = RowReader(config.data, tokenizer, 2, cells=False)({"text": ["two and two is four"]}, range(1))
    (piece,) = row.pieces
    ids = (*spelled, reader.close)
    thought = Thought(ids, (0.0,) * len(ids), FinishReason.CLOSE, 0, 1)
    end = Position("0", len(piece.document.token_ids), piece.document.token_ids, ())
    assert reader.close not in spelled
    assert reader(thought, piece, end, piece.end()).problem == "unreadable"


def test_no_place_inside_a_word_or_character(tmp_path):
    tokenizer = tokenizers_family.make("byte_bpe")
    config = build({"model": "none", "data": {"path": str(tmp_path / "none.jsonl"), "append_eos": False}})
    text = "unbelievable 日本 naïveté"
    (row,) = RowReader(config.data, tokenizer, 2, cells=False)({"text": [text]}, range(1))
    (piece,) = row.pieces
    cuts = {piece.cut(i) for i in range(1, len(piece.document.token_ids))} - {None}
    assert cuts <= {12, 13, 14, 15, 16} and 12 in cuts


def test_the_best_candidate_is_chosen():
    def candidate(gain: float | None, problem: str | None = None) -> Candidate:
        thought = Thought((1,), (0.0,), FinishReason.CLOSE, 0, 1)
        return Candidate(thought, (1,), "a", "a", None, problem, gain=gain)

    some = [candidate(0.1), candidate(None, "leak"), candidate(0.3), candidate(-1.0), candidate(0.3)]
    assert choose(some, Limits(min_gain=0.0)) == (some[2], {"leak": 1, "gain": 1, "spare": 2})
    assert choose(some, Limits(min_gain=0.3)) == (None, {"leak": 1, "gain": 4})
    nan = [candidate(float("nan"))]
    assert choose(nan, Limits(min_gain=-100.0)) == (None, {"gain": 1})
    assert choose(some[1:], Limits()) == (some[2], {"leak": 1, "spare": 2})


def test_the_chat_template_goes_around_the_prompt():
    tokenizer = tokenizers_family.make("byte_bpe")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|bot|>"]})
    ensure_delimiters(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|bot|><think>\n{% endif %}"
    )
    template = chat_template(tokenizer, "expert", Delimiters())
    words = TEMPLATES["expert"].strip()
    assert template == f"<|user|>{words}<|bot|>"
    prompt = ThoughtPrompt(tokenizer, template=template)
    ids = prompt(Position("0", 2, tuple(tokenizer("two apples")["input_ids"]), ())).token_ids
    user, bot = tokenizer.convert_tokens_to_ids(["<|user|>", "<|bot|>"])
    assert ids[0] == user and ids[-2:] == (bot, prompt.open_id)
    assert "two apples" in tokenizer.decode(ids)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        chat_template(tokenizer, "expert", Delimiters())


def test_the_example_is_a_configuration():
    file = ROOT / "examples" / "mixtures" / "augmented.yaml"
    config = load_config(file, (), config_of)
    assert config.objective == {"name": "ntp"} and set(config.data.sources) == {"plain", "thoughts"}
    command = " ".join(line.lstrip("#").strip(" \\") for line in file.read_text().splitlines()[2:5])
    assert "--where inferable" in command and str(config.data.sources["thoughts"].path) in command
