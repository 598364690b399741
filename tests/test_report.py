"""The report: what it shows is what the scorer says, hostile thoughts stay text, and a broken run gives
what there is.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rewards import importance_ratio
from rlpretrain import Pretrainer
from rlpretrain.cli import main
from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.evaluation.evaluate import MEANING
from rlpretrain.reporting.curves import CURVES
from rlpretrain.reporting.html import Report, gain_colour, list_warnings, render
from rlpretrain.reporting.report import LARGEST, add_thoughts, inspect, read_run, report
from rlpretrain.reporting.token_gains import CONTROLS, score_positions
from rlpretrain.tracking.console import printable
from rlpretrain.tracking.metrics import METRICS
from rlpretrain.types import Document
from rollout.store import Store
from rollout.types import FinishReason, Group, Position, Prompt, Thought
from tests.builders.html import Seen
from tests.builders.runs import merged


@pytest.fixture(scope="module")
def kept(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that kept its rollouts."""
    from tests.builders.configs import tiny_values

    folder = tmp_path_factory.mktemp("report") / "run"
    values = tiny_values(corpus, folder) | {
        "save_rollouts": True,
        "baseline": {"name": "self", "frozen_every": 1},
    }
    values["objective"] = {**values["objective"], "target_length": 2}
    Pretrainer(build(values)).train()
    return folder


def test_what_is_shown_is_what_the_models_say(kept, corpus, tmp_path):
    """Every gain on the page: the trained model after the thought, less the base without one, from
    transformers' own logits.
    """
    page = report(kept, tmp_path / "page.html").read_text()
    live = AutoModelForCausalLM.from_pretrained(kept / "model").eval()
    base = AutoModelForCausalLM.from_pretrained(corpus / "base").eval()
    groups = Store(kept / "rollouts").read(3)[0]

    def logps(model: Any, head: tuple[int, ...], target: tuple[int, ...]) -> torch.Tensor:
        with torch.no_grad():
            rows = model(input_ids=torch.tensor([[*head, *target]])).logits[0].log_softmax(-1)
        return torch.stack([rows[len(head) + k - 1, t] for k, t in enumerate(target)])

    found = re.findall(r'<details id="d\d+p\d+".*?</details>', page, re.S)
    assert len(found) == len(groups) == 4
    seen = []
    for group in groups:
        for t in group.thoughts:
            close = () if t.finish_reason is FinishReason.CLOSE else group.prompt.close_ids
            after = logps(live, (*group.prompt.token_ids, *t.token_ids, *close), group.position.target_ids)
            seen.append(
                float((after - logps(base, group.position.context_ids, group.position.target_ids)).sum())
            )
    shown = [re.findall(r'<tr data-gain="([^"]+)"[^>]*data-count="(\d+)"', part) for part in found]
    gains = [float(x) for of_position in shown for x, times in of_position for _ in range(int(times))]
    assert sorted(gains) == pytest.approx(sorted(seen), abs=1e-4)
    for part in found:  # the most advantageous first
        rows = [
            re.findall(r'<td class="n">([^<]*)</td>', row)[1]
            for row in re.findall(r"<tr data-gain.*?</tr>", part, re.S)
        ]
        assert [float(x) for x in rows] == sorted((float(x) for x in rows), reverse=True)
        assert all(text in part for text in CONTROLS.values())
    tree = Seen(page)
    links = [a["href"] for tag, a in tree.tags if tag == "a" and "title" in a]
    assert len(links) == 8 and {link[1:] for link in links} <= {
        a.get("id") for _, a in tree.tags
    }  # two target tokens a position
    assert (
        "Curves" in tree.text and "Settings and versions" in tree.text and "What is missing" not in tree.text
    )


