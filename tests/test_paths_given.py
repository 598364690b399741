"""Path objects are taken wherever a path may be given as a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlpretrain.config import ConfigError, DataConfig, PretrainConfig
from rlpretrain.config.io import build
from tests.builders.tiny import tiny_model


def test_sections_and_fields_take_path_objects(tmp_path):
    folder = Path("base")
    given: dict[str, Any] = {
        "model": folder,
        "data": tmp_path / "docs.jsonl",
        "reference": folder,
        "output_dir": tmp_path / "out",
        "baseline": "frozen",
        "objective": "remit",
    }
    texts: dict[str, Any] = {name: str(value) for name, value in given.items()}
    assert build(given) == build(texts)
    assert PretrainConfig(**given) == PretrainConfig(**texts)
    sources: Any = {"a": Path("a.jsonl"), "b": {"path": Path("b.jsonl"), "weight": 2.0}}
    plain: Any = {"a": "a.jsonl", "b": {"path": "b.jsonl", "weight": 2.0}}
    assert DataConfig(sources=sources) == DataConfig(sources=plain)


def test_trl_takes_path_objects(corpus, tmp_path):
    pytest.importorskip("trl")
    from rlpretrain.trl import InformationGainReward, RLPConfig, RLPTrainer
    from tests.builders.trl import AFTER, settings

    folder = corpus / "base"
    with pytest.raises(ConfigError, match="give the model itself"):
        InformationGainReward(folder)
    args = settings(tmp_path, RLPConfig, cut="force_close", **AFTER)
    trainer = RLPTrainer(folder, args=args, train_dataset=corpus / "train.jsonl")
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_dataset_of_a_path_object_is_that_of_its_text(corpus):
    pytest.importorskip("trl")
    from transformers import AutoTokenizer

    from rlpretrain.trl import InformationGainReward
    from tests.builders.trl import AFTER

    tokenizer = AutoTokenizer.from_pretrained(corpus / "base")
    reward = InformationGainReward(tiny_model("qwen3", len(tokenizer)), tokenizer, **AFTER)
    file = corpus / "train.jsonl"
    assert reward.dataset(file).to_list() == reward.dataset(str(file)).to_list()
