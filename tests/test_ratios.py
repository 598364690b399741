"""`rlpretrain ratios`: laws against scipy, known ratios given back, bad data distrusted, a real grid."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpretrain.cli import main
from rlpretrain.config import ConfigError
from rlpretrain.evaluation.intervals import interval
from rlpretrain.experiments.power_laws import Bounds, fit_power_law, fit_two_powers
from rlpretrain.experiments.ratio_curves import curve_laws, stability_gaps
from rlpretrain.experiments.ratio_fit import draw_means, find_critical, fit_ratio_law
from rlpretrain.experiments.ratio_grid import load_grid
from rlpretrain.experiments.ratio_losses import GridLosses, GroupLosses, SourceLosses, read_losses
from rlpretrain.experiments.ratio_plot import plot_ratios
from rlpretrain.experiments.ratio_tables import as_markdown
from rlpretrain.experiments.ratio_trust import judge_critical
from rlpretrain.experiments.ratios import analyse, check_folder, collect_ratios
from rlpretrain.files import finite
from tests.builders.configs import tiny_values
from tests.builders.processes import warm

RATIOS = (0.0, 0.1, 0.25, 0.5, 0.75)
GENERAL = (0.3, 2.2, -0.02)
DOMAIN = (-0.9, 0.45, 0.02)
"""alpha, s and beta of a grid's losses."""
TOLERANCE = 0.05


def law_of(parameters: Sequence[float], ratios: Sequence[float]) -> np.ndarray:
    alpha, exponent, beta = parameters
    return alpha * np.asarray(ratios, float) ** exponent + beta


def critical_of(parameters: Sequence[float], tolerance: float = TOLERANCE) -> float:
    alpha, exponent, beta = parameters
    return ((tolerance - beta) / alpha) ** (1 / exponent)


def group(
    changes: np.ndarray, rng: np.random.Generator, noise: float, rows: int = 64, seeds: int = 3
) -> GroupLosses:
    """Losses whose mean changes from the base are `changes` [M], with noise in each run and row."""
    means = changes + rng.normal(0, noise, (seeds, len(changes)))
    tokens = rng.integers(20, 60, rows).astype(float)
    base = np.tile(rng.normal(3, 0.5, rows) * tokens, (seeds, 1))
    strength = rng.normal(1, 0.3, rows)
    strength /= (strength * tokens).sum() / tokens.sum()  # the mean over these rows is exactly `means`
    sums = base[:, None] + means[:, :, None] * strength * tokens
    curves = means[:, :, None] * np.linspace(0, 1, 13) ** 0.5
    return GroupLosses([SourceLosses(1.0, sums, base, tokens)], curves)


def grid_losses(
    general: np.ndarray | None = None,
    domain: np.ndarray | None = None,
    ratios: Sequence[float] = RATIOS,
    noise: float = 0.002,
    seeds: int = 3,
    seed: int = 0,
    rows: int = 64,
) -> GridLosses:
    """A grid's losses, by default those of the laws above."""
    rng = np.random.default_rng(seed)
    changes = {
        "general": law_of(GENERAL, ratios) if general is None else np.array(general),
        "domain": law_of(DOMAIN, ratios) if domain is None else np.array(domain),
    }
    return GridLosses(
        np.array(ratios),
        list(range(seeds)),
        {name: group(values, rng, noise, rows, seeds) for name, values in changes.items()},
        np.full((seeds, len(ratios)), 1e5),
        np.linspace(0, 1e5, 13),
        {},
    )


def reasons(result: dict[str, Any]) -> set[str]:
    return {reason["name"] for reason in result["reasons"]}


# The laws


@settings(max_examples=40, deadline=None)
@given(
    st.floats(0.4, 6), st.floats(-2, 2).filter(lambda a: abs(a) > 0.05), st.floats(-1, 1), st.integers(4, 9)
)
def test_a_law_without_noise_is_given_back(exponent, alpha, beta, count):
    x = np.linspace(0, 0.9, count)
    law = fit_power_law(x, law_of((alpha, exponent, beta), x), Bounds(0.2, 12))
    assert law.at(x) == pytest.approx(law_of((alpha, exponent, beta), x), abs=1e-5)
    assert float(law.exponent) == pytest.approx(exponent, abs=0.02)
    assert float(law.beta) == pytest.approx(beta, abs=1e-3) and not law.at_bound
    if alpha > 0 and (inside := critical_of((alpha, exponent, beta), beta + alpha / 4)) > 0.01:
        assert float(law.largest_below(beta + alpha / 4)) == pytest.approx(inside, abs=1e-3)


