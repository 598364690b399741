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
from rlpretrain.config.io import build
from rlpretrain.corpora import dial
from tests.builders.configs import tiny_values
from tests.builders.runs import merged, same, weights
from tests.builders.tiny import tiny_model

SETTINGS = {
    "max_steps": 20,
    "optim__lr": 3e-3,
    "optim__schedule": "cosine",
    "optim__weight_decay": 0.01,
    "checkpoint__every": 10,
    "baseline__name": "ema",
    "baseline__decay": 0.9,
    "sampling__thoughts": 3,
    "objective__target_length": 2,
}
GOLDEN: dict[str, list[float]] = {
    "loss": [
        2.187858,
        2.169363,
        2.129526,
        2.068807,
        2.043674,
        1.998086,
        1.974863,
        1.955782,
        1.896304,
        1.875798,
        1.860099,
        1.851961,
        1.799714,
        1.813935,
        1.79697,
        1.785654,
        1.792403,
        1.770184,
        1.769627,
        1.778882,
    ],
    "ntp/loss": [
        4.380316,
        4.347613,
        4.276287,
        4.199128,
        4.17969,
        4.107202,
        4.054363,
        4.000525,
        3.92952,
        3.899875,
        3.832528,
        3.858446,
        3.724194,
        3.80336,
        3.780286,
        3.7637,
        3.772577,
        3.717204,
        3.713034,
        3.727251,
    ],
    "ig/mean": [
        -0.020654,
        0.18581,
        0.262538,
        0.641226,
        0.626158,
        0.625864,
        0.704714,
        0.660622,
        0.730378,
        0.79429,
        0.755467,
        0.747728,
        0.75856,
        0.784626,
        0.700688,
        0.695426,
        0.604164,
        0.590313,
        0.551043,
        0.497817,
    ],
    "grad_norm": [
        0.890855,
        0.964551,
        1.066615,
        0.889715,
        0.774454,
        0.797208,
        0.797679,
        0.815422,
        0.792901,
        0.770802,
        0.786838,
        0.729605,
        0.769895,
        0.764143,
        0.73225,
        0.737515,
        0.730064,
        0.729835,
        0.714866,
        0.750717,
    ],
}


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


def test_micro_batches_do_not_change_it(values):
    alike(trajectory(values, token_budget=150), GOLDEN)


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


@pytest.mark.parametrize("change", [{"optim__lr": 3.03e-3}, {"loss__reader_coef": 0.12}])
def test_what_does_change_it(values, change):
    """The tolerance is narrow enough to see small changes."""
    found = trajectory(values, **change)
    assert any(
        a != pytest.approx(b, rel=1e-4, abs=1e-4)
        for n in GOLDEN
        for a, b in zip(found[n], GOLDEN[n], strict=True)
    )


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