def test_the_page_stands_alone_and_can_be_used_without_eyes_or_mouse(kept, tmp_path):
    tree = Seen(report(kept, tmp_path / "page.html").read_text())
    names = [tag for tag, _ in tree.tags]
    assert not {"link", "img", "iframe", "object", "embed"} & set(names) and names.count("script") == 1
    for tag, a in tree.tags:
        assert not any(k.startswith("on") for k in a), (tag, a)
        for k in ("src", "href", "xlink:href", "action"):
            assert (a.get(k) or "#").startswith("#"), (tag, a)
    policy = next(
        a for tag, a in tree.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy["content"].startswith("default-src 'none'")
    assert next(a for tag, a in tree.tags if tag == "html")["lang"] == "en"
    assert all(
        a.get("aria-label") for tag, a in tree.tags if tag == "figure" or (tag == "a" and "title" in a)
    )
    assert all(a.get("scope") for tag, a in tree.tags if tag == "th")
    levels = [int(tag[1]) for tag in names if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))
    assert len({a["id"] for _, a in tree.tags if "id" in a}) == sum("id" in a for _, a in tree.tags)


HOSTILE = (
    "<script>alert(1)</script>",
    "</td></tr></table><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "{{ 7 * 7 }}{% raw %}",
    "\u202eright to left\u2066",
    "\x00\x07\x1b[31mred\x7f",
    "<!--",
    "]]>",
    "👩‍👩‍👧‍👦 ok",
    "&amp;&lt;",
    "\ud800 lone",
    "x" * 100_000,
    "a\u0300" * 900,
)


TAGS_OF_A_REPORT = """
    article h3 a q p span div details summary table thead tbody tr th td label input select option output
"""


class Words:
    """A tokenizer that says hostile things: token k is the k-th of them."""

    all_special_ids: list[int] = []
    pad_token_id = 0

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(HOSTILE[i % len(HOSTILE)] for i in ids)


def hostile_page(documents: int = 1) -> Report:
    out = []
    for d in range(documents):
        ids = tuple(range(len(HOSTILE)))
        thoughts = tuple(Thought((k,), (0.0,), FinishReason.CLOSE, 0, 0) for k in ids)
        group = Group(
            f"g{d}",
            Position(HOSTILE[0], 3, ids[:3], ids[3:]),
            Prompt(ids[:3], ()),
            thoughts,
            0,
            rewards=tuple(float(k) for k in ids),
        )
        out.append((Document(HOSTILE[1], ids), score_positions([group], {})))
    record = {"config": {"x": HOSTILE[0]}, "versions": {HOSTILE[2]: HOSTILE[0]}, "stopped": HOSTILE[1]}
    return Report(HOSTILE[0], out, Words(), record)


def test_hostile_thoughts_stay_text(tmp_path):
    page = render(hostile_page())
    tree, clean = Seen(page), Seen(render(Report("t", record={"config": {"x": "y"}})))
    ours = set(TAGS_OF_A_REPORT.split())
    assert {tag for tag, _ in tree.tags} <= {tag for tag, _ in clean.tags} | ours
    assert sum(tag == "script" for tag, _ in tree.tags) == 1
    assert not any("onmouseover" in a or "onerror" in a for _, a in tree.tags)
    assert "<script>alert(1)</script>" in tree.text and "{{ 7 * 7 }}" in tree.text and "49" not in tree.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page)
    assert (
        "␀␇␛[31mred⟨U+007F⟩" in html.unescape(page)
        and "⟨U+202E⟩right to left" in page
        and "⟨U+D800⟩ lone" in page
    )
    assert "👩‍👩‍👧‍👦 ok" in page and "characters left out" in page
    assert len(page.encode()) < LARGEST
    page.encode("utf-8")