@pytest.mark.parametrize("largest", [0.05, 0.02, 0.001])
def test_a_law_of_small_ratios_is_that_of_larger_ones_in_another_unit(largest):
    """Powers of small numbers are small beside 1, and must not be lost in it."""
    x = np.array([0.0, 0.1, 0.25, 0.5, 1.0])
    y = law_of((0.1, 2.2, -0.02), x)
    small, usual = (fit_power_law(x * unit, y, Bounds(0.2, 12)) for unit in (largest, 1.0))
    assert small.at(x * largest) == pytest.approx(y, abs=1e-5)
    for name in ("exponent", "beta"):
        assert float(getattr(small, name)) == pytest.approx(float(getattr(usual, name)), abs=1e-6)
    assert float(small.alpha) * largest**2.2 == pytest.approx(0.1, rel=1e-4)
    for limit in (-0.01, 0.03, 0.2):
        assert float(small.largest_below(limit)) == pytest.approx(
            largest * float(usual.largest_below(limit)), rel=1e-6
        )


def test_the_fit_is_that_of_scipy_from_many_starts():
    """Laws through noise, of negative exponents too: no start of a general optimiser finds a better one."""
    optimize = pytest.importorskip("scipy.optimize")
    rng, x, bounds = np.random.default_rng(1), np.array([0.1, 0.2, 0.4, 0.6, 0.8, 1.0]), Bounds(-4.0, 4.0)
    data = np.stack(
        [law_of((a, s, 0.1), x) + rng.normal(0, 0.02, 6) for a, s in ((0.3, 2), (0.2, -0.7), (-0.5, 0.4))]
    )
    laws = fit_power_law(x, data, bounds)
    for k, y in enumerate(data):
        best = min(
            optimize.least_squares(
                lambda p, y=y: p[0] * x ** p[1] + p[2] - y, (a, s, 0.0), bounds=([-99, -4, -99], [99, 4, 99])
            ).cost
            for a in (-0.5, 0.5)
            for s in (-2.0, -0.5, 0.5, 2.0)
        )
        ours = ((laws.at(x)[k] - y) ** 2).sum() / 2
        assert ours <= best * (1 + 1e-4)


def test_two_powers_follow_a_loss_that_rises_and_falls():
    x = np.linspace(0.05, 1, 14)
    y = 0.3 * x**0.4 - 0.25 * x**1.5 + 0.01
    law = fit_two_powers(x, y, Bounds(-4, 4))
    assert law.at(x) == pytest.approx(y, abs=1e-4)
    fine = np.linspace(0.05, 1, 500)
    top = (0.3 * 0.4 / (0.25 * 1.5)) ** (1 / 1.1)  # where the derivative is 0
    assert fine[law.at(fine).argmax()] == pytest.approx(top, abs=0.02)


# The interval


def test_draws_give_students_interval_of_the_seeds():
    """With rows that are all alike only seeds vary; the draws of a mean are then Student's t."""
    losses = grid_losses(noise=0.01, seeds=4)
    data = losses.groups["general"]
    alike = []
    for source in data.sources:
        means = {name: getattr(source, name).mean(-1, keepdims=True) for name in ("sums", "base", "tokens")}
        alike.append(replace(source, **{name: mean * np.ones(64) for name, mean in means.items()}))
    drawn = draw_means(GroupLosses(alike, data.curves), np.random.default_rng(0), 40_000)
    for place in range(len(RATIOS)):
        mean, ends = interval(GroupLosses(alike, data.curves).changes[:, place][:, None], rows=["0"])
        values = GroupLosses(alike, data.curves).changes[:, place]
        half = 3.182 * values.std(ddof=1) / 2  # t of 3 degrees of freedom, four seeds
        low, high = np.quantile(drawn[:, place], (0.025, 0.975))
        assert (high - low) / 2 == pytest.approx(half, rel=0.05)
        assert mean == pytest.approx(values.mean()) and len(ends) == 2


def test_rows_widen_the_interval_as_the_evaluation_of_a_run_says():
    """With seeds that are all alike, the draws are the bootstrap over rows of `interval`."""
    data = grid_losses(noise=0.0).groups["general"]
    (source,) = data.sources
    drawn = draw_means(data, np.random.default_rng(0), 4000)[:, -1]
    change = (source.sums[0, -1] - source.base[0]) / source.tokens
    _, (low, high) = interval(change[None], source.tokens[None])
    assert np.quantile(drawn, (0.025, 0.975)) == pytest.approx((low, high), abs=0.1 * (high - low))


