"""The examples run to their end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples import gsm8k_base, gsm8k_rlp, smollm2_checkpoint, smollm2_rlp
from rlpretrain.config import ConfigError


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty problems as GSM8K writes them."""
    file = tmp_path_factory.mktemp("problems") / "train.jsonl"
    rows = []
    for i in range(60):
        a, b = i + 3, 2 * i + 5
        rows.append(
            {
                "question": (
                    f"Ann has {a} apples and buys {b} more. She gives half of them away. How many did she "
                    "have before?"
                ),
                "answer": f"Ann had {a} + {b} = <<{a}+{b}={a + b}>>{a + b} apples.\n#### {a + b}",
            }
        )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_documents_hold_no_annotations():
    text = gsm8k_base.document("How many? ", "48/2 = <<48/2=24>>24 clips, $<<3*2=6>>6 each.\n#### 24")
    assert text == "How many?\n48/2 = 24 clips, $6 each.\n#### 24"


def test_gsm8k_runs_to_the_end_and_reports_its_gain(
    problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "gsm8k"
    command = ["--data", str(problems), "--out", str(out), "--quick", "--console", "false", "--device", "cpu"]
    assert gsm8k_rlp.main([*command, "--optim.lr", "1e-3"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["documents"] == {"documents": 57, "held_out": 3} and results["steps"] == 4
    for name in gsm8k_rlp.SHOWN:
        for part in ("before", "after"):
            low, high = results[part][f"{name}_ci"]
            assert low <= results[part][name] <= high
    assert results["before"]["direct_gain"] == 0.0
    low, high = results["change"]["gain_frozen_ci"]
    assert low <= results["change"]["gain_frozen"] <= high
    documents = [json.loads(line)["text"] for line in (out / "documents.jsonl").read_text().splitlines()]
    assert len(documents) == 57 and not any("<<" in text for text in documents)
    for file in (
        "held_out.jsonl",
        "base/model/config.json",
        "rlp/model/model.safetensors",
        "rlp/metrics.jsonl",
    ):
        assert (out / file).exists()
    assert json.loads((out / "rlp" / "run.json").read_text())["config"]["optim"]["lr"] == 1e-3
    said = capsys.readouterr().out
    assert "thought_worth" in said and "gain_frozen" in said

    assert gsm8k_rlp.main(command) == 2  # the folder holds a run: nothing is overwritten unasked
    assert "--fresh" in capsys.readouterr().err


def test_a_base_checkpoint_of_ones_own_is_used(problems: Path, corpus: Path, tmp_path: Path):
    command = [
        "--data",
        str(problems),
        "--out",
        str(tmp_path / "own"),
        "--model",
        str(corpus / "base"),
        "--quick",
    ]
    changes = ["--steps", "1", "--objective", "{name: rlp}", "--console", "false", "--device", "cpu"]
    assert gsm8k_rlp.main([*command, *changes]) == 0
    assert not (tmp_path / "own" / "base").exists()
    assert json.loads((tmp_path / "own" / "results.json").read_text())["model"] == str(corpus / "base")


def test_bad_input_ends_with_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert gsm8k_rlp.main(["--data", str(tmp_path / "missing.jsonl"), "--out", str(tmp_path / "out")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert (
        gsm8k_rlp.main(["--data", "x.jsonl", "--out", str(tmp_path / "out"), "--sampling.thougths", "4"]) == 2
    )
    assert "did you mean 'thoughts'?" in capsys.readouterr().err


def test_the_trl_script_trains_and_saves(corpus: Path, tmp_path: Path):
    pytest.importorskip("trl")
    from examples import trl_rlp

    common = [
        "--model_name_or_path",
        str(corpus / "base"),
        "--dataset_name",
        str(corpus / "train.jsonl"),
        "--positions",
        "after",
        "--marker",
        "shows",
        "--max_steps",
        "1",
        "--num_generations",
        "4",
        "--per_device_train_batch_size",
        "4",
        "--max_completion_length",
        "4",
        "--cut",
        "force_close",
        "--use_cpu",
        "--bf16",
        "false",
        "--report_to",
        "none",
        "--disable_tqdm",
        "true",
    ]
    trl_rlp.main([*common, "--output_dir", str(tmp_path / "whole")])
    assert (tmp_path / "whole" / "model.safetensors").exists() and "2510.01265" in (
        tmp_path / "whole" / "README.md"
    ).read_text()
    trl_rlp.main([*common, "--output_dir", str(tmp_path / "lora"), "--use_peft"])
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()


# the real checkpoint


def test_a_checkpoint_of_other_bytes_is_refused(tmp_path, monkeypatch):
    other = tmp_path / smollm2_checkpoint.FILE
    other.write_bytes(b"GGUF")
    monkeypatch.setattr(smollm2_checkpoint, "gguf_file", lambda: other)
    with pytest.raises(ConfigError, match="has the SHA-256 .* expected b179c952"):
        smollm2_checkpoint.make_checkpoint(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_checkpoint_runs_to_the_end(tmp_path, capsys):
    """Two layers of SmolLM2 with its own tokenizer, on sentences of GSM8K; a second call continues."""
    out = tmp_path / "smollm2"
    command = ["--quick", "--out", str(out), "--seeds", "0"]
    assert smollm2_rlp.main(command) == 0
    results = json.loads((out / "results.json").read_text())
    for name in smollm2_rlp.LABELS:
        for number in smollm2_rlp.NUMBERS:
            low, high = results[name][f"{number}_ci"]
            assert low <= results[name][number] <= high
        gains, empty = results[name]["gain_frozen"], results[name]["empty"]
        assert results[name]["over_empty"] == pytest.approx(gains - empty, abs=1e-6)
    assert results["base"]["gain"] == results["base"]["gain_frozen"] != results["rlp"]["gain_frozen"]
    log = (out / "rlp-0" / "metrics.jsonl").read_text()
    assert len(log.splitlines()) == 2 and "SmolLM2-135M" in capsys.readouterr().out
    assert smollm2_rlp.main(command) == 0  # nothing is trained again
    assert (out / "rlp-0" / "metrics.jsonl").read_text() == log


def test_the_sentences_of_gsm8k_and_their_thoughts(tmp_path):
    smollm2_rlp.write_documents(smollm2_rlp.LINES, tmp_path, 250)
    held_out, documents, traces = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("held_out", "documents", "traces")
    )
    assert len(held_out) + len(documents) == 2336 and len(documents) == len(traces)
    assert not any("<<" in row["text"] for row in held_out + documents)
    for row, document in zip(traces, documents, strict=True):
        thought, after = row["answer"].removeprefix("<<").split(">>")
        assert row["question"] + after == document["text"] and row["question"].endswith("=")
        values = [eval(step) for step in thought.split("=")]  # sums and products of numbers
        assert values == pytest.approx([values[0]] * len(values))
        assert thought.split("=")[-1] in after.replace(",", "") and len(values) >= 2