def test_a_page_never_outgrows_its_size(monkeypatch, tmp_path):
    from rlpretrain.reporting import report as module

    monkeypatch.setattr(module, "LARGEST", 300_000)
    page = hostile_page(documents=40)
    out = module.write_report(page, tmp_path / "page.html")
    assert out.stat().st_size < 300_000 and 0 < len(page.documents) < 40
    assert re.search(r"documents: only \d+ are shown", out.read_text())
    assert not list(tmp_path.glob(".*tmp"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain\ntext\t", "plain\ntext\t"),
        ("\x1b[0m", "␛[0m"),
        ("a\u200bb", "a⟨U+200B⟩b"),
        ("é漢👍🏽", "é漢👍🏽"),
        ("", ""),
    ],
)
def test_printable(text, expected):
    assert printable(text) == expected


def test_every_curve_is_of_something_that_is_logged():
    """By name: a panel of names that nobody logs would never be missed."""
    ratios = importance_ratio(
        torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), torch.ones(1, 1, 1, dtype=torch.bool), cap=2.0
    )
    known = {
        *METRICS,
        *(f"{e}/{n}" for e in ("eval", "eval_averaged") for n in MEANING),
        *(f"sampling/{n}" for n in ratios.diagnostics),
    }
    assert {name for names in CURVES.values() for name in names} <= known


def test_long_text_is_cut_in_the_middle():
    text = printable("a" * 5000 + "END", 100)
    assert (
        text.startswith("a" * 75)
        and text.endswith("END")
        and "4903 characters left out" in text
        and len(text) < 200
    )


def test_colours_are_told_apart_and_centred():
    assert gain_colour(0.0, 1.0).endswith(",0.00)") and gain_colour(2.0, 1.0) == gain_colour(1.0, 1.0)
    blue, orange = (tuple(map(int, re.findall(r"\d+", gain_colour(g, 1.0))[:3])) for g in (1.0, -1.0))
    assert (
        blue[2] > blue[0] + 100 and orange[0] > orange[2] + 100
    )  # they differ in the blue that all colour-blind eyes see


def test_warnings_in_words():
    steady = {"ntp/loss": 1.0, "ig/frozen": 0.5, "thought/leakage": 0.2, "completions/clipped_ratio": 0.0}
    rows = [{"step": k, **steady} for k in range(1, 21)]
    assert list_warnings(rows, []) == []
    ends = {"ntp/loss": 1.5, "ig/frozen": -1.0, "thought/leakage": 0.9}
    said = list_warnings([*rows, *[{"step": k, **ends} for k in range(21, 41)]], [])
    assert [line.split(":")[0] for line in said] == ["Step 22", "Step 23", "Step 23"], said
    assert any("loss without a thought rose from 1.00" in line for line in said)
    thought = Thought((5,), (0.0,), FinishReason.CLOSE, 0, 0)
    group = Group("g", Position("d", 1, (1,), (2,)), Prompt((1,), ()), (thought,), 0)
    (place,) = score_positions([group], {})
    rows = [replace(place.thoughts[0], gains=(1.0,))]
    assert "Delimiter only" in list_warnings([], [replace(place, thoughts=rows, controls={"empty": 0.95})])[0]
    assert not list_warnings([], [replace(place, thoughts=rows, controls={"empty": 0.2})])
    (said,) = list_warnings(
        [], [replace(place, thoughts=[replace(place.thoughts[0], gains=(-6.3,))], controls={"empty": -6.1})]
    )
    assert "Thoughts cost: these gain -6.30 nats on average, an empty one -6.10" in said


