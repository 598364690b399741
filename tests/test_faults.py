"""A trainer that is killed and resumed ends like one that was not."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlpretrain.corpora import dial
from rollout.store import Store
from tests.builders import engines
from tests.builders.configs import tiny_values
from tests.builders.runs import merged, same, weights
from tests.builders.servers import VLLMServer
from tests.builders.tiny import tiny_model
from tests.builders.trainers import Trainer, account, apart, rows

pytestmark = pytest.mark.slow
SHAPE = engines.SHAPE | {"tie_word_embeddings": False}
STEPS, SAVED = 24, 10


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model of a shape that vLLM has kernels for."""
    folder = tmp_path_factory.mktemp("faults") / "base"
    tiny_model("qwen3", len(dial.WORDS), **SHAPE).save_pretrained(folder)
    dial.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(base) -> Iterator[VLLMServer | None]:
    """A server that starts while the first test runs, which does not need it."""
    try:
        import vllm  # noqa: F401
    except ImportError:
        yield None
        return
    server = VLLMServer(base, base.parent / "server.log").start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def calm(base, corpus, server) -> Trainer:
    """An undisturbed run of the embedded engine."""
    run = Trainer(settings(base, corpus, "calm"))
    assert run.wait()
    return run


def settings(base: Path, corpus: Path, name: str, **changes: Any) -> dict[str, Any]:
    return merged(
        tiny_values(corpus, base.parent / name),
        model=str(base),
        max_steps=STEPS,
        save_rollouts=True,
        threads=1,
        checkpoint={"every": SAVED},
        **changes,
    )


def killed_and_resumed(values: dict[str, Any]) -> Trainer:
    """A run that is killed a few steps after its first checkpoint, and resumed."""
    run, end = Trainer(values), time.monotonic() + 120
    while run.step() < SAVED + 2 and time.monotonic() < end:
        time.sleep(0.002)
    run.kill()
    assert run.done_again >= 1 and run.step() < STEPS and not (run.folder / "model").exists()
    run.start("--resume", "auto")
    assert run.wait()
    assert json.loads((run.folder / "run.json").read_text())["resumed_from"].endswith(f"checkpoint-{SAVED}")
    return run


def check(run: Trainer, calm: Trainer) -> dict[str, int]:
    """Log and store hold every step once, every group is trained once, and there is one update a step."""
    assert (
        [row["step"] for row in rows(run.folder)]
        == Store(run.folder / "rollouts").steps()
        == list(range(1, STEPS + 1))
    )
    found = account(run.folder, calm.folder, STEPS)
    assert found["once"] == found["expected"] == 4 * STEPS and found["updates"] == STEPS
    assert not any(found[k] for k in ("twice", "lost", "out_of_place", "aborted", "left_over"))
    return found


def test_a_killed_trainer_ends_with_the_very_same_weights(base, corpus, calm):
    run = killed_and_resumed(settings(base, corpus, "killed"))
    assert check(run, calm)["same"] == 4 * STEPS
    assert (
        same(weights(run.folder / "model"), weights(calm.folder / "model"))
        and apart(run.folder, calm.folder) == 0
    )
    assert not same(weights(run.folder / "model"), weights(base))


def test_a_killed_rank_ends_the_other_and_both_resume(base, corpus, calm):
    run, end = Trainer(settings(base, corpus, "ranks"), ranks=2), time.monotonic() + 120
    while run.step() < SAVED + 2 and time.monotonic() < end:
        time.sleep(0.002)
    run.kill(rank=1)
    said = run.log.read_text()
    assert not run.hung and run.step() < STEPS
    assert "rlpretrain: another rank has ended" in said and "Traceback" not in said, said
    run.start("--resume", "auto")
    assert run.wait()
    found = account(run.folder, calm.folder, STEPS, ranks=2)
    assert found["once"] == found["expected"] == 4 * STEPS and found["updates"] == STEPS
    assert not any(found[k] for k in ("twice", "lost", "out_of_place", "aborted", "left_over"))


def test_a_killed_trainer_of_a_server_trains_on_every_group_once(base, corpus, calm, server):
    if server is None:
        pytest.skip("needs the CPU build of vLLM: make env LOCK=test-cpu")
    engine = {"name": "vllm_server", "urls": [server.ready().url], "block_size": 32}
    run = killed_and_resumed(settings(base, corpus, "served", engine=engine))
    check(run, calm)
    assert all(
        row["sampling/abs_log_ratio_max"] <= 1e-4 for row in rows(run.folder)
    )  # its thoughts come from these weights


def test_what_went_wrong_would_be_counted(base, corpus, calm, tmp_path):
    """`account` finds a missing step, a step that was logged twice, and groups of another step."""
    import shutil

    def after(change: Any) -> dict[str, int]:
        folder = Path(shutil.copytree(calm.folder, tmp_path / change.__name__))
        change(folder)
        found = account(folder, calm.folder, STEPS)
        return {k: found[k] for k in ("once", "twice", "lost", "out_of_place", "left_over")}

    def nothing(folder):
        pass

    def unlogged(folder):
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        (folder / "metrics.jsonl").write_text("".join(lines[:-1]))

    def logged_twice(folder):
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        (folder / "metrics.jsonl").write_text("".join(lines + lines[-1:]))

    def another(folder):
        kept = folder / "rollouts"
        shutil.copy(kept / "step-000003-rank-0.groups.parquet", kept / "step-000004-rank-0.groups.parquet")

    counts = {"once": 96, "twice": 0, "lost": 0, "out_of_place": 0, "left_over": 0}
    assert after(nothing) == counts
    assert after(unlogged) == counts | {"once": 92, "lost": 4, "left_over": 1}
    assert after(logged_twice) == counts | {"once": 92, "twice": 4, "left_over": -1}
    assert after(another) == counts | {"once": 88, "twice": 4, "lost": 4, "out_of_place": 4}
