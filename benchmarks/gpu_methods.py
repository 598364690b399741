"""The part of `benchmarks.gpu` that compares each method's first steps with those of a CPU, on a small model.

A method is a configuration of examples/dial_family/ with few positions. The base is trained for some steps,
so that it writes predictions in the forms that methods read.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.gpu_shapes import Cell, Report, Settings, measuring

STEPS = 3
EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "dial_family"
METHODS: dict[str, dict[str, Any]] = {
    "rlp": {},
    "rlp, positions by entropy": {"objective": {"positions": "entropy"}},
    "likelihood": {},
    "latro": {},
    "quiet_star": {},
    "nover": {},
    "bow": {},
    "rpt": {},
    "rpt, positions by a proxy": {
        "objective": {"proxy": "{base}", "min_entropy": 0.1, "dynamic_sampling": False}
    },
    "rmt": {"objective": {"bands": [0.5, 10.0]}},
    "rlpt": {},
    "rlpt_judge": {},
    "pretrain_zero": {},
    "sft_mixed": {},
    "remit": {},
    "preference": {},
    "distill": {"objective": {"until": 1.0}},
    "v_pretrain": {"objective": {"every": 1, "feedback_documents": 4, "burn_in": 0.0}},
    "ntp": {},
}
"""Files, after whose name a comma may stand, and changes of their settings."""
ON_A_CPU = ("bow",)
"""Methods of a test of the code: the tests of the library run all of them on a CPU."""
LARGEST = 1e-3
"""Of a difference between losses, in nats: sums in another order, after steps of Adam."""


def measure_methods(settings: Settings, report: Report) -> None:
    """Losses of each method on the device, beside those on a CPU."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, steps=20 if settings.tiny else 300)
        for method in ON_A_CPU if settings.tiny else METHODS:
            cell = Cell(method)
            if time.perf_counter() - begin > 0.9 * settings.seconds:
                cell.status = "no time left"
            else:
                with measuring(cell):
                    _compare(settings, folder, method, cell)
            report(cell)


def _compare(settings: Settings, folder: Path, method: str, cell: Cell) -> None:
    """Fill in the cell; ValueError if the losses are not those of a CPU."""
    name = re.sub(r"\W+", "-", method)
    expected = [row["loss"] for row in train(folder, method, "cpu", folder / f"{name}-expected")]
    begin = time.perf_counter()
    rows = train(folder, method, settings.device, folder / f"{name}-found")
    found = [row["loss"] for row in rows]
    apart = [abs(loss - other) for loss, other in zip(found, expected, strict=True)]
    cell.values = {"seconds": time.perf_counter() - begin, "loss": found[-1], "apart": max(apart)}
    cell.values["thought"] = sum("policy_loss" in row for row in rows)
    if len(found) != STEPS or not max(apart) <= LARGEST:
        raise ValueError(f"losses {found} on {settings.device}, {expected} on a CPU")


def train(folder: Path, method: str, device: str, out: Path) -> list[dict[str, Any]]:
    """The metrics of the first steps."""
    from rlpretrain import Pretrainer
    from rlpretrain.config.io import build

    Pretrainer(build(values_of(folder, method, out, device))).train()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def values_of(folder: Path, method: str, out: Path, device: str) -> dict[str, Any]:
    """The method's configuration, with the data and the model of `folder`."""
    text = (EXAMPLES / f"{method.partition(',')[0]}.yaml").read_text()
    text = re.sub(r"runs/dial_family/\w+/model", str(folder / "base"), text)
    text = text.replace("runs/dial_family/model", str(folder / "base"))
    values = yaml.safe_load(re.sub(r"runs/dial_\w+/", f"{folder}/", text))
    for section, changes in METHODS[method].items():
        for field, value in changes.items():
            values[section][field] = str(folder / "base") if value == "{base}" else value
    short = {"max_steps": STEPS, "positions_per_step": 4, "log_every": 1, "console": False}
    return values | short | {"device": device, "output_dir": str(out), "eval": {}}


def write_inputs(folder: Path, steps: int) -> None:
    """A small corpus, and a model trained on it."""
    from rlpretrain import Pretrainer
    from rlpretrain.config.io import build
    from rlpretrain.corpora import dial_family

    dial_family.write(folder, base=64 * steps, train=64, held_out=16)
    values = yaml.safe_load((EXAMPLES / "base.yaml").read_text())
    values |= {
        "model": {"path": str(folder / "model"), "from_scratch": True},
        "data": {"path": str(folder / "base.jsonl"), "max_length": 128},
        "max_steps": steps,
        "console": False,
        "device": "cpu",
        "output_dir": str(folder / "trained"),
    }
    Pretrainer(build(values)).train()
    (folder / "trained" / "model").rename(folder / "base")