def test_the_known_ratio_lies_in_the_interval():
    """Of 30 noisy grids the interval of nearly all has it, and nearly all fits are trusted."""
    true, found, trusted = critical_of(GENERAL), [], 0
    for seed in range(30):
        losses, rng = grid_losses(seed=seed, noise=0.004), np.random.default_rng(0)
        general, domain = (fit_ratio_law(losses, name, rng, 200) for name in ("general", "domain"))
        critical = find_critical(general, losses.ratios, TOLERANCE)
        assert critical is not None
        found.append((critical.value, *critical.interval))
        trusted += not judge_critical(critical, general, domain, losses, TOLERANCE, missing=0)
    values, low, high = np.array(found).T
    assert ((low <= true) & (true <= high)).sum() >= 26 and trusted >= 26
    assert abs(values.mean() - true) < 0.01 and values.std() < 0.03 and np.median(high - low) < 0.15
    one = analyse(grid_losses(noise=0.004), TOLERANCE, draws=200)
    assert one["laws"]["general"]["exponent"][1] < GENERAL[1] < one["laws"]["general"]["exponent"][2]
    assert one["losses"]["domain"]["change"][2][0] == pytest.approx(law_of(DOMAIN, [0.25])[0], abs=0.02)


def test_the_critical_ratio_over_tokens_is_that_of_each_token_count():
    """The curves are the end's losses times sqrt(t), so the end may lose the tolerance over sqrt(t)."""
    result = analyse(grid_losses(noise=0.0), TOLERANCE, draws=200)
    over = result["critical"]["over_tokens"]
    for tokens, ratio in zip(over["tokens"], over["ratios"], strict=True):
        assert ratio == pytest.approx(critical_of(GENERAL, TOLERANCE / (tokens / 1e5) ** 0.5), abs=2e-3)
    assert over["tokens"][-1] == 1e5 and over["ratios"][-1] == pytest.approx(critical_of(GENERAL), abs=2e-3)
    assert over["law"]["residual"] < 0.01 and over["law"]["exponent"] < 0


# What is not to be trusted


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("few_ratios", {"ratios": (0.0, 0.1, 0.5, 0.75)}),
        ("few_seeds", {"seeds": 2}),
        ("few_documents", {"rows": 12}),
        ("not_monotone", {"general": (-0.02, 0.03, -0.01, 0.04, 0.14)}),
        ("misfit", {"general": (-0.02, -0.018, 0.05, 0.055, 0.14)}),
        ("leave_one_out", {"general": (-0.02, -0.015, 0.07, 0.075, 0.16)}),
        ("flat", {"general": (0.0, 0.001, 0.0, 0.001, 0.0)}),
        ("outside", {"general": law_of((0.03, 2.0, -0.02), RATIOS)}),
        ("outside", {"general": law_of((0.3, 2.0, 0.06), RATIOS)}),
        ("wide_interval", {"noise": 0.05}),
        ("interval_outside", {"general": law_of((0.08, 1.2, 0.0), RATIOS), "noise": 0.004}),
        ("interval_outside", {"general": law_of((0.3, 2.0, 0.045), RATIOS), "noise": 0.004}),
        ("at_bound", {"general": (0.0, 0.0, 0.0, 0.0, 0.16), "noise": 0.0003}),
        ("domain_not_learnt", {"domain": (0.01, 0.02, 0.015, 0.02, 0.02)}),
        ("one_ratio_decides", {"general": (-0.02, -0.02, 0.045, 0.048, 0.4)}),
        ("not_finite", {"general": (0.0, 0.01, np.nan, 0.08, 0.2)}),
        ("no_law", {"ratios": (0.0, 0.5)}),
    ],
)
def test_bad_data_are_distrusted_for_the_right_reason(name, changes):
    result = analyse(grid_losses(**changes), TOLERANCE, draws=200)
    assert not result["trusted"] and name in reasons(result), reasons(result)
    assert json.dumps(result["reasons"])
    if name in ("few_ratios", "few_seeds", "few_documents"):
        assert reasons(result) == {name}
    if name == "outside":
        assert result["critical"]["side"] or result["critical"]["ratio"] > RATIOS[-1]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ratios": (0.0,)}, {"few_ratios", "no_law"}),
        ({"ratios": (1.0,)}, {"few_ratios", "no_law"}),
        ({"ratios": (0.0, 1.0), "seeds": 1}, {"few_ratios", "few_seeds", "no_law"}),
        ({"general": (0.0, 0.01, np.nan, 0.08, 0.2)}, {"not_finite"}),
        ({"domain": (0.0, -0.01, -0.1, np.nan, -0.2)}, set()),
    ],
)
def test_what_has_no_law_is_written_and_plotted(changes, expected, tmp_path):
    """A grid that has just begun, at ratio 0, has no run that reads the domain; a run may end in NaN."""
    result = analyse(grid_losses(**changes), TOLERANCE, draws=200)
    assert expected <= reasons(result)
    results = finite({"tolerance": TOLERANCE, "groups": {}, "seeds": [0], "runs": {"done": 1, "of": 9}})
    results["variants"] = finite({"": result})
    plot_ratios(results, tmp_path / "ratios.svg")
    text = as_markdown(results)
    assert ("no law." in text) == (result["critical"]["ratio"] is None)
    assert text.count("\n| 0") + text.count("\n| 1 |") == 2 * len(result["ratios"])


