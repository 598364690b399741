"""Twenty steps of a tiny model, committed; and what must not change them.

Regenerate, only after a change that is meant to change training: `python -m tests.test_trajectory`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from rlpretrain import Pretrainer
from rlpretrain.config_io import build
from rlpretrain.corpora import dial
from tests.conftest import tiny_values
from tests.helpers import merged, same, weights
from tests.tiny import tiny_model

SETTINGS = {
    "max_steps": 20, "optim__lr": 3e-3, "optim__schedule": "cosine", "optim__weight_decay": 0.01, "checkpoint__every": 10,
    "baseline__name": "ema", "baseline__decay": 0.9, "sampling__thoughts": 3, "objective__target_length": 2,
}  # fmt: skip
GOLDEN: dict[str, list[float]] = {}


def trajectory(values, resume=None, **changes) -> dict[str, list[float]]:
    """The numbers of each step."""
    config = build(merged(values, **SETTINGS | changes))
    Pretrainer(config).train(resume=resume)
    rows = [json.loads(line) for line in Path(config.output_dir, "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 21))
    return {name: [row[name] for row in rows] for name in ("loss", "ntp/loss", "ig/mean", "grad_norm")}


def alike(found: dict, expected: dict) -> None:
    """To 1e-4: threads and kernels differ by some 1e-6 after twenty steps, a changed formula by far more."""
    for name, numbers in expected.items():
        assert found[name] == pytest.approx(numbers, rel=1e-4, abs=1e-4), name


def test_the_trajectory_is_the_committed_one(values):
    alike(trajectory(values), GOLDEN)
    assert GOLDEN["loss"][-1] < 0.85 * GOLDEN["loss"][0]  # twenty steps in which something happened


def test_micro_batches_do_not_change_it(values, tmp_path):
    alike(trajectory(values, token_budget=1), GOLDEN)
    alike(trajectory(values, token_budget=150, output_dir=str(tmp_path / "odd")), GOLDEN)


def test_another_attention_kernel_does_not_change_it(values):
    alike(trajectory(values, attn_implementation="eager"), GOLDEN)


def test_the_engines_batches_do_not_change_it(values):
    alike(trajectory(values, engine__batch_size=2), GOLDEN)


def test_a_resume_at_ten_does_not_change_it_by_a_bit(values, tmp_path):
    whole = trajectory(values)
    folder, part = Path(values["output_dir"]), tmp_path / "part"
    shutil.copytree(folder, part)
    shutil.rmtree(part / "checkpoint-20")
    assert trajectory(values, resume="auto", output_dir=str(part)) == whole
    assert same(weights(folder / "model"), weights(part / "model"))


@pytest.mark.parametrize("change", [{"seed": 1}, {"optim__lr": 3.03e-3}, {"loss__reader_coef": 0.12}, {"baseline__decay": 0.8}])
def test_what_does_change_it(values, change):
    """The tolerance is narrow enough to see small changes."""
    found = trajectory(values, **change)
    assert any(a != pytest.approx(b, rel=1e-4, abs=1e-4) for n in GOLDEN for a, b in zip(found[n], GOLDEN[n], strict=True))


def regenerate() -> None:
    """Print the numbers that stand above."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dial.write(folder, base=200, train=200, held_out=48)
        tiny_model("qwen3", vocab_size=len(dial.WORDS), seed=3).save_pretrained(folder / "base")
        dial.tokenizer().save_pretrained(folder / "base")
        for key, numbers in trajectory(tiny_values(folder, folder / "run")).items():
            print(f'    "{key}": {[round(x, 6) for x in numbers]},')


if __name__ == "__main__":
    regenerate()