def edited(name: str, old: str, new: str) -> Any:
    """A change of a file of a run; `{base}` is its base model."""

    def change(folder: Path) -> None:
        text, base = (
            (folder / name).read_text(),
            json.loads((folder / "run.json").read_text())["config"]["model"]["path"],
        )
        assert old.replace("{base}", base) in text
        (folder / name).write_text(text.replace(old.replace("{base}", base), new))

    return change


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda f: shutil.rmtree(f / "model"), "is written when a run ends"),
        (
            lambda f: (f / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo'),
            "that is not whole",
        ),
        (lambda f: (f / "metrics.jsonl").unlink(), "metrics.jsonl (curves)"),
        (lambda f: (f / "run.json").write_text('{"status": "runn'), "run.json (settings and versions)"),
        (lambda f: (f / "run.json").unlink(), "run.json (settings and versions)"),
        (
            lambda f: next(f.glob("rollouts/step-000003*.groups.parquet")).write_bytes(b"PAR1"),
            "not a readable parquet file",
        ),
        (lambda f: [p.unlink() for p in (f / "rollouts").glob("*.documents.parquet")], "thoughts:"),
        (lambda f: older(f / "rollouts"), "schema version 0"),
        (edited("run.json", '"status": "done"', '"status": "running"'), "the run's status is"),
        (
            edited("run.json", '"path": "{base}"', '"path": "/nowhere"'),
            "so gains are against the model itself",
        ),
    ],
)
def test_a_broken_run_gives_what_there_is(kept, tmp_path, broken, said):
    folder = tmp_path / "run"
    shutil.copytree(kept, folder)
    broken(folder)
    page = report(folder).read_text()
    text = Seen(page).text
    assert "What is missing here" in text and said in html.unescape(text), text[:2000]
    assert (folder / "report.html").exists()


def older(folder: Path) -> None:
    import pyarrow.parquet as pq

    for path in folder.glob("*.parquet"):
        table = pq.read_table(path)
        about = {**table.schema.metadata, b"schema_version": b"0"}
        pq.write_table(table.replace_schema_metadata(about), path)


def test_runs_without_rollouts_and_without_thoughts(values, corpus, tmp_path):
    Pretrainer(build(values)).train()
    text = Seen(report(values["output_dir"]).read_text()).text
    assert "these thoughts were sampled now" in text and "thoughts" in text
    plain = merged(values, objective="ntp", positions_per_step=4, output_dir=str(tmp_path / "ntp"))
    Pretrainer(build(plain)).train()
    text = Seen(report(plain["output_dir"]).read_text()).text
    assert "loss without a thought" in text and "What is missing" not in text
    with pytest.raises(ConfigError, match="is no run folder"):
        report(tmp_path)


def test_inspect_any_checkpoint_and_text(corpus, tmp_path, capsys):
    (tmp_path / "docs.txt").write_text(
        "ann has 6 bob up3 cat times3 shows 7 .\nleo has 1 ann up1 shows 2 .\n"
    )
    out = inspect(
        str(corpus / "base"),
        str(tmp_path / "docs.txt"),
        tmp_path / "page.html",
        objective={"every": 2},
        thoughts=2,
        max_thought_tokens=4,
    )
    tree = Seen(out.read_text())
    links = [a for tag, a in tree.tags if tag == "a" and "title" in a]
    assert len(links) == 5 + 4 and all(re.fullmatch(r"[+-]\d+\.\d{4} nats", str(a["title"])) for a in links)
    argv = [
        "inspect",
        str(corpus / "base"),
        "--text",
        str(tmp_path / "docs.txt"),
        "--out",
        str(tmp_path / "cli.html"),
        "--thoughts",
        "2",
        "--max-thought-tokens",
        "4",
        "--objective",
        "{positions: after, marker: shows}",
    ]
    assert main(argv) == 0 and "cli.html" in capsys.readouterr().out
    assert main(["inspect", str(corpus / "base"), "--text", str(tmp_path / "none.txt")]) == 2


def test_without_matplotlib_there_are_no_curves_and_a_line_says_so(kept, tmp_path, monkeypatch):
    for name in {"matplotlib", *(name for name in sys.modules if name.startswith("matplotlib."))}:
        monkeypatch.setitem(sys.modules, name, None)
    report(kept, tmp_path / "page.html")
    text = Seen((tmp_path / "page.html").read_text()).text
    assert 'pip install "rlpretrain[plot]"' in text and "Thoughts" in text