def test_with_one_seed_no_step_is_called_more_than_noise():
    """What the noise is cannot be known then; the one reason says so."""
    bumpy = grid_losses(general=law_of(GENERAL, RATIOS) + np.array([0, -0.003, 0, 0, 0]), seeds=1, noise=0)
    result = analyse(bumpy, TOLERANCE, draws=200)
    assert reasons(result) == {"few_seeds"}
    low, high = result["critical"]["interval"]  # over held-out documents alone
    assert low < result["critical"]["ratio"] < high < low + 0.2


def test_unfinished_unequal_and_ended_runs_are_distrusted():
    losses = grid_losses()
    assert reasons(analyse(losses, TOLERANCE, draws=200, missing=3)) == {"missing_runs"}
    longer = replace(losses, tokens=losses.tokens * np.linspace(1, 1.1, len(RATIOS)))
    assert reasons(analyse(longer, TOLERANCE, draws=200)) == {"unequal_tokens"}
    ended = replace(losses, ended={"r0.5-1": "collapse"})
    assert reasons(analyse(ended, TOLERANCE, draws=200)) == {"ended_early"}


def test_a_domain_law_that_fails_does_not_make_the_critical_ratio_untrue():
    result = analyse(grid_losses(domain=np.array([0.0, -0.3, -0.1, -0.5, -0.6])), TOLERANCE, draws=200)
    assert result["trusted"] and not result["laws"]["domain"]["trusted"]
    assert "not_monotone" in {reason["name"] for reason in result["laws"]["domain"]["reasons"]}


def test_each_loss_is_fitted_where_its_text_is_read():
    losses = grid_losses(ratios=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0))
    rng = np.random.default_rng(0)
    assert fit_ratio_law(losses, "general", rng, 200).used.tolist() == [True] * 5 + [False]
    assert fit_ratio_law(losses, "domain", rng, 200).used.tolist() == [False] + [True] * 5


# The stability gap


def test_the_stability_gap_is_the_rise_that_goes_away():
    losses = grid_losses(noise=0.0)
    shape = np.array([0, 0.1, 0.2, 0.15, 0.1, 0.05, 0, -0.05, -0.1, -0.1, -0.1, -0.1, -0.1])
    curves = np.stack([shape, shape * 0, shape[::-1] + 0.1, shape, shape])[None].repeat(3, 0)
    curves[1] += 0.01
    general = replace(losses.groups["general"], curves=curves)
    rows = stability_gaps(replace(losses, groups=losses.groups | {"general": general}), 0.05)
    dip, still, forgets = rows[:3]
    assert dip["peak"][0] == pytest.approx(0.2 + 0.01 / 3) and dip["peak_at"] == pytest.approx(1e5 / 6)
    assert dip["gap"] == pytest.approx(0.2)
    assert dip["recovered"] == pytest.approx(1e5 / 12 * (6 + 1 / 15), rel=1e-6)
    assert 1e5 / 12 * 5 < dip["recovered_to_tolerance"] < dip["recovered"]
    assert dip["peak"][1] < dip["peak"][0] < dip["peak"][2]
    assert still["gap"] == pytest.approx(0, abs=1e-9)
    assert forgets["recovered"] is None and forgets["end"][0] == pytest.approx(0.1 + 0.01 / 3)


