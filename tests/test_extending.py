"""docs/extending.md: what it prints is run, from a folder of a user's own."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from rlpretrain import Pretrainer
from rlpretrain.config import ConfigError
from rlpretrain.config.io import build
from rlpretrain.corpora import dial
from rlpretrain.training.losses import TERMS, make_losses
from rlpretrain.training.schedules import make_schedule
from rollout.engine import EngineInfo
from rollout.store import Store
from tests.builders.learning import BASE
from tests.builders.processes import ROOT, python
from tests.builders.runs import same, trained

TEXT = (ROOT / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)```", TEXT, re.S | re.M))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The files of the page, with the base and corpus that it names."""
    folder = tmp_path_factory.mktemp("mine")
    dial.write(folder / "corpus", base=1, train=80, held_out=24)
    (folder / "base").symlink_to(BASE)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


def test_the_page_trains_as_printed(folder):
    command = Path(sys.executable).parent / "rlpretrain"
    done = python(str(command), "train", "mine.yaml", folder=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (folder / "mine" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 20
    assert all(row["dpo_loss"] > 0 for row in rows)
    factors = [row["learning_rate"] / 1e-2 for row in rows]
    assert factors == pytest.approx([0.5, 1.0, *[1.0] * 16, 2 / 3, 1 / 3], abs=1e-6)


def test_documents_of_the_page_train_as_printed(folder):
    command = str(Path(sys.executable).parent / "rlpretrain")
    for more in ("--dry-run",), ():
        done = python(command, "train", "sums.yaml", *more, folder=folder)
        assert done.returncode == 0, done.stderr[-2000:]
    store, read = Store(folder / "sums" / "rollouts"), dial.tokenizer().decode
    documents = [document for step in store.steps() for document in store.read(step)[1]]
    assert len(documents) == 24
    for document in documents:
        assert re.match(r"well ann has (\d) \. bob has (\d) \. cat shows (\d) \.", read(document.token_ids))
        assert document.scores is not None and document.scores[:4] == (1.0, 1.0, 1.0, 2.0)


def test_the_engine_of_the_page_samples_a_run(folder):
    (line,) = re.findall(r"^\$ (rlpretrain train .*my_engine.*)$", TEXT, re.M)
    _, *words = shlex.split(line)
    command = str(Path(sys.executable).parent / "rlpretrain")
    done = python(command, *words, "--max_steps", "4", folder=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len((folder / "thoughts.txt").read_text().splitlines()) == 4 * 4 * 4  # steps, positions, thoughts
    record = json.loads((folder / "sampled" / "run.json").read_text())
    assert record["engine"] == {"kind": "smallest", "version": 4}
    assert record["config"]["engine"]["options"] == {"file": "thoughts.txt"}
    rows = [json.loads(line) for line in (folder / "sampled" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all("perf/probe_s" not in row for row in rows)


def test_the_engine_of_the_page_draws_from_the_models_distribution(folder, values, monkeypatch, tmp_path):
    """With weights of its own and a probe: its log-probs of its draws are those of the trainer."""
    monkeypatch.syspath_prepend(folder)
    engine = {"name": "my_engine:Smallest", "options": {"file": str(tmp_path / "t")}, "max_staleness": 1}
    own = __import__("my_engine").Smallest
    monkeypatch.setattr(own, "info", property(lambda self: EngineInfo(shares_weights=self.shares_weights)))
    trained(values, output_dir=str(tmp_path / "run"), engine=engine, max_steps=2)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["sampling/probe_difference"] <= 1e-5 for row in rows)
    assert not (tmp_path / "run" / "start").exists()


def test_a_term_of_ones_own_has_the_gradient_of_its_formula(folder, monkeypatch, values, tmp_path):
    """One step of gradient descent at rate 1 moves the weights by minus the gradient, whatever the
    packing.
    """
    monkeypatch.syspath_prepend(folder)
    settings = {
        "loss__terms": ["my_loss:OnlineDPO"],
        "optim__name": "my_optimizer:sgd",
        "optim__lr": 1.0,
        "optim__warmup_steps": 0,
        "optim__clip_grad_norm": 0.0,
        "max_steps": 1,
    }
    whole = trained(values, output_dir=str(tmp_path / "whole"), **settings)
    parts = trained(values, output_dir=str(tmp_path / "parts"), token_budget=300, **settings)
    padded = trained(values, output_dir=str(tmp_path / "padded"), packing="padded", **settings)
    assert same(whole, parts, 1e-5) and same(whole, padded, 1e-5)
    assert not same(
        whole, trained(values, output_dir=str(tmp_path / "none"), **settings | {"optim__lr": 0.0}), 1e-5
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optim": {"schedule": "cosin"}}, "optim.schedule: no 'cosin'; did you mean 'cosine'"),
        ({"optim": {"schedule": "nowhere:wsd"}}, "optim.schedule: 'nowhere:wsd' cannot be loaded"),
        ({"optim": {"name": "lion"}}, "optim.name: no 'lion'; did you mean 'lion_8bit'?"),
        ({"policy": {"backend": "torhc"}}, "policy.backend: no 'torhc'; did you mean 'torch'"),
        ({"engine": "nowhere:Engine"}, "engine.name: 'nowhere:Engine' cannot be loaded"),
        ({"policy": {"backend": "math:nothing"}}, "policy.backend: 'math:nothing' cannot be loaded"),
        ({"loss": {"terms": ["surogate"]}}, "loss.terms: no 'surogate'; did you mean 'surrogate'"),
    ],
)
def test_a_name_that_is_nobodys_is_refused_before_the_model_is_loaded(values, change, said):
    config = build(values | change | {"model": "no/model/here"})
    with pytest.raises(ConfigError, match=re.escape(said)):
        Pretrainer(config).train()


def test_the_terms_in_another_order_or_by_name_train_the_same_weights(values, tmp_path):
    default = trained(values, output_dir=str(tmp_path / "a"))
    named = trained(values, output_dir=str(tmp_path / "b"), loss__terms=[*TERMS])
    other = trained(values, output_dir=str(tmp_path / "c"), loss__terms=["direct", "surrogate", "next_token"])
    without = trained(values, output_dir=str(tmp_path / "d"), loss__terms=["surrogate"])
    assert same(default, named) and same(default, other, 1e-6) and not same(default, without, 1e-6)
    assert [type(term).__name__ for term in make_losses(["direct"])] == ["Direct"]


def test_the_schedule_of_the_page(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    optim = build({"model": "m", "data": "d", "optim": yaml.safe_load(FILES["mine.yaml"])["optim"]}).optim
    factor = make_schedule(optim, 12)
    assert [round(factor(k), 3) for k in range(14)] == [0.5, *[1.0] * 10, 0.5, 0.0, 0.0]
