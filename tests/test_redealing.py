"""A mixture on another number of ranks: every document is drawn once, whatever the ranks had drawn."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlpretrain.config import DataConfig
from rlpretrain.config.io import parse
from rlpretrain.corpora import dial
from rlpretrain.data.document_source import SourceInputs, cursor_of
from rlpretrain.data.mixture import Mixture
from rlpretrain.data.stream import open_source
from rlpretrain.rollouts.drawing import DocumentDraws
from rlpretrain.training.redealing import deal_source
from tests.builders.mixing import drawn, rows_of, sources_of
from tests.builders.runs import launch, merged, same, trained, weights

RAMP = {"think": [[0, 1.0], [1, 0.3]], "read": [[0, 0.2], [1, 2.0]]}
DIAL = dial.tokenizer()


def opened(corpus: Path, rank: int, size: int, thinks: bool) -> Mixture:
    sources = sources_of(corpus, **RAMP)
    sources["read"]["streaming"] = True
    data = parse(DataConfig, {"sources": sources, "max_length": 64}, "data")
    place: dict[str, Any] = {"rank": rank, "world_size": size, "seed": 5, "per_step": 12, "thinks": thinks}
    mixture = open_source(SourceInputs(config=data, tokenizer=DIAL, **place))
    assert isinstance(mixture, Mixture)
    return mixture


def state_of(draws: DocumentDraws) -> dict[str, Any]:
    """The state of a source of batches that has no positions left."""
    return {
        "stream": cursor_of(draws.source),
        "drawn": draws.drawn,
        "done": sorted(draws.done),
        "dropped": 0,
        "without": 0,
        "by_stream": {"think": [1, 10]},
        "spare": [],
        "waiting": [],
        "ntp_stream": None,
    }


@pytest.mark.parametrize("thinks", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_ragged_ranks_of_a_mixture_are_dealt_again(corpus, seed, thinks):
    """Five numbers of ranks on a ramp; ranks draw unequally, as where positions are rare."""
    rng, found, states, step = np.random.default_rng(seed), [], [], 0
    for size in (2, 3, 1, 4, 2):
        ranks = []
        for rank in range(size):
            draws = DocumentDraws(opened(corpus, rank, size, thinks), seed=5, rank=rank, size=size)
            if states:
                state = deal_source(states, rank, size, opened(corpus, rank, size, thinks))
                draws.source.load_state_dict(state["stream"])
                draws.drawn, draws.done = state["drawn"], set(state["done"])
                assert state["by_stream"] == ({"think": [len(states), 10 * len(states)]} if not rank else {})
            ranks.append(draws)
        for _ in range(3):
            first = max(draws.source.position for draws in ranks)
            for draws in ranks:
                draws.source.begin(step / 15, first)
                for _ in range(int(rng.integers(1, 4))):  # more where a document gave no position
                    found += draws._next_documents(int(rng.integers(1, 6)), step / 15)
            step += 1
        states = [state_of(draws) for draws in ranks]
    numbers = Counter(number for number, _ in found)
    assert set(numbers.values()) == {1}
    passed = min(draws.source.position for draws in ranks)
    assert set(range(passed)) <= numbers.keys() and passed > 50
    assert sum(state["drawn"] for state in states) >= len(found)
    alone = opened(corpus, 0, 1, thinks)
    for name in ("think", "read"):
        ours = [document for number, document in sorted(found) if document.stream == name and number < passed]
        expected = alone.sources[name].take(len(ours))
        assert [document.token_ids for document in ours] == [document.token_ids for document in expected]


@pytest.mark.slow
def test_a_run_of_a_mixture_goes_on_on_other_ranks(values, corpus, tmp_path):
    """Two ranks write a checkpoint inside a ramp; one and four ranks read on as one rank does all along."""
    data = {"sources": sources_of(corpus, **RAMP), "max_length": 64}
    base = merged(values, data=data, positions_per_step=8, max_steps=4, checkpoint__every=2)
    base = merged(base, save_rollouts=True, policy={"backend": "torch"})
    ahead = {"engine": {"name": "hf", "max_staleness": 2}}
    kinds = {"rlp": {}, "ahead": ahead, "ntp": {"objective": "ntp"}}
    runs = {name: merged(base, **changes) for name, changes in kinds.items()}
    for name, run in runs.items():
        trained(run, output_dir=str(tmp_path / f"{name}-all"))
    launch([{"config": merged(r, output_dir=str(tmp_path / f"{n}-2"))} for n, r in runs.items()], tmp_path)
    for size in (1, 4):
        jobs = []
        for name, run in runs.items():
            folder = tmp_path / f"{name}-on-{size}"
            shutil.copytree(tmp_path / f"{name}-2" / "checkpoint-2", folder / "checkpoint-2")
            jobs.append({"config": merged(run, output_dir=str(folder)), "resume": "auto"})
        launch(jobs, tmp_path, size)
        for name in runs:
            whole, folder = tmp_path / f"{name}-all", tmp_path / f"{name}-on-{size}"
            documents = [sorted(step) for step in drawn(whole)[2:]]
            assert [sorted(step) for step in drawn(folder, size)] == documents, (name, size)
            counts = [rows_of(run)[-1]["source/read/documents"] for run in (whole, folder)]
            assert counts[0] == counts[1] > 0
            if name != "ahead":  # its first thoughts after a checkpoint are of newer weights
                assert same(weights(folder / "model"), weights(whole / "model"), within=1e-4)