def test_curve_laws_find_the_turn_of_the_general_loss():
    losses = grid_losses(noise=0.0)
    x = np.linspace(0, 1, 13)
    rising, turning = 0.1 * x**0.5, 0.3 * x**0.4 - 0.25 * x**1.5
    curves = np.stack([rising, turning, rising, rising, rising])[None].repeat(3, 0)
    general = replace(losses.groups["general"], curves=curves)
    laws = curve_laws(replace(losses, groups=losses.groups | {"general": general}))
    assert laws[0]["general"]["turns_at"] is None
    assert laws[1]["general"]["turns_at"] == pytest.approx(1e5 * (0.12 / 0.375) ** (1 / 1.1), rel=0.05)
    assert laws[2]["domain"]["exponent"] == pytest.approx(0.5, abs=0.01)


# A grid on disk


def written(folder: Path, corpus: Path, **changes: Any) -> Path:
    """A grid file of two sources, two ratios, two seeds and a variant, four steps each."""
    lines = (corpus / "held_out.jsonl").read_text().splitlines()
    for name, part in (("old", lines[:20]), ("new", lines[20:44])):
        (folder / f"{name}.jsonl").write_text("\n".join(part))
    train = (corpus / "train.jsonl").read_text().splitlines()
    for name, part in (("old_train", train[:100]), ("new_train", train[100:])):
        (folder / f"{name}.jsonl").write_text("\n".join(part))
    values = tiny_values(corpus, folder / "unused") | {
        "objective": "ntp",
        "threads": 1,
        "max_steps": 4,
        "data": {
            "max_length": 64,
            "sources": {name: {"path": str(folder / f"{name}_train.jsonl")} for name in ("old", "new")},
        },
        "eval": {"data": {name: str(folder / f"{name}.jsonl") for name in ("old", "new")}, "every": 1},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    grid = {
        "config": "run.yaml",
        "general": "old",
        "domain": ["new"],
        "ratios": [0, 0.5],
        "seeds": [0, 1],
        "documents": 16,
        "variants": {"fast": {"optim": {"warmup_steps": 0}}},
        "output_dir": str(folder / "grid"),
    } | changes
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    return folder / "grid.yaml"


@pytest.mark.slow
def test_a_grid_runs_and_goes_on_and_its_losses_are_those_of_its_runs(corpus, tmp_path, capsys):
    warm()
    file = written(tmp_path, corpus)
    assert main(["ratios", str(file)]) == 0
    said = capsys.readouterr().out
    assert "[5/6, about " in said and "Not to be trusted" in said and "2 ratios for the 3 parameters" in said
    results = json.loads((tmp_path / "grid" / "ratios.json").read_text())
    assert results["trusted"] is False and results["reasons"] and results["runs"] == {"done": 6, "of": 6}
    assert (tmp_path / "grid" / "ratios.svg").read_text().count("<svg") == 1
    assert (tmp_path / "grid" / "ratios.md").read_text() in said

    grid, experiment = load_grid(file)
    losses = read_losses(grid, experiment, tmp_path, "fast")
    assert losses is not None
    for name, source in (("general", "old"), ("domain", "new")):
        data = losses.groups[name]
        for s, seed in enumerate((0, 1)):
            for m, ratio in enumerate((0, 0.5)):
                folder = tmp_path / "grid" / f"fast-r{ratio}-{seed}"
                last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
                measured = last[f"eval/{source}/no_think_loss"]  # by the run itself, not from its saved model
                assert data.base[s] + data.changes[s, m] == pytest.approx(measured, abs=1e-5)
                drawn = [last[f"source/{each}/tokens"] for each in ("old", "new")]
                assert drawn[1] / sum(drawn) == pytest.approx(ratio, abs=0.15)
        assert data.curves[:, :, 0] == pytest.approx(0.0, abs=1e-9)
    assert len(results["variants"]["fast"]["stability"]) == 2

    times = {f: f.stat().st_mtime_ns for f in (tmp_path / "grid").glob("*/evaluation.json")}
    assert main(["ratios", str(file)]) == 0  # nothing is trained again
    assert times == {f: f.stat().st_mtime_ns for f in times}
    written(tmp_path, corpus, ratios=[0, 0.5, 0.75], seeds=[0, 1])
    assert main(["ratios", str(file)]) == 0  # only the new ratio is
    assert times == {f: f.stat().st_mtime_ns for f in times}
    after = json.loads((tmp_path / "grid" / "ratios.json").read_text())
    before = results["variants"]["fast"]["losses"]["general"]["by_seed"]
    assert [row[:2] for row in after["variants"]["fast"]["losses"]["general"]["by_seed"]] == before

    (tmp_path / "grid" / "fast-r0.75-1" / "evaluation.json").unlink()  # as if it were still to come
    part = collect_ratios(*load_grid(file), tmp_path)["variants"]["fast"]
    assert np.shape(part["losses"]["general"]["by_seed"]) == (1, 3)
    assert {"missing_runs", "few_seeds"} <= reasons(part)
    assert "3 runs of the grid are not finished" in json.dumps(part)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general": "older"}, "'older' is none of data.sources"),
        ({"domain": "old"}, "'old' is in both groups"),
        ({"general": ["old"], "domain": {}}, "both groups"),
        ({"ratios": [0.5, 0.1]}, "must ascend"),
        ({"ratios": [0.1, 1.5]}, "ratios.1"),
        ({"set": {"eval": {"every": 0}}}, "eval.every is 0"),
        ({"set": {"data": {"mixing": "stratified"}}}, "has data.mixing, which would change a ratio"),
        ({"set": {"data": {"sources": {"more": {"path": "more.jsonl"}}}}}, "source 'more' .* in no group"),
        ({"set": {"data": {"sources": {"new": {"exhausted": "stop"}}}}}, "source 'new' has exhausted: stop"),
        ({"tokens": 500, "variants": {"c": {"optim": {"schedule": "cosine"}}}}, "schedule cosine depends"),
        ({"ratios": [0, 0.5, 0.5000001]}, "told apart by six digits"),
        ({"set": {"data": {"weights_count": "documents"}}}, "a ratio is a share of tokens"),
        ({"variants": {"a": {}, "b": {"eval": {"every": 0}}}}, "variant 'b': eval.every is 0"),
        (
            {"variants": {"a": {}, "b": {"data": {"max_length": 32}}}},
            "variant 'b': its held-out text differs",
        ),
        (
            {"variants": {"c": {"data": {"sources": {"new": {"exhausted": "stop"}}}}}},
            "variant 'c': source 'new' has exhausted",
        ),
        ({"variants": {"a b": {}}}, "method 'a b-r0'"),
        ({"tolerence": 0.1}, "unknown key 'tolerence'"),
    ],
)
def test_bad_grids_are_refused(corpus, tmp_path, changes, message):
    file = written(tmp_path, corpus, **changes)
    with pytest.raises(ConfigError, match=message):
        load_grid(file)


