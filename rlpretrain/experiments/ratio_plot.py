"""The plot of `rlpretrain ratios`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

TITLES = {"general": "general loss (nats from the base)", "domain": "domain loss (nats from the base)"}


def plot_ratios(results: dict[str, Any], path: Path) -> None:
    """A row for each variant: both losses against the ratio, with the laws, and over tokens; an SVG file."""
    import matplotlib
    from matplotlib.figure import Figure

    variants = {name: result for name, result in results["variants"].items() if result is not None}
    figure = Figure(figsize=(16, 3.8 * len(variants) + 0.3), layout="constrained")
    panels = figure.subplots(len(variants), 4, squeeze=False)
    for row, (name, result) in zip(panels, variants.items(), strict=True):
        for panel, group in zip(row[:2], TITLES, strict=True):
            _draw_ratios(panel, result, group, results["tolerance"])
        for panel, group in zip(row[2:], TITLES, strict=True):
            _draw_curves(panel, result, group, results["tolerance"])
        row[0].set_title(name, loc="left", fontsize=10)
        row[2].legend(title="ratio", frameon=False, fontsize=7)
        row[0].legend(frameon=False, fontsize=7)
    with matplotlib.rc_context({"svg.hashsalt": "rlpretrain"}):  # the same numbers give the same file
        figure.savefig(path, format="svg", metadata={"Date": None})


def _draw_ratios(panel: Any, result: dict[str, Any], group: str, tolerance: float) -> None:
    losses, law = result["losses"][group], result["laws"][group]
    ratios = np.array(result["ratios"])
    fitted = np.isin(ratios, law["fitted_ratios"])
    mean, low, high = np.array(losses["change"], float).T
    lengths = np.nan_to_num([mean - low, high - mean]).clip(min=0)
    for seed in losses["by_seed"]:
        panel.plot(ratios, np.array(seed, float), "_", color="C0", alpha=0.5, markersize=7)
    for mask, fill, label in ((fitted, "C0", "measured"), (~fitted, "none", "not fitted")):
        if mask.any():
            look = {"fmt": "o", "color": "C0", "capsize": 2, "markerfacecolor": fill, "label": label}
            panel.errorbar(ratios[mask], mean[mask], yerr=lengths[:, mask], **look)
    if "band" in law:
        band = {name: np.array(values, float) for name, values in law["band"].items()}
        panel.plot(band["ratios"], band["mean"], color="C1", label="law")
        panel.fill_between(band["ratios"], band["low"], band["high"], color="C1", alpha=0.2, linewidth=0)
    if group == "general":
        _draw_critical(panel, result, tolerance)
    panel.grid(alpha=0.3)
    panel.set(xlabel="ratio of domain text", ylabel=TITLES[group])


def _draw_critical(panel: Any, result: dict[str, Any], tolerance: float) -> None:
    critical = result["critical"]
    panel.axhline(tolerance, color="black", linewidth=0.6)
    if critical["interval"] is not None:
        panel.axvspan(*critical["interval"], color="C2", alpha=0.12, linewidth=0)
    if critical["ratio"] is not None:
        trust = "" if result["trusted"] else ", not trusted"
        panel.axvline(critical["ratio"], color="C2", label=f"critical {critical['ratio']:.2f}{trust}")


def _draw_curves(panel: Any, result: dict[str, Any], group: str, tolerance: float) -> None:
    import matplotlib

    colours = matplotlib.colormaps["viridis"]
    tokens = result["curves"]["tokens"]
    for place, (ratio, curve) in enumerate(zip(result["ratios"], result["curves"][group], strict=True)):
        colour = colours(0.9 * place / max(1, len(result["ratios"]) - 1))
        panel.plot(tokens, np.array(curve, float), color=colour, label=f"{ratio:g}", linewidth=1.2)
    if group == "general":
        panel.axhline(tolerance, color="black", linewidth=0.6)
    panel.grid(alpha=0.3)
    panel.set(xlabel="tokens of documents", ylabel=TITLES[group])