def test_gains_of_places_add_up(corpus):
    """A position's mean over its thoughts; a group that cannot be scored shows what is stored on it."""
    model, tokenizer = (cls.from_pretrained(corpus / "base") for cls in (AutoModelForCausalLM, AutoTokenizer))
    ids = tuple(tokenizer("ann has 6 bob up3 shows 9 .")["input_ids"])
    thoughts = tuple(Thought((k, 4), (0.0, 0.0), FinishReason.CLOSE, 0, k) for k in (8, 9, 10))
    group = Group("g", Position("d", 6, ids[:6], ids[6:8]), Prompt((*ids[:6], 3), (4,), (4,)), thoughts, 0)
    (place,) = score_positions([group], {"d": Document("d", ids)}, model=model.eval())
    assert place.gains == pytest.approx(np.mean([row.gains for row in place.thoughts], axis=0))
    assert sum(row.advantage for row in place.thoughts) == pytest.approx(0.0, abs=1e-6)
    assert [row.advantage for row in place.thoughts] == sorted(
        (row.advantage for row in place.thoughts), reverse=True
    )
    assert set(place.controls) == {"empty", "shuffled"}  # one document: there is no other
    (bare,) = score_positions([replace(group, rewards=(1.0, 0.0, 0.0))], {})
    assert (
        bare.gains == ()
        and [row.reward for row in bare.thoughts] == [1.0, 0.0, 0.0]
        and bare.thoughts[0].advantage == 1.0
    )


@pytest.mark.parametrize(
    ("objective", "low", "high"),
    [({"name": "likelihood", "score": "prob"}, 0.0, 1.0), ({"name": "rlp", "clip": 0.01}, -0.01, 0.01)],
)
def test_rewards_are_those_of_the_objective(values, tmp_path, objective, low, high):
    """Not stored on groups whose reward is made of log-probs: the page has what they earn now, and nothing
    for cut thoughts.
    """
    run = merged(
        values,
        objective=values["objective"] | objective,
        sampling__max_thought_tokens=40,
        save_rollouts=True,
        sampling__cut="mask",
    )
    Pretrainer(build(run)).train()
    page = read_run(tmp_path / "run")
    add_thoughts(page, tmp_path / "run", None, 9, None)
    found = [row for _, there in page.documents for place in there for row in place.thoughts]
    cut = [row for row in found if row.thought.finish_reason is not FinishReason.CLOSE]
    kept = [row for row in found if row not in cut]
    assert (
        cut
        and kept
        and all(row.reward is None and row.advantage is None and row.gain is not None for row in cut)
    )
    assert all(low <= row.reward <= high and row.advantage is not None for row in kept)


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium")
def test_in_a_real_browser(kept, tmp_path):
    """The filter counts, an anchor opens its thoughts, nothing hostile runs, nothing is fetched."""
    page = report(kept, tmp_path / "page.html").read_text()
    first = re.search(r'<details id="(d\d+p\d+)"', page).group(1)
    probe = (
        "<script>addEventListener('load', () => setTimeout(() => {"
        "const at = document.getElementById('" + first + "');"
        "const find = document.getElementById('find'); const all = "
        "document.getElementById('count').textContent;find.value = 'no such thought'; find.dispatchEvent(new "
        "Event('input'));document.title = [at.open, all, document.getElementById('count').textContent, "
        "window.hacked].join('|'); }, 300));</script></body>"
    )
    (tmp_path / "probed.html").write_text(page.replace("</body>", probe))
    bad = render(hostile_page()).replace("alert(1)", "window.hacked=1")
    (tmp_path / "hostile.html").write_text(bad.replace("</body>", probe))

    def title(name: str, anchor: str) -> str:
        command = [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--no-first-run",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=3000",
            "--dump-dom",
            f"file://{tmp_path / name}#{anchor}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        return re.search(r"<title>(.*?)</title>", done.stdout, re.S).group(1)

    assert title("probed.html", first) == "true|16 thoughts|0 of 16 thoughts|"
    assert title("hostile.html", "d1p0") == f"true|{len(HOSTILE)} thoughts|0 of {len(HOSTILE)} thoughts|"
