"""`rlpretrain init`: what it writes runs, says the same as its values, and fits the memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rlpretrain import Pretrainer
from rlpretrain.cli import main
from rlpretrain.config import ConfigError, DataConfig
from rlpretrain.config.io import build, load_config
from rlpretrain.data.opening import first_rows
from rlpretrain.objectives import config_of
from rlpretrain.tools import first_config
from rlpretrain.tools.commented import as_yaml
from rlpretrain.tools.first_config import SAVINGS, make_first_config
from rlpretrain.tools.first_data import Request, choose_columns


def rows_of(path: Path, *rows: dict[str, str]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def request(corpus: Path, **changes) -> Request:
    return Request(
        **{"model": str(corpus / "base"), "data": str(corpus / "train.jsonl"), "device": "cpu"} | changes
    )


def test_what_it_writes_trains(corpus, tmp_path, capsys):
    out, run = tmp_path / "made" / "rlp.yaml", tmp_path / "run"
    command = ["init", str(corpus / "base"), str(corpus / "train.jsonl"), "--out", str(out), "--steps", "2"]
    held_out = ["--held-out", str(corpus / "held_out.jsonl"), "--device", "cpu", "--output-dir", str(run)]
    assert main(command + held_out) == 0
    printed = capsys.readouterr().out
    assert out.read_text() in printed and f"rlpretrain train {out}" in printed
    config = load_config(out, find=config_of)
    assert config.eval.data == str(corpus / "held_out.jsonl") and config.device == "cpu"
    Pretrainer(config).train()
    assert len((run / "metrics.jsonl").read_text().splitlines()) >= 2
    assert main(command + held_out) == 2  # it overwrites nothing
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{}, {"device": "cuda", "gib": 80.0}, {"objective": "ntp"}])
def test_the_file_says_what_was_checked(corpus, tmp_path, changes):
    first = make_first_config(request(corpus, output_dir=str(tmp_path / "a: b #c"), **changes))
    file = tmp_path / "written.yaml"
    file.write_text(as_yaml(first))
    assert load_config(file, find=config_of) == build(first.values, config_of)
    assert all(name in _dotted(first.values) for name in first.comments)
    assert ("sampling" in first.values) == (changes.get("objective") != "ntp")


def _dotted(values, before=""):
    found = set()
    for name, value in values.items():
        found |= {before + name} | (_dotted(value, f"{before}{name}.") if isinstance(value, dict) else set())
    return found


def test_less_memory_takes_the_next_saving_until_nothing_fits(corpus):
    """Four gigabytes more or less: the base has few parameters, so activations decide at first."""
    seen = []
    for gib in (40.0, 4.0, 2.0, 1.0, 0.7, 0.66, 0.63, 0.5):
        try:
            first = make_first_config(request(corpus, gib=gib))
        except ConfigError as error:
            assert "take a smaller model" in str(error)
            break
        reason = first.comments.get("model.gradient_checkpointing", "")
        seen.append([known for known, _, _ in SAVINGS].index(reason))
        needed = float(next(note for note in first.notes if "at most" in note).split()[4])
        assert needed <= gib
    else:
        pytest.fail("half a gigabyte holds the libraries alone")
    assert seen == sorted(seen) and seen[0] == 0


def test_processes_share_a_step(corpus):
    first = make_first_config(request(corpus, device="cuda", gib=80.0, processes=3))
    config = build(first.values, config_of)
    assert config.positions_per_step % 3 == 0
    assert config.policy.backend == "deepspeed" and config.engine.name == "hf"
    assert any("vllm_server or ray" in note for note in first.notes)


def test_a_gpu_that_is_not_here_has_no_known_memory(corpus):
    first = make_first_config(request(corpus, device="cuda"))
    assert any("--gib" in note for note in first.notes)


def test_columns(tmp_path):
    asked = Request(model="m", data="d")
    assert choose_columns(["id", "text"], asked) == ("text", None)
    assert choose_columns(["question", "answer", "id"], asked) == ("question", "answer")
    assert choose_columns(["content"], asked) == ("content", None)
    assert choose_columns(["a", "text"], Request(model="m", data="d", column="a")) == ("a", None)
    with pytest.raises(ConfigError, match="which column of d .* a, b"):
        choose_columns(["a", "b"], asked)
    with pytest.raises(ConfigError, match="--column c: d has no such column; it has a, b"):
        choose_columns(["a", "b"], Request(model="m", data="d", column="c"))


def test_a_prompt_with_an_answer_is_thought_about_before_the_answer(corpus, tmp_path):
    data = rows_of(tmp_path / "qa.jsonl", {"question": "one plus one", "answer": "two"})
    first = make_first_config(request(corpus, data=data))
    assert first.values["data"]["answer_column"] == "answer"
    assert first.values["objective"]["positions"] == "answer"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"objective": "rpl"}, "rpl"),
        ({"model": "./no-model"}, "no-model"),
    ],
)
def test_bad_input_is_refused(corpus, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_first_config(request(corpus, **changes))


def test_without_a_terminal_arguments_are_demanded(capsys):
    assert main(["init"]) == 2
    assert "init needs MODEL" in capsys.readouterr().err


def test_long_documents_are_bounded_by_the_model(corpus, tmp_path):
    data = rows_of(tmp_path / "long.jsonl", *[{"text": "one plus two . " * 200}] * 3)
    first = make_first_config(request(corpus, data=data, device="cuda", gib=80.0))
    config = json.loads((corpus / "base" / "config.json").read_text())
    longest = first.values["data"]["max_length"] + first.values["sampling"]["max_thought_tokens"]
    assert longest + 64 <= config["max_position_embeddings"]
    assert "positions" in first.comments["data.max_length"]


def test_texts_are_measured_and_not_their_json(corpus, tmp_path):
    """Cells of local files are JSON inside: a letter outside ASCII has six characters there."""
    letters = "é" * 100
    data = rows_of(tmp_path / "letters.jsonl", *[{"text": letters}] * 5)
    assert first_rows(DataConfig(path=data), 2) == [{"text": letters}] * 2
    tokenizer = AutoTokenizer.from_pretrained(corpus / "base")
    wanted = len(tokenizer(letters, add_special_tokens=False)["input_ids"]) + 2
    length = make_first_config(request(corpus, data=data)).values["data"]["max_length"]
    assert length == 64 or length // 2 < wanted <= length


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "chat"}, "column 'messages' of .* holds list, not text: .* write chat messages as text"),
        ({"held_out": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"objective": "remit"}, "set reference.path"),
        ({"objective": "bow"}, "baseline.name self does not fit"),
        ({"model": "runs/no-model/there"}, "no-model"),
    ],
)
def test_what_the_next_command_would_refuse_is_refused(corpus, tmp_path, changes, message):
    if changes.get("data") == "chat":
        rows = [{"messages": [{"role": "user", "content": "hello"}]}]
        changes = {"data": rows_of(tmp_path / "chat.jsonl", *rows)}
    with pytest.raises(ConfigError, match=message):
        make_first_config(request(corpus, **changes))


def test_fields_may_follow(corpus, tmp_path):
    out = tmp_path / "bow.yaml"
    command = [
        "init",
        str(corpus / "base"),
        str(corpus / "train.jsonl"),
        "--out",
        str(out),
        "--device",
        "cpu",
    ]
    assert main([*command, "--objective", "bow", "--baseline.name", "frozen", "--optim.lr", "3e-4"]) == 0
    config = load_config(out, find=config_of)
    assert config.baseline.name == "frozen" and config.optim.lr == 3e-4
    assert "paper" not in out.read_text()  # the comment of the rate that was replaced


def test_what_the_user_sets_stays_whatever_saves_memory(corpus, monkeypatch):
    monkeypatch.setattr(first_config, "SAVINGS", SAVINGS[3:])  # adapters, with a rate of their own
    fields = {"optim": {"lr": 0.5}, "sampling": {"max_thought_tokens": 7}, "token_budget": 512}
    first = make_first_config(request(corpus, gib=40.0, fields=fields))
    config = build(first.values, config_of)
    assert config.model.gradient_checkpointing and config.policy.lora
    assert (config.optim.lr, config.sampling.max_thought_tokens, config.token_budget) == (0.5, 7, 512)


def test_compiled_layers_get_the_backend_that_takes_them(corpus):
    config = build(make_first_config(request(corpus, device="cuda", gib=80.0)).values, config_of)
    assert config.model.compile and config.policy.backend == "torch"


def test_documents_too_long_for_their_answer_are_said_to_be_left_out(corpus, tmp_path):
    data = rows_of(tmp_path / "qa.jsonl", *[{"question": "one plus one", "answer": "two"}] * 3)
    first = make_first_config(request(corpus, data=data))
    assert first.comments["data.max_length"].endswith("longer ones are left out")
