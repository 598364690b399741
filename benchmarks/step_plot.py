"""The plot of `benchmarks.step`: ratios over the grid, and the cost of a step by thoughts and vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.step_inputs import CURVES


def plot(folder: Path) -> None:
    """Draw step.svg from step-grid.json and step-curves.json in `folder`."""
    import matplotlib.pyplot as plt

    grid = json.loads((folder / "step-grid.json").read_text())["grid"]
    curves = json.loads((folder / "step-curves.json").read_text())["curves"]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for thoughts in (8, 16):
        for thought in (64, 256):
            rows = [r for r in grid if (r["shape"]["thoughts"], r["shape"]["thought"]) == (thoughts, thought)]
            axes[0].plot(
                [r["shape"]["document"] for r in rows],
                [r["ratio_trl"] for r in rows],
                marker="o",
                label=f"{thoughts} thoughts of {thought}",
            )
    axes[0].set(
        title="TRL's step over ours",
        xlabel="document (tokens)",
        ylabel="times",
        xticks=(512, 1024, 2048),
        ylim=0,
    )
    axes[0].legend(frameon=False, loc="upper left")
    for axis, name in zip(axes[1:], CURVES, strict=True):
        rows = curves[name]
        values = [r["shape"][name] for r in rows]
        gib = [r["mib"]["tree"] / 1024 for r in rows]
        axis.plot(values, [r["seconds"]["tree"] for r in rows], marker="o", label="seconds")
        axis.plot(values, gib, marker="s", label="GiB beyond weights and Adam")
        axis.set(title=f"a step of ours by {name}", xlabel=name, ylim=0)
        axis.legend(frameon=False)
    figure.savefig(folder / "step.svg", metadata={"Date": None})