def test_runs_of_a_grid_end_at_its_tokens(corpus, tmp_path):
    _, experiment = load_grid(written(tmp_path, corpus, tokens=777, variants={}))
    assert set(experiment.methods) == {"r0", "r0.5"}
    wanted = experiment.methods["r0.5"].set
    assert wanted["stop"] == {"collapse": False, "patience": 0, "input_tokens": 777}
    assert wanted["data"]["sources"] == {"old": {"weight": 0.5}, "new": {"weight": 0.5}}


def test_another_grid_does_not_overwrite_the_results_of_the_first(corpus, tmp_path):
    grid, _ = load_grid(written(tmp_path, corpus))
    folder = tmp_path / "grid"
    check_folder(grid, folder)  # nothing is there yet
    folder.mkdir()
    facts = {"groups": grid.sources, "ratios": list(grid.ratios), "seeds": list(grid.seeds)}
    (folder / "ratios.json").write_text(json.dumps(facts | {"variants": {"fast": None}}))
    check_folder(grid, folder)
    check_folder(load_grid(written(tmp_path, corpus, ratios=[0, 0.25, 0.5], seeds=[0, 1, 2]))[0], folder)
    for changes, said in (
        ({"ratios": [0, 0.4]}, "ratios differ"),
        ({"variants": {}}, "variants differ"),
        ({"general": "new", "domain": "old"}, "general and domain differ"),
    ):
        other, _ = load_grid(written(tmp_path, corpus, **changes))
        with pytest.raises(ConfigError, match=f"{said}.*choose another output_dir"):
            check_folder(other, folder)
    (folder / "ratios.json").write_text("{}")
    with pytest.raises(ConfigError, match="no grid wrote"):
        check_folder(grid, folder)
