"""The corpora of examples/mixtures, and their comparisons in small."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.graphs import shuffled_thoughts
from examples.mixtures import front_loading, quality
from rlpretrain.corpora import dial
from rlpretrain.experiments.compare import compare
from tests.builders.runs import ROOT

EXAMPLES = ROOT / "examples" / "mixtures"
STEP = re.compile(r"(\d) (?:\w+ )?(up|down|times)(\d) (?=(\d))")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def right_steps(text: str) -> list[bool]:
    """Whether each step of a trace, `6 bob up3 9`, has the operation asked for and the right result."""
    question, _, trace = text.rpartition(" so ")
    asked = re.findall(r"(?:up|down|times)\d", question)
    effects = {"up": lambda a, b: a + b, "down": lambda a, b: a - b, "times": lambda a, b: a * b}
    steps = STEP.findall(trace)
    right = [effects[kind](int(a), int(b)) % 10 == int(c) for a, kind, b, c in steps]
    return [
        is_right and (not asked or kind + b == asked[place])
        for place, (is_right, (_, kind, b, _)) in enumerate(zip(right, steps, strict=True))
    ]


def small(folder: Path, name: str, paths: dict[str, str], methods: tuple[str, ...], **common: Any) -> Path:
    """An experiment of the examples with its files beside it, other paths, few steps and some methods."""
    for file in EXAMPLES.glob("*.yaml"):
        text = file.read_text()
        for old, new in paths.items():
            text = text.replace(old, new)
        (folder / file.name).write_text(text)
    values = yaml.safe_load((folder / name).read_text())
    values["methods"] = {method: values["methods"][method] for method in methods}
    for method in values["methods"].values():  # some methods set these themselves
        if "max_steps" in method.get("set", {}):
            method["set"]["max_steps"] = common["max_steps"]
    values |= {"seeds": [0], "jobs": 1, "common": values.get("common", {}) | common}
    values["evaluation"] |= (
        {"documents": 8, "thoughts": 2} if "thoughts" in values["evaluation"] else {"documents": 8}
    )
    (folder / name).write_text(yaml.safe_dump(values))
    return folder / name


def test_the_share_of_wrong_steps_is_what_the_quality_says(tmp_path):
    assert quality.main(["--out", str(tmp_path), "--train", "4000", "--held-out", "60"]) == 0
    rows = rows_of(tmp_path / "all.jsonl")
    assert {row["quality"] for row in rows} == {k / 10 for k in range(11)}
    for wanted in (0.0, 0.5, 0.9):
        texts = [row["text"] for row in rows if row["quality"] == wanted and " so " in row["text"]]
        steps = [step for text in texts for step in right_steps(text)]
        share, expected = sum(steps) / len(steps), 1 - (1 - wanted) / 2
        assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / len(steps)) ** 0.5)
    best = rows_of(tmp_path / "best.jsonl")
    assert best == [row for row in rows if row["quality"] >= quality.BEST]
    assert all(all(right_steps(row["text"])) for row in rows_of(tmp_path / "held_out.jsonl"))


def test_order_decay_and_average_in_small(tmp_path):
    quality.main(["--out", str(tmp_path / "quality"), "--train", "96", "--held-out", "8"])
    paths = {"runs/quality": str(tmp_path / "quality"), "tests/data": str(ROOT / "tests" / "data")}
    methods = ("uniform_constant", "ascending_decay")
    settings = {"max_steps": 3, "eval": {"every": 0, "documents": 8}, "average": {"last": 2, "every": 1}}
    results = compare(small(tmp_path, "order_compare.yaml", paths, methods, **settings))
    for method in methods:
        logged = results["methods"][method]["logged"]
        assert {"eval/no_think_loss", "eval_averaged/no_think_loss"} <= set(logged)
    wanted = json.loads((tmp_path / "quality" / "compare" / "ascending_decay-0" / "wanted.json").read_text())
    assert wanted["data"]["order_by"] == "quality" and wanted["optim"]["schedule"]["name"] == "wsd"


def test_traces_at_other_times_in_small(tmp_path):
    dial.write(tmp_path / "front" / "dial", base=50, train=50, held_out=12)
    assert front_loading.main(["--out", str(tmp_path / "front"), "--train", "300", "--held-out", "8"]) == 0
    plain, traces = (rows_of(tmp_path / "front" / f"{name}.jsonl") for name in ("plain", "traces"))
    assert not any(right_steps(row["text"]) for row in plain)
    assert sum(bool(right_steps(row["text"])) for row in traces) > len(traces) / 2
    paths = {"runs/front_loading": str(tmp_path / "front")}
    settings = {"max_steps": 5, "positions_per_step": 8}
    file = small(tmp_path, "front_loading.yaml", paths, ("last", "none", "last_rlp"), **settings)
    results = compare(file)
    log = rows_of(tmp_path / "front" / "compare" / "last-0" / "metrics.jsonl")
    assert [row["source/traces/weight"] for row in log] == [0, 0, 0, 1, 1]
    assert (
        results["methods"]["last_rlp"]["spent"]["flops_with_stages"]
        > results["methods"]["last"]["spent"]["flops"]
    )
    assert {"eval/plain/no_think_loss", "eval/traces/no_think_loss"} <= set(
        results["methods"]["last"]["logged"]
    )


def test_continued_pretraining_in_small(tmp_path):
    dial.write(tmp_path / "m" / "new", base=60, train=20, held_out=12)
    for name in ("old", "old_held", "new_held"):
        dial.write(tmp_path / "m" / name, base=60, train=20, held_out=12, seed=len(name))
    settings = {"max_steps": 4, "positions_per_step": 8, "eval": {"every": 2, "documents": 4}}
    methods = ("old", "joint", "rewarmed_5", "gentle_0")
    results = compare(
        small(tmp_path, "continual.yaml", {"runs/mixtures": str(tmp_path / "m")}, methods, **settings)
    )
    for method in methods:
        assert {"eval/old/no_think_loss", "eval/new/no_think_loss"} <= set(
            results["methods"][method]["logged"]
        )
    wanted = json.loads((tmp_path / "m" / "continual" / "gentle_0-0" / "wanted.json").read_text())
    assert wanted["model"]["path"].endswith("old-0/model") and wanted["optim"]["lr"] == 2e-4
    assert wanted["data"]["sources"]["old"]["weight"] == 0


def test_shuffled_thoughts_keep_everything_but_the_thought(tmp_path):
    thoughts = [[" a = 1 ;"], [], [" b = 2 ;"], [" c = 3 ;"]]
    lines = [
        {
            "text": f"q{i} ask" + "".join(f" <think>{text} </think>" for text in texts) + f" {i} .",
            "row": i,
            "thoughts": [{"text": text} for text in texts],
        }
        for i, texts in enumerate(thoughts)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert shuffled_thoughts.main([str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]) == 0
    assert [row["text"] for row in rows_of(tmp_path / "out.jsonl")] == [
        "q0 ask <think> b = 2 ; </think> 0 .",
        "q2 ask <think> c = 3 ; </think> 2 .",
        "q3 ask <think> a = 1 ; </think> 3 .",
    ]
    lines[0]["text"] += lines[0]["thoughts"][0]["text"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(SystemExit, match="row 0: its thought is not exactly once"):
        shuffled_thoughts.main([str(tmp_path / "in.jsonl"), str(tmp_path / "out2.jsonl")])
