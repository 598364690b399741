"""One small corpus and one small random model for the whole suite."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from rlpretrain import Pretrainer
from rlpretrain.config.io import build
from rlpretrain.corpora import dial
from tests.builders.configs import tiny_values
from tests.builders.tiny import tiny_model

torch.set_num_threads(1)
# with Ray's niceness of 15 its workers starve where other tests keep all cores busy
os.environ.setdefault("RAY_worker_niceness", "0")

LONGEST = (
    "test_learning.py",
    "test_trl_async.py",
    "test_compare.py",
    "test_examples.py",
    "test_harness.py",
    "test_engines.py",
    "test_adapters.py",
    "test_vllm_server.py",
    "test_trl_trainer.py",
    "test_ray_pool.py",
    "test_tutorial.py",
    "test_notebook.py",
    "test_service.py",
    "test_faults.py",
    "test_trl_vllm.py",
    "test_trl_cli.py",
    "test_trl_settings.py",
    "test_readiness.py",
    "test_checkpoint.py",
    "test_gpu_benchmark.py",
    "test_fsdp.py",
)
"""The files that take longest. They run first, so that at the end no worker waits long for the other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dial corpus of 200 documents, with `base/`, the checkpoint of a random Qwen3 of its vocabulary."""
    folder = tmp_path_factory.mktemp("dial")
    dial.write(folder, base=200, train=200, held_out=48)
    model = tiny_model("qwen3", vocab_size=len(dial.WORDS), seed=3)
    model.save_pretrained(folder / "base")
    dial.tokenizer().save_pretrained(folder / "base")
    return folder


@pytest.fixture
def values(corpus: Path, tmp_path: Path) -> dict[str, Any]:
    """A complete small RLP configuration as plain values; each test changes what it is about."""
    return tiny_values(corpus, tmp_path / "run")


@pytest.fixture(scope="session")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of 6 steps, with checkpoints 2, 4 and 6. Copy it to change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    changes = {"max_steps": 6, "checkpoint": {"every": 2, "keep": 3}}
    Pretrainer(build(tiny_values(corpus, folder) | changes)).train()
    return folder
