"""Two ranks train each objective as one does: the same thoughts, losses and weights.

`preference` with `filter` is left out: each rank reads on until it has its share of good documents, so two
ranks may train on others than one does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlpretrain.objectives import rlp
from rollout.types import Group
from tests.builders.runs import SGD, launch, merged, same, trained, weights

AFTER = {"positions": "after", "marker": "shows"}
SCORED: dict[str, Any] = {"data": {"path": "scored", "max_length": 64, "score_column": "spans"}}
KINDS: dict[str, dict[str, Any]] = {
    "latro": {"objective": {"name": "latro", "beta": 0.1} | AFTER},
    "quiet_star": {"objective": {"name": "quiet_star", "target_length": 2} | AFTER},
    "nover": {"objective": {"name": "nover"} | AFTER, "baseline": {"name": "ema", "decay": 0.9}},
    "bow": {"objective": {"name": "bow"} | AFTER, "baseline": {"name": "frozen"}},
    "bow, context shown": {
        "objective": {"name": "bow", "show_context": True} | AFTER,
        "baseline": {"name": "frozen"},
    },
    "conditional": SCORED | {"objective": {"name": "preference", "loss": "conditional", "threshold": 0.0}},
    "unlikelihood": SCORED | {"objective": {"name": "preference", "loss": "unlikelihood"}},
    "rwr, permuted": SCORED
    | {"objective": {"name": "preference", "loss": "rwr", "beta": 0.5, "permuted": True}},
    "awr": SCORED | {"objective": {"name": "preference", "loss": "awr", "beta": 0.5}},
    "sip": {
        "objective": {
            "name": "sip",
            "target_length": 6,
            "judge_function": "rlpretrain.corpora.dial_judge:flips_30",
        }
    },
    "over the batch": {"objective": {"name": "tests.objectives.test_two_ranks:OverTheBatch"} | AFTER},
}
LOGGED = ("loss", "ntp/loss", "reward", "thought/closed_frac", "policy_loss", "ntp/weight_mean")


class OverTheBatch(rlp.RLP):
    """RLP whose advantages have mean 0 and deviation 1 over all thoughts of a step, not within a group."""

    needs = rlp.RLP.needs | {"batch"}

    def advantage(self, rewards: torch.Tensor, groups: Sequence[Group]) -> torch.Tensor:
        assert [group.id for group in groups] == sorted(group.id for group in groups) and len(groups) == 4
        counted = rewards[rewards.isfinite()]
        return ((rewards - counted.mean()) / counted.std()).nan_to_num(nan=0.0)


@pytest.mark.slow
def test_two_ranks_train_as_one_does(values, corpus, tmp_path):
    scored = tmp_path / "scored.jsonl"
    texts = [json.loads(line)["text"] for line in (corpus / "train.jsonl").read_text().splitlines()]
    scored.write_text("".join(json.dumps(row_of(i, text)) + "\n" for i, text in enumerate(texts)))
    runs: dict[str, list[dict[str, Any]]] = {}
    for kind, changes in KINDS.items():
        run = merged(values, **changes, optim=SGD, max_steps=2)
        if run["data"]["path"] == "scored":
            run["data"] = run["data"] | {"path": str(scored)}
        runs[kind] = [merged(run, output_dir=str(tmp_path / f"{kind}-{number}")) for number in (1, 2)]
    launch([{"config": two} for _, two in runs.values()], tmp_path)
    for kind, (one, _) in runs.items():
        alone = trained(one)
        assert same(alone, weights(tmp_path / f"{kind}-2" / "model"), within=1e-5), kind
        logs = [rows(tmp_path / f"{kind}-{number}") for number in (1, 2)]
        if one["objective"]["name"] != "preference":
            assert any(row.get("policy_loss") is not None for row in logs[0]), f"{kind} trained no thought"
        for ours, theirs in zip(*logs, strict=True):
            for name in LOGGED:
                expected = theirs.get(name)
                if expected is not None:
                    expected = pytest.approx(expected, rel=1e-4, abs=1e-6)
                assert ours.get(name) == expected, (kind, name)


def row_of(number: int, text: str) -> dict[str, Any]:
    """A document whose first half is good, and whose second half is bad in two of three."""
    middle = text.index(" ", len(text) // 2)
    return {"text": text, "spans": [[0, middle, 0.0], [middle, len(text), (number % 3) / 2]]}


def rows(folder: Path) -> list[dict[str, Any]]:
    """The metrics of the steps."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]
