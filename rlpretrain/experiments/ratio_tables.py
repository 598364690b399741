"""The results of `rlpretrain ratios` as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def as_markdown(results: dict[str, Any]) -> str:
    """The critical ratio, what speaks against it, and the tables."""
    lines = ["# Mixture ratios", "", *_setting(results)]
    for variant, result in results["variants"].items():
        lines += ["", f"## {variant or 'Critical ratio'}", ""]
        lines += ["No ratio is finished."] if result is None else list(_variant(result, results["tolerance"]))
    return "\n".join(lines) + "\n"


def _setting(results: dict[str, Any]) -> Iterator[str]:
    groups = "; ".join(
        f"{group}: {', '.join(f'{name} {share:.0%}' for name, share in shares.items())}"
        for group, shares in results["groups"].items()
    )
    runs = results["runs"]
    yield f"{groups}. Seeds {results['seeds']}; {runs['done']} of {runs['of']} runs are done."
    yield "A ratio is the domain's share of the tokens. Losses are in nats per token, with 95% intervals over"
    yield "held-out documents and seeds, as changes from the base model."


def _variant(result: dict[str, Any], tolerance: float) -> Iterator[str]:
    low, high = result["tokens"]
    spent = f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"
    yield f"**{describe_critical(result['critical'], tolerance)}** Each run read {spent} tokens."
    yield ""
    if result["trusted"]:
        yield "Nothing measured speaks against the fit."
    else:
        yield "Not to be trusted:"
        yield ""
        yield from (f"- {reason['why']}" for reason in result["reasons"])
    if against := result["laws"]["domain"]["reasons"]:
        yield ""
        yield "The law of the domain loss alone, which the critical ratio does not rest on:"
        yield ""
        yield from (f"- {reason['why']}" for reason in against)
    yield ""
    yield from _losses(result)
    yield ""
    yield from _laws(result)
    yield ""
    yield from _stability(result)


def describe_critical(critical: dict[str, Any], tolerance: float) -> str:
    """The critical ratio in a sentence."""
    what = f"Largest ratio with a general loss at most {tolerance:g} nats above the base model's:"
    if critical["interval"] is None:
        return f"{what} no law."
    low, high = critical["interval"]
    value = {None: critical["ratio"], "all": "above 1", "none": "none"}[critical["side"]]
    shown = f"{value:.3f}" if isinstance(value, float) else value
    return f"{what} {shown} [{low:.3f}, {high:.3f}]."


def _losses(result: dict[str, Any]) -> Iterator[str]:
    yield "| ratio | general | law's error | left out | domain | law's error | left out |"
    yield "|---|---|---|---|---|---|---|"
    bases = [result["losses"][group]["base"] for group in ("general", "domain")]
    yield f"| base model | {bases[0]:.4f} | | | {bases[1]:.4f} | | |"
    for place, ratio in enumerate(result["ratios"]):
        cells = []
        for group in ("general", "domain"):
            law = result["laws"][group]
            cells.append(with_interval(result["losses"][group]["change"][place]))
            cells.append(_number(_error(law, result["losses"][group]["change"][place][0], ratio)))
            cells.append(_number(law["left_out"].get(f"{ratio:g}")))
        yield f"| {ratio:g} | {' | '.join(cells)} |"


def _error(law: dict[str, Any], measured: float | None, ratio: float) -> float | None:
    """The fitted loss minus the measured; None for a ratio that is not fitted."""
    if "alpha" not in law or ratio not in law["fitted_ratios"] or measured is None:
        return None
    alpha, exponent, beta = (law[name][0] for name in ("alpha", "exponent", "beta"))
    return alpha * ratio**exponent + beta - measured


def _laws(result: dict[str, Any]) -> Iterator[str]:
    yield "| law at the end of the runs | alpha | s | beta | residual |"
    yield "|---|---|---|---|---|"
    for group in ("general", "domain"):
        law = result["laws"][group]
        cells = [with_interval(law.get(name)) for name in ("alpha", "exponent", "beta")]
        yield f"| {group} loss | {' | '.join(cells)} | {_number(law['residual'], signed=False)} |"


def _stability(result: dict[str, Any]) -> Iterator[str]:
    yield "| ratio | general loss: peak | at tokens | end | gap | recovered at tokens | to the tolerance |"
    yield "|---|---|---|---|---|---|---|"
    for row in result["stability"]:
        cells = [
            with_interval(row["peak"]),
            f"{row['peak_at']:.0f}",
            with_interval(row["end"]),
            _number(row["gap"]),
            _tokens(row["recovered"]),
            _tokens(row["recovered_to_tolerance"]),
        ]
        yield f"| {row['ratio']:g} | {' | '.join(cells)} |"
    yield ""
    spacing = result["stability"][0]["spacing"]
    yield f"Losses over tokens are measured every {spacing:.0f} tokens; a peak between two is missed."


def with_interval(values: Sequence[float | None] | None) -> str:
    """Mean and interval; empty without a mean."""
    if values is None or values[0] is None:
        return ""
    mean, low, high = values
    if low is None or high is None:
        return f"{mean:+.4f}"
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def _number(value: float | None, signed: bool = True) -> str:
    if value is None:
        return ""
    return f"{value:+.4f}" if signed else f"{value:.4f}"


def _tokens(value: float | None) -> str:
    return "not by the end" if value is None else f"{value:.0f}"
