"""The results of `benchmarks.engines` as a table."""

from __future__ import annotations

from typing import Any

REPORTED = ("think_sampled", "gain_frozen", "no_think_loss")
"""The numbers of an evaluation that are compared."""


def table(results: dict[str, Any]) -> str:
    """Markdown: one row per engine; times are medians over the first seed's steps in milliseconds."""

    def cell(row: dict[str, Any], name: str) -> str:
        low, high = row[f"{name}_ci"]
        return f"{row[name]:.3f} [{low:.3f}, {high:.3f}]"

    def ms(value: float | None) -> str:
        return "–" if value is None else f"{1000 * value:.1f}" if value < 0.1 else f"{1000 * value:.0f}"

    lines = [
        "| engine | thinks, sampled | gain (nats) | no-think loss | step | rollout | train | weight sync | "
        "probe | largest probe difference | run (s) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines.append(
        "| (base) | " + " | ".join(cell(results["base"], name) for name in REPORTED) + " |" + " – |" * 7
    )
    for engine, row in results["engines"].items():
        t = row["runs"][0]["timings"]
        times = " | ".join(ms(t[name]) for name in ("step_s", "rollout_s", "train_s", "sync_s", "probe_s"))
        worst = [run["timings"]["probe_difference_max"] for run in row["runs"]]
        difference = "–" if None in worst else f"{max(worst):.1e}"
        scores = " | ".join(cell(row, name) for name in REPORTED)
        seconds = " / ".join(f"{run['seconds']:.0f}" for run in row["runs"])
        lines.append(f"| {engine} | {scores} | {times} | {difference} | {seconds} |")
    for engine, row in results["engines"].items():
        if "minus_hf" in row:
            within = row["within_noise"]
            verdict = ""
            if within is not None:
                verdict = ": within noise" if all(within.values()) else f": NOT within noise {within}"
            differences = ", ".join(f"{n} {v:+.3f}" for n, v in row["minus_hf"].items())
            lines.append(f"\n{engine} minus hf: {differences}{verdict}")
    if results["noise"]:
        limits = ", ".join(f"{n} {v:.3f}" for n, v in results["noise"].items())
        lines.append(f"\nnoise (what 95% of pairs of hf runs with other seeds stay within): {limits}")
    return "\n".join(lines)
