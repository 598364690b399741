"""Numbers of the documents are those of the files in benchmarks/results."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import architectures, real_matrix
from rlpretrain.evaluation.intervals import student

ROOT = Path(__file__).parents[1]


def results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def rows(document: str, header: str, which: int = 0, with_head: bool = False) -> dict[str, list[str]]:
    """The rows of a table whose header line contains `header`, by their first cell; the head as ""."""
    lines = (ROOT / document).read_text().splitlines()
    start = [i for i, line in enumerate(lines) if line.startswith("|") and header in line][which]
    found = {"": cells_of(lines[start])[1:]} if with_head else {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        first, *rest = cells_of(line)
        found[first] = rest
    return found


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def numbers(cell: str) -> list[float]:
    """The numbers of a cell: `−2.11 [−4.36, .13]` has three."""
    return [float(n) for n in re.findall(r"-?\d*\.?\d+", cell.replace("−", "-").replace(",", " , "))]


def agree(written: list[float], measured: list[float], within: float) -> bool:
    """Whether the first numbers written are those measured."""
    pairs = zip(written, measured, strict=False)
    return len(written) >= len(measured) and all(abs(a - b) <= within for a, b in pairs)


def check_sentences(document: str, heading: str, wanted: Mapping[str, Sequence[float]]) -> None:
    """The numbers that each pattern finds, once, in the text after the heading are those wanted."""
    text = " ".join((ROOT / document).read_text().split(heading)[1].split())
    for sentence, values in wanted.items():
        (written,) = re.findall(sentence, text)
        assert agree(numbers(written), list(values), 0.00051), (sentence, values)


def teraflops(method: Mapping[str, Any]) -> list[float]:
    """What a method of a comparison spent, first stages included."""
    spent = method["spent"]
    return [spent.get("flops_with_stages", spent["flops"]) / 1e12]


REAL_TEXT = {
    "gain of a sampled thought": "gain_frozen",
    "over an empty thought": "over_empty",
    "over its own tokens shuffled": "over_shuffled",
    "over another sentence's thought": "over_other",
    "right after a sampled thought": "think_sampled",
    "right after the greedy thought": "think_greedy",
    "right without a thought": "direct",
    "loss without a thought, per token": "no_think_loss",
}


def test_the_table_of_real_text():
    measured = results("smollm2_rlp")
    table = rows("docs/evidence.md", "| before RLP | RLP |")
    for label, name in REAL_TEXT.items():
        for cell, arm in zip(table[label], ("base", "rlp", "ntp_tokens", "ntp_compute"), strict=True):
            written = numbers(cell)
            expected = [measured[arm][name], *measured[arm][f"{name}_ci"]][: len(written)]
            assert agree(written, expected, 0.011), (label, arm, written, expected)


LEARNT = {
    "thinks, sampled": "think_sampled",
    "answers directly": "direct",
    "gain": "gain_frozen",
    "gain, empty thought": "empty",
    "gain, shuffled thought": "shuffled",
    "no-think loss": "no_think_loss",
}


@pytest.mark.parametrize(
    ("document", "which", "file"),
    [
        ("objectives", 0, "compare"),
        ("objectives", 1, "compare-low-hits"),
        ("measured", 0, "compare-thinking"),
        ("measured", 1, "compare-v-pretrain"),
        ("measured", 2, "compare-sip"),
        ("measured", 3, "compare-preference"),
        ("measured", 4, "compare-distill"),
        ("measured", 5, "compare-distill-random"),
        ("measured", 6, "compare-remit"),
    ],
)
def test_what_the_objectives_learn(document, which, file):
    measured = results(file)["methods"]
    start = "| its own number, base → after |" if document == "objectives" else "no-think loss | TFLOP |"
    table = rows(f"docs/{document}.md", start, which, with_head=True)
    head = table.pop("")
    assert {name.strip("`") for name in table} == set(measured)
    assert set(LEARNT) & set(head)
    for method, cells in table.items():
        for column, cell in zip(head, cells, strict=True):
            if column in LEARNT:
                expected, written = measured[method.strip("`")][LEARNT[column]], numbers(cell)
                assert agree(written, expected[: len(written)], 0.0051), (method, column, written, expected)


def test_choosing_has_the_numbers_of_that_table():
    measured = results("compare")["methods"]
    pages = {"`ntp`": "ntp_tokens", "`sft_mixed`": "sft_mixed", "`rlp`": "rlp", "`rpt`": "rpt"}
    pages |= {"`pretrain_zero`": "pretrain_zero", "`rlpt` (`information_gain`)": "rlpt"}
    table = rows("docs/choosing.md", "| needs beside the text |")
    for row, method in pages.items():
        think, gain = table[row][2], table[row][3]
        assert agree(numbers(think), measured[method]["think_sampled"][:1], 0.0051), row
        assert agree(numbers(gain), measured[method]["gain_frozen"][:1], 0.051), row
    later = results("compare-thinking")["methods"]
    for method in ("latro", "nover", "bow", "quiet_star", "remit"):
        cost, think, gain = table[f"`{method}`"][1:4]
        spent = later[method]["spent"]["flops"] / later["ntp"]["spent"]["flops"]
        assert agree(numbers(cost), [spent], 0.051), method
        assert agree(numbers(think), later[method]["think_sampled"][:1], 0.0051), method
        assert agree(numbers(gain), later[method]["gain_frozen"][:1], 0.051), method


def test_choosing_has_the_clean_loss_of_every_method():
    def above(file: str, *pairs: str) -> list[float]:
        methods = results(file)["methods"]
        losses = [[methods[arm]["no_think_loss"][0] for arm in pair.split(" - ")] for pair in pairs]
        return [loss - control for loss, control in losses]

    first = {"sft_mixed": ["sft_mixed"], "rlp": ["rlp"], "rpt": ["rpt"], "pretrain_zero": ["pretrain_zero"]}
    first |= {"rlpt` (`match`, `judge`)": ["rlpt_match", "rlpt_judge"]}
    first |= {
        "rlpt` (`information_gain`)": ["rlpt"],
        "likelihood` (`prob`, `log_prob`, ...)": ["rlpr", "jepo"],
    }
    wanted = {
        name: above("compare", *(f"{arm} - ntp_tokens" for arm in arms)) for name, arms in first.items()
    }
    for name in ("remit", "latro", "nover", "bow", "quiet_star"):
        wanted[name] = above("compare-thinking", f"{name} - ntp")
    wanted["preference"] = above("compare-preference", "filter - mle", "rwr - mle")
    wanted["distill"] = above("compare-distill", "salt - ntp")
    wanted["v_pretrain"] = above("compare-v-pretrain", "designer - ntp")
    wanted["sip"] = above("compare-sip", "dpo - ntp", "rf_nll - ntp")
    table = rows("docs/choosing.md", "| clean loss |")
    for name, values in wanted.items():
        row = next(cells for first_cell, cells in table.items() if first_cell.startswith(f"`{name}"))
        assert agree(numbers(row[5]), values, 0.00051), name


def over_seeds(values: Sequence[float]) -> list[float]:
    """The mean of a number of each seed, and its 95% interval."""
    half = student(len(values) - 1) * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return [float(np.mean(values)), float(np.mean(values)) - half, float(np.mean(values)) + half]


def test_wrong_steps_in_samples():
    """The first columns of the table of preferences, and the sentences after it."""
    samples, learnt = results("preference-samples"), results("compare-preference")["differences"]
    table = rows("docs/measured.md", "| | wrong samples |")

    def of(arm: str, name: str) -> list[float]:
        found = [samples[f"{arm}-{seed}"] for seed in range(3)]
        return [row[name if name in row else "plain"] for row in found if name in row or name == "good"]

    for arm, (wrong, behind_bad, loss, *_) in table.items():
        name = arm.strip("`")
        if name == "base":
            assert agree(numbers(wrong + loss), [*samples["base"].values()], 0.00051)
            continue
        for cell, number in ((wrong, "good"), (behind_bad, "bad"), (loss, "loss")):
            assert bool(cell) is bool(of(name, number)), (name, number)
            if cell:
                assert agree(numbers(cell), over_seeds(of(name, number)), 0.00051), (name, number)

    def above(arm: str, other: str) -> list[float]:
        pairs = zip(of(arm, "loss"), of(other, "loss"), strict=True)
        return over_seeds([a - b for a, b in pairs])

    mean, low, high = above("conditional", "mle")
    wanted = {
        r"writes wrong steps in (.*?) of its": over_seeds(of("conditional", "good"))[:1],
        r"samples where `mle` does in (.*?)\*\*": over_seeds(of("mle", "good"))[:1],
        r"as it is used, is (.*?) lower": [-mean, -high, -low],
        r"Behind the bad token it is wrong in ([.\d]+)\. ": over_seeds(of("conditional", "bad"))[:1],
        r"at a loss (.*?) above `conditional`'s": above("filter", "conditional"),
    }
    check_sentences("docs/measured.md", "## Preferences", wanted)
    text = " ".join((ROOT / "docs" / "measured.md").read_text().split("## Preferences")[1].split())
    for arm, pattern in {
        "conditional": r"the loss of `conditional` is (.*?) above `mle`\*\*",
        "conditional_permuted": r"random scores too \((.*?)\)",
        "conditional_drop_10": r"`conditional_drop_10`\), it is (.*?) above `mle`",
    }.items():
        (written,) = re.findall(pattern, text)
        assert agree(numbers(written), learnt[f"{arm} - mle"]["no_think_loss"], 0.0051), arm


def test_right_continuations():
    """The first column of the table of SIP, and the sentences after it."""
    samples = results("sip-samples")

    def of(arm: str) -> list[float]:
        return [samples[f"{arm}-{seed}"]["right"] for seed in range(3)]

    def above(arm: str, other: str) -> list[float]:
        return over_seeds([a - b for a, b in zip(of(arm), of(other), strict=True)])

    for arm, (right, *_) in rows("docs/measured.md", "| | right samples |").items():
        name = arm.strip("`")
        expected = [samples["base"]["right"]] if name == "base" else over_seeds(of(name))
        assert agree(numbers(right), expected, 0.00051), name

    def below(arm: str, other: str) -> list[float]:
        mean, low, high = above(arm, other)
        return [-mean, -high, -low]

    wanted = {
        r"trace in (.*?) of its samples": over_seeds(of("rf_nll"))[:1],
        r"samples\*\*, `dpo` in (.*?), next": over_seeds(of("dpo"))[:1],
        r"as they are in (.*?), below": over_seeds(of("ntp"))[:1],
        r"Paired, `rf_nll` is (.*?) above the control": above("rf_nll", "filter"),
        r"and `dpo` (0.027.*?) below it": below("dpo", "filter"),
        r"at `chance` `dpo` is (.*?) and": above("dpo", "dpo_chance"),
        r"and `rf_nll` (0.698.*?) below the same": above("rf_nll", "rf_nll_chance"),
        r"apart from none \((.*?)\)": above("dpo", "dpo_flips_10"),
        r"30% cost (.*?)\. -": above("dpo", "dpo_flips_30"),
    }
    check_sentences("docs/measured.md", "## Self-Improving Pretraining", wanted)


def test_teachers_of_random_weights():
    """The sentences about them; the share of likeliest tokens is a measurement of its own."""
    measured = results("compare-distill-random")
    assert measured["seeds"] == [3, 4, 5, 6, 7, 8]  # none of the comparison before

    def thinks(arms: str) -> list[float]:
        return measured["differences"][arms]["think_sampled"]

    mean, low, high = thinks("random_weights_permuted - random_weights")
    wanted = {
        r"`random_weights` is (.*?) above `ntp` in": thinks("random_weights - ntp"),
        r"of another seed are (.*?) above `ntp`": thinks("other_random_weights - ntp"),
        r"apart from its own \((.*?)\)": thinks("other_random_weights - random_weights"),
        r"other tokens it is (.*?) below `random": [-mean, -high, -low],
        r"told apart from `ntp` \((0\.076.*?)\)": thinks("random_weights_permuted - ntp"),
        r"smoothing minus `ntp` is (.*?)\. -": thinks("label_smoothing - ntp"),
    }
    check_sentences("docs/measured.md", "### Teachers of random weights", wanted)


def test_selected_tokens():
    """The sentences about remit's selection and its control."""
    differences = results("compare-remit")["differences"]

    def of(arms: str, name: str = "think_sampled", sign: int = 1) -> list[float]:
        mean, *ends = differences[arms][name]
        return [sign * mean, *sorted(sign * end for end in ends)]

    wanted = {
        r'"thinks" is (.*?) above as many': of("remit_top_k_shuffled - remit_top_k", sign=-1),
        r"told apart from `ntp` \((.*?)\)": of("remit_top_k_shuffled - ntp"),
        r"Against `ntp` it is (.*?)\. ": of("remit_top_k - ntp"),
        r"its no-think loss is (.*?) above `ntp`": of("remit_top_k - ntp", "no_think_loss"),
        r"`ntp`'s and (.*?) above the random": of(
            "remit_top_k_shuffled - remit_top_k", "no_think_loss", sign=-1
        ),
        r"direct answers are (.*?) fewer": of("remit_top_k - ntp", "direct", sign=-1),
        r"from their control\*\* \((.*?) in": of("remit_shuffled - remit", sign=-1),
    }
    check_sentences("docs/measured.md", "## Selected tokens", wanted)


def gpu_step(name: str) -> dict[str, float]:
    cells = results("gpu")["parts"]["steps"]["cells"]
    return next(cell["values"] for cell in cells if cell["name"] == name)


@pytest.mark.parametrize(
    ("recipe", "cell"),
    [
        ("only the training part", "document 2048, 16 thoughts of 256: tree, compiled"),
        ("the same with layers as they are", "document 2048, 16 thoughts of 256: tree"),
        (
            "the same, thoughts of 1,024 tokens, compiled",
            "document 2048, 16 thoughts of 1024: tree, compiled",
        ),
        ("documents of 16,384 tokens", "document 16384, 16 thoughts of 256: tree, compiled"),
    ],
)
def test_recipes_on_an_h100(recipe, cell):
    (row,) = (
        cells for first, cells in rows("docs/recipes.md", "| recipe | model |").items() if recipe in first
    )
    measured = gpu_step(cell)
    assert agree(numbers(row[2]), [measured["seconds"]], 0.00051)
    assert agree(numbers(row[3]), [measured["memory_gib"]], 0.051)


def test_sampling_on_an_h200():
    cells = results("gpu_h200")["parts"]["sampling"]["cells"]
    rates = {cell["name"]: cell["values"]["tokens_per_s"] for cell in cells}
    table = rows("docs/gpu.md", "| | transformers | vLLM |")
    asked = [(64, 64, 1024), (64, 256, 1024), (16, 64, 8192), (16, 256, 8192)]
    for (count, length, after), row in zip(asked, table.values(), strict=True):
        for engine, cell in zip(("hf", "vllm_local"), row, strict=True):
            measured = rates.get(f"{engine}: {count} thoughts of {length} after {after} tokens")
            assert cell == ("" if measured is None else f"{measured:,.0f}"), (engine, count, length)


def test_what_ran_on_an_h200():
    parts = results("gpu_h200")["parts"]
    text = (ROOT / "docs" / "gpu.md").read_text()
    methods = [cell["values"] for cell in parts["methods"]["cells"]]
    assert len(methods) == 19 and "**Methods**: three steps of each of 19 configurations" in text
    assert max(values["apart"] for values in methods) < 1.45e-6
    paths = parts["paths"]["cells"]
    ran = [cell for cell in paths if cell["status"] == "ok" and not cell["name"].startswith("resume")]
    assert len(ran) == 20 and all(cell["status"] in ("ok", "deepspeed is not installed") for cell in paths)
    assert max(cell["values"].get("apart", 0.0) for cell in paths) < 6.45e-6
    assert [cell["status"] for cell in parts["services"]["cells"]] == ["ok"] * 6


def test_the_run_with_vllm():
    (call, *_) = results("gpu_vllm")["calls"]
    (cell,) = call["parts"]["run"]["cells"]
    values = cell["values"]
    (row,) = (
        cells
        for first, cells in rows("docs/recipes.md", "| recipe | model |").items()
        if "vLLM in the pro" in first
    )
    names = ("step_time", "perf/rollout_s", "perf/train_s", "perf/sync_s")
    assert agree(numbers(row[2]), [values[name] for name in names], 0.0051)
    assert agree(numbers(row[3]), [values["memory_gib"]], 0.051)
    share = values["perf/rollout_s"] / values["step_time"]
    assert f"{share:.0%}" == "72%" and round(values["whole_s"]) == 177
    hour = values["step_time"] * 1000 / 60
    assert f"take {hour:.0f} minutes" in (ROOT / "docs" / "recipes.md").read_text()


def test_real_matrix_in_the_benchmarks_and_the_recipes():
    measured = {row["name"]: row for row in results("real_matrix")["rows"]}
    for name, cells in rows("benchmarks/README.md", "| method / engine / weights |").items():
        row = measured.get(name) or measured[name.replace(" /", ",", 1)]
        assert agree(numbers(cells[0]), [row["seconds"]], 0.051), name
        memory = [value for value in (row["peak_gib"], row["promised_gib"]) if value is not None]
        assert agree(numbers(cells[1]) + numbers(cells[2]), memory, 0.0051), name
    table = rows("docs/recipes.md", "| recipe | model |")
    (row,) = (cells for first, cells in table.items() if "engine `hf`, all weights" in first)
    whole = measured["rlp / hf / all"]
    assert agree(numbers(row[2]) + numbers(row[3]), [whole["seconds"], whole["peak_gib"]], 0.051)
    promised = [row for row in measured.values() if row["promised_gib"] is not None]
    estimates = [row["promised_gib"] / row["peak_gib"] - 1 for row in promised]
    text = (ROOT / "docs" / "recipes.md").read_text()
    assert f"−{-min(estimates):.0%} to +{max(estimates):.0%} of the peak in [{len(promised)} runs]" in text
    page = (ROOT / "benchmarks" / "README.md").read_text()
    near = sum(abs(estimate) <= 0.15 for estimate in estimates)
    assert (
        f"within 15% in {near} of {len(promised)} rows" in page
        and f"{len(measured)} of {len(list(real_matrix.rows()))} rows are done" in page
    )


def test_real_matrix_on_a_card():
    measured = {row["name"]: row for row in results("gpu_matrix")["rows"]}
    table = rows("benchmarks/README.md", "| on an H200 |")
    assert list(table) == list(measured)
    assert all(row["fault"] is None and row["trained"] == row["steps"] for row in measured.values())
    for name, cells in table.items():
        row = measured[name]
        memory = [value for value in (row["peak_gib"], row["promised_gib"]) if value is not None]
        assert agree([n for cell in cells[:3] for n in numbers(cell)], [row["seconds"], *memory], 0.0051), (
            name
        )
    promised = [row for row in measured.values() if row["promised_gib"] is not None]
    estimates = [row["promised_gib"] / row["peak_gib"] - 1 for row in promised]
    span = f"−{-min(estimates):.0%} to +{max(estimates):.0%}"
    assert f"{span} of the peak here" in (ROOT / "benchmarks" / "README.md").read_text()
    assert f"{span} in {len(promised)} on a GPU" in (ROOT / "docs" / "recipes.md").read_text()


def test_engines():
    measured = results("engines")
    table = rows("benchmarks/README.md", "| engine | thinks, sampled |")
    base = measured["base"]
    assert agree(numbers(table["(base)"][0]), [base["think_sampled"], *base["think_sampled_ci"]], 0.00051)
    service = results("rollout")["results"]["service"]["over_offline"]
    assert f"{service:.3f}".lstrip("0") in (ROOT / "docs" / "engines.md").read_text()
    injected = sum(kind["injections"] for kind in results("faults")["results"].values())
    assert f"{injected} injected faults" in (ROOT / "docs" / "engines.md").read_text()


def test_soak():
    measured = results("soak")
    page = " ".join((ROOT / "benchmarks" / "README.md").read_text().split())
    table = rows("benchmarks/README.md", "| process | MiB in the first fifth |")
    assert set(table) == set(measured["memory"])
    for name, row in measured["memory"].items():
        assert agree(
            [v for cell in table[name][:2] for v in numbers(cell)], [row["first_mib"], row["last_mib"]], 0.51
        )
        assert agree(numbers(table[name][2]), [row["mib_an_hour"]], 0.051)
    answered = measured["requests"]["route=/v1/completions,status=200"]
    for text in (
        f"ended after {measured['minutes']:.0f} minutes and {measured['steps']:,} steps",
        f"All {measured['groups']:,} groups were trained once",
        f" {measured['expected'] - measured['groups']} lost and {measured['aborted']} aborted",
        f"{measured['counted']['server_failures']} times the trainer left out a service",
        f"answered {answered:,} sampling requests",
    ):
        assert text in page
    assert not measured["twice"]


def test_weights_as_changes():
    """The table, the ratios in the overview, and the sentence in docs/rollout.md."""
    measured = {(row["rate"], row["transfer"]): row for row in results("weight_changes")["rows"]}
    text = (ROOT / "benchmarks" / "README.md").read_text().split("## `weight_changes`")[1].split("## `")[0]
    lines = [cells_of(line) for line in text.splitlines() if re.match(r"\| 1e-", line)]
    columns_of = ("mib", "first_mib", "gather_s", "write_s", "load_s")
    assert len(lines) == len(measured) == 6
    for rate, transfer, *cells in lines:
        row = measured[float(rate), transfer]
        columns = [row[name] for name in columns_of]
        assert agree([float(cell) for cell in cells[:2]], columns[:2], 0.05)
        assert agree([float(cell) for cell in cells[2:]], columns[2:], 0.005)
    whole = {part: [row[part] for (_, how), row in measured.items() if how == "file"] for part in columns_of}
    changes = {
        part: [row[part] for (_, how), row in measured.items() if how == "changes"] for part in columns_of
    }
    ratios = [few / all_ for few, all_ in zip(changes["mib"], whole["mib"], strict=True)]
    overview = rows("benchmarks/README.md", "| command | what |")["`python -m benchmarks.weight_changes`"]
    assert agree(numbers(overview[-1]), ratios, 0.005)
    written = " ".join((ROOT / "docs" / "rollout.md").read_text().split("**Changes only**")[1].split())
    (sizes,) = re.findall(r"a sync sends (.*?) after the first step", written)
    expected = [changes["mib"][0], whole["mib"][0], 1e-6, changes["mib"][1], 1e-5, changes["mib"][2], 1e-4]
    found = [float(number) for number in re.findall(r"\d*\.?\d+(?:e-\d)?", sizes)]
    firsts = [min(changes["first_mib"]), max(changes["first_mib"])]
    assert agree(found[:7], expected, 0.5) and agree(found[7:], firsts, 0.05)
    (seconds,) = re.findall(r"longer, not less: (.*?) \(\[benchmark", written)
    spans = [min(changes["write_s"]), max(changes["write_s"]), min(whole["write_s"]), max(whole["write_s"])]
    assert agree(numbers(seconds), spans, 0.0051)


def test_updates_in_flight():
    measured = results("rollout")["results"]["updates"]
    ratio, rounds = measured["in_flight_over_drained"], sorted(measured["ratios"])
    ours, theirs = (
        measured["in_flight"]["sample/token_staleness_mean"],
        measured["drained"]["sample/staleness_mean"],
    )
    text = " ".join((ROOT / "docs" / "rollout.md").read_text().split())
    (found,) = re.findall(r"of a step was seen \((.*?)\), and ids are (.*?) instead of (\S+)", text)
    three = numbers(found[0].replace("three", ""))
    assert agree(three, [ratio, rounds[0], rounds[-1]], 0.0051)
    assert agree([*numbers(found[1]), *numbers(found[2])], [ours, theirs], 0.0051)
    row = rows("benchmarks/README.md", "| command | what |")["`python -m benchmarks.rollout updates`"]
    assert agree(numbers(row[-1].replace("three", "")), [ratio, *rounds, ours, theirs], 0.0051)


ORDERS = {"uniform": "uniform", "ascending": "ascending", "the best two elevenths alone, five times": "best"}
SCHEDULES = (
    ("constant", "eval"),
    ("constant", "eval_averaged"),
    ("decay", "eval"),
    ("decay", "eval_averaged"),
)


def test_order_decay_and_average():
    methods = results("compare-order")["methods"]

    def of_seeds(order: str, schedule: str, kind: str) -> np.ndarray:
        return np.array(methods[f"{order}_{schedule}"]["logged"][f"{kind}/no_think_loss"][3:])

    table = rows("docs/mixtures.md", "| constant, averaged |")
    assert set(table) == set(ORDERS)
    for label, order in ORDERS.items():
        for cell, (schedule, kind) in zip(table[label], SCHEDULES, strict=True):
            mean, low, _ = _interval(of_seeds(order, schedule, kind))
            assert agree(numbers(cell), [mean, mean - low], 0.00051), (label, schedule, kind)
    decay, average = (
        of_seeds("uniform", *setting) - of_seeds("ascending", *setting)
        for setting in (("decay", "eval"), ("constant", "eval_averaged"))
    )
    text = " ".join((ROOT / "docs" / "mixtures.md").read_text().split())
    (found,) = re.findall(r"order is worth (.*?) with a decay and (.*?) with .*? the two is (.*?\])", text)
    for written, effect in zip(found, (decay, average, decay - average), strict=True):
        assert agree(numbers(written), _interval(effect), 0.00051), written


def test_architectures():
    """The table is the command's, and some of its rows are found again."""
    committed = results("architectures")["rows"]
    lines = list(architectures.table(committed))
    assert "\n".join(lines) in (ROOT / "docs" / "architectures.md").read_text()
    assert f"[{len(committed)} architectures]" in (ROOT / "docs" / "scoring.md").read_text()
    in_trees = sum(row["packing"] == "tree" for row in committed)
    assert f"[{in_trees} of {len(committed)} architectures]" in (ROOT / "docs" / "status.md").read_text()
    known = {row["model"]: row for row in committed}
    again = architectures.measure(["nemotron", "bamba", "deepseek_v3"])
    for row in again:
        for field in ("class", "packing", "why", "lora", "decoding"):
            assert row[field] == known[row["model"]][field], (row["model"], field)
        assert max(row["nats"] or 0.0, row["sampled_nats"]) < 1e-4, row["model"]


FIRST_STAGES = {
    "none": (None, "rl"),
    "none, RL for 165 to 170 steps": (None, "rl_long"),
    "RLP on op 2": ("rlp_op2", "rlp_op2_rl"),
    "RLP on op 2 to 4": ("rlp", "rlp_rl"),
    "the same, rewarded by the probability": ("prob", "prob_rl"),
    "answers alone": ("answers", "answers_rl"),
    "gold traces": ("traces", "traces_rl"),
}


def test_rlp_before_rlvr():
    measured = results("compare-rlp-first")
    answers, methods = measured["tasks"], measured["methods"]
    shown = ("verified@1, thinking", "verified@4, thinking")
    table = rows("docs/graphs.md", "| first stage | verified@1 |")
    assert set(table) == set(FIRST_STAGES)
    for label, (first, second) in FIRST_STAGES.items():
        *cells, tera = table[label]
        wanted = [value for stage in (first, second) if stage for n in shown for value in answers[stage][n]]
        assert agree([value for cell in cells for value in numbers(cell)], wanted, 0.00051), label
        assert agree(numbers(tera), teraflops(methods[second]), 0.0051), label
    text = " ".join((ROOT / "docs" / "graphs.md").read_text().split())
    (base,) = re.findall(r"the base has (\S+ \[.*?\]) and (\S+ \[.*?\])\.", text)
    (apart,) = re.findall(r"after RLP on op 2 is (.*?\]) apart in verified@1 and (.*?\]) above", text)
    (short,) = re.findall(r"paired with the short RL, (.*?\]) in verified@4", text)
    for written, pair, number in (
        (base[0], "base", shown[0]),
        (base[1], "base", shown[1]),
        (apart[0], "rlp_op2_rl - rl_long", shown[0]),
        (apart[1], "rlp_op2_rl - rl_long", shown[1]),
        (short, "rlp_op2_rl - rl", shown[1]),
    ):
        assert agree(numbers(written), answers[pair][number], 0.00051), (written, pair)


AFTER_THE_BASE = {
    "none: the base": "base",
    "RL on op 2 and 3": "easy",
    "RL on op 6 and 7, the edge": "edge",
    "RL on op 9 and 10": "hard",
    "RL at the edge, rewarded by the answer": "outcome",
    "RL at the edge, random rewards": "random_reward",
    "gold traces of the problems of the edge": "sft",
    "mid-training: 200 steps on gold traces of the edge": "mid",
    "mid-training, then RL at the edge": "mid_edge",
}


def test_rl_at_the_edge():
    measured = results("compare-interplay")
    parts, methods = measured["parts"], measured["methods"]
    one, four = "verified@1, thinking", "verified@4, thinking"
    table = rows("docs/graphs.md", "| training after the base |")
    assert set(table) == set(AFTER_THE_BASE)
    for label, method in AFTER_THE_BASE.items():
        *cells, tera = table[label]
        wanted = [
            parts[op][method][number] for op, number in (("6", one), ("7", one), ("8", one), ("7", four))
        ]
        assert agree([v for cell in cells for v in numbers(cell)], [v for w in wanted for v in w], 0.00051), (
            label
        )
        if method != "base":
            assert agree(numbers(tera), teraflops(methods[method]), 0.0051), label
    text = " ".join((ROOT / "docs" / "graphs.md").read_text().split("## RL at the edge")[1].split())
    for sentence, pair, number in (
        (r"verified@1 (\S+ \[.*?\]), verified@4 .127", "edge - hard", one),
        (r"\], verified@4 (.127 \[.*?\])", "edge - hard", four),
        (r"op 7 \(verified@4 (.*?\])", "easy - base", four),
        (r"stage lie (.*?\]) above RL alone", "mid_edge - edge", one),
        (r"mid-training \((.*?\])", "mid_edge - mid", one),
    ):
        (written,) = re.findall(sentence, text)
        assert agree(numbers(written), parts["7"][pair][number], 0.00051), (written, pair)
    for sentence, pair in (
        (r"edge lies (.*?\]) below them", "edge - sft"),
        (r"together lie (.*?\]) below gold", "mid_edge - sft"),
    ):
        (written,) = re.findall(sentence, text)
        mean, low, high = parts["7"][pair][one]
        assert agree(numbers(written), [-mean, -high, -low], 0.00051), (written, pair)
    of_seed = [methods[method]["by_seed"]["think_sampled"] for method in ("hard", "base")]
    assert of_seed[0] == of_seed[1]


def test_exposure_to_a_context():
    measured = results("compare-exposure")
    by_seed, one = measured["parts_by_seed"], "verified@1, thinking"
    table = rows("docs/graphs.md", "| B in the base |")
    shares = {"none": "0", ".1%": "01", "1%": "1", "10%": "10"}
    assert len(table) == len(shares) * len(measured["seeds"])
    for label, cells in table.items():
        share, base = label.split(", base ")
        for part, cell in zip(("A2", "A6", "B2", "B4", "B6"), cells, strict=True):
            wanted = [by_seed[part][f"{stage}_{shares[share]}"][one][int(base)] for stage in ("base", "rl")]
            assert agree(numbers(cell), wanted, 0.00051), (label, part)
    wanted = {r"told apart from 0 \(B, op 6, .1%: (.*?\])": measured["parts"]["B6"]["rl_01 - base_01"][one]}
    check_sentences("docs/graphs.md", "## Exposure", wanted)
    for part in measured["parts"].values():
        for share in shares.values():
            _, low, high = part[f"rl_{share} - base_{share}"][one]
            assert low <= 0 <= high
    never = [
        by_seed[part][f"{stage}_0"]["verified@4, thinking"]
        for part in ("B2", "B4", "B6")
        for stage in ("base", "rl")
    ]
    assert not np.any(never)


EVERY_METHOD = {
    "none": None,
    "RLP": "rlp",
    "`likelihood`, `prob`": "likelihood",
    "LaTRO": "latro",
    "NOVER": "nover",
    "BOW": "bow",
    "Quiet-STaR": "quiet_star",
    "RLPT, information gain": "rlpt",
    "answers: `ntp` on the same documents": "ntp",
    "gold traces of the same problems": "traces",
    "`ntp` on the base's text": "ntp_text",
    "ReMiT on the base's text": "remit",
    "SALT on the base's text, throughout": "distill",
    "V-Pretraining on the base's text": "v_pretrain",
}


def test_every_method_then_the_same_rl():
    measured, one = results("compare-overview"), "verified@1, thinking"
    answers, methods = measured["tasks"], measured["methods"]
    table = rows("docs/graphs.md", "| first stage, then RL |")
    assert set(table) == set(EVERY_METHOD)
    for label, method in EVERY_METHOD.items():
        first, then, apart, loss, tera = table[label]
        second = f"{method}_rl" if method else "rl"
        assert agree(numbers(first), answers[method or "base"][one], 0.00051), label
        assert agree(numbers(then), answers[second][one], 0.00051), label
        assert agree(numbers(apart), answers[f"{second} - rl"][one] if method else [], 0.00051), label
        assert agree(numbers(loss), methods[method or "base"]["no_think_loss"][:1], 0.0051), label
        assert agree(numbers(tera), teraflops(methods[second]), 0.0051), label
    pairs = {
        r"problems are (.*?\]) from RLP": "traces - rlp",
        r"next-token prediction (\S+ \[.*?\]) from the base": "ntp_text - base",
        r"ReMiT is (.*?\]) from the base": "remit - base",
        r"SALT (\S+ \[.*?\]): their": "distill - base",
        r"gold traces, is (.*?\]) from the base": "v_pretrain - base",
    }
    wanted = {sentence: answers[pair][one] for sentence, pair in pairs.items()}
    wanted[r"after RLPT (.*?)\. -"] = measured["tasks_by_seed"]["rlpt_rl"][one]
    check_sentences("docs/graphs.md", "## Every method", wanted)
    for method in ("likelihood", "latro", "nover", "bow"):
        _, low, high = answers[f"{method} - rlp"][one]
        assert low <= 0 <= high
    for method in ("rlp", "likelihood", "latro", "nover", "bow", "traces"):
        _, low, high = answers[f"{method}_rl - rl"][one]
        assert low <= 0 <= high
    assert all(answers[f"{m}_rl - rl"][one][2] < 0 for m in ("ntp_text", "remit", "distill", "v_pretrain"))
    chosen = rows("docs/choosing.md", "| needs beside the text |")
    for label, cells in chosen.items():
        name = label.split("`")[1]
        method = {"sft_mixed": "traces", "verified": "rl"}.get(name, name)
        if "augment" not in label and (found := numbers(cells[4])):
            means = [answers[stage][one][0] for stage in (method, f"{method}_rl") if stage in answers]
            assert means and agree(found, means, 0.0051), label


READ = {
    "none: the base": "base",
    "plain documents": "plain",
    'plain documents, as many tokens as "best of eight"': "plain_tokens",
    "one thought a document": "one",
    "best of eight": "best",
    "best of eight, of another document": "shuffled",
    "gold traces": "gold",
}


def test_generated_thoughts():
    measured, one = results("compare-augmented"), "verified@1, thinking"
    answers, methods = measured["tasks"], measured["methods"]
    table = rows("docs/augment.md", "| read | verified@1 |")
    assert set(table) == set(READ)
    for label, method in READ.items():
        first, four, loss, tokens = table[label]
        wanted = [*answers[method][one], *answers[method]["verified@4, thinking"]]
        assert agree(numbers(first) + numbers(four), wanted, 0.00051), label
        assert agree(numbers(loss), methods[method]["no_think_loss"][:1], 0.0051), label
        if method != "base":
            assert agree(numbers(tokens), [methods[method]["spent"]["input_tokens"] / 1000], 0.51), label
    pairs = {
        r"eight lie (.*?\]) above the base": "best - base",
        r"base and (\S+ \[.*?\]) above thoughts": "best - one",
        r"same documents are (.*?\]) above them": "gold - best",
        r"below the base \((.*?\])": "one - base",
    }
    wanted = {sentence: answers[pair][one] for sentence, pair in pairs.items()}
    check_sentences("docs/augment.md", "## Measured", wanted)
    (found,) = (
        cells[4] for label, cells in rows("docs/choosing.md", "| needs beside").items() if "augment" in label
    )
    assert agree(numbers(found), answers["best"][one][:1], 0.0051)


CONTINUED = {
    "the old text alone, 1,200 steps": "old",
    "400 more steps of it": "same",
    "400 steps of new text": "rewarmed_0",
    "5% replay": "rewarmed_5",
    "25% replay": "rewarmed_25",
    "25% replay, no decay": "constant_25",
    "a tenth of the rate, no replay": "gentle_0",
    "a tenth of the rate, 25% replay": "gentle_25",
    "both from the start, 1,600 steps": "joint",
}


def test_replay_and_rewarming():
    methods = results("compare-continual")["methods"]
    table = rows("docs/mixtures.md", "| run | old text |")
    assert set(table) == set(CONTINUED)
    losses = {
        method: {text: methods[method]["logged"][f"eval/{text}/no_think_loss"] for text in ("old", "new")}
        for method in CONTINUED.values()
    }
    for label, method in CONTINUED.items():
        old, new, tera = table[label]
        assert agree(
            numbers(old) + numbers(new), [*losses[method]["old"][:3], *losses[method]["new"][:3]], 0.00051
        )
        assert agree(numbers(tera), teraflops(methods[method]), 0.0051), label
    pairs = (
        (r"old text ends (.*?\]) above", "rewarmed_0", "same", "old"),
        (r"with 5% it is (.*?\]) lower", "rewarmed_0", "rewarmed_5", "old"),
        (r"25% are (.*?\]) lower", "rewarmed_5", "rewarmed_25", "old"),
        (r"from none \((.*?\])", "rewarmed_5", "rewarmed_0", "new"),
        (r"from none \(.*?\], (.*?\])", "rewarmed_25", "rewarmed_0", "new"),
        (r"more steps of it \((.*?\])", "rewarmed_25", "same", "old"),
        (r"from the start \((.*?\])", "rewarmed_25", "joint", "old"),
        (r"without replay (-.017 .*?\])", "gentle_0", "rewarmed_0", "old"),
        (r"with 25% (.048 .*?\])", "gentle_25", "rewarmed_25", "old"),
        (r"new text \((.076 .*?\])", "gentle_0", "rewarmed_0", "new"),
        (r"\], (.084 .*?\])", "gentle_25", "rewarmed_25", "new"),
        (r"\(old (.*?\])", "rewarmed_25", "constant_25", "old"),
        (r"\], new (.*?\])", "rewarmed_25", "constant_25", "new"),
    )
    wanted = {
        sentence: _interval(np.subtract(losses[one][corpus][3:], losses[other][corpus][3:]))
        for sentence, one, other, corpus in pairs
    }
    check_sentences("docs/mixtures.md", "with a joint control", wanted)


def test_when_to_read_traces():
    """The table of bases and of RLP from them, and the sentences after it."""
    measured = results("compare-front-loading")
    methods, differences = measured["methods"], measured["differences"]
    table = rows("docs/mixtures.md", "| thinks, before RLP |")
    assert set(table) == {"uniform", "early", "late", "last", "none"}
    for name, cells in table.items():
        base, after = methods[name], methods[f"{name}_rlp"]
        expected = [base["logged"][f"eval/{kind}/no_think_loss"][:3] for kind in ("plain", "traces")]
        expected += [of[number] for number in ("think_sampled", "direct") for of in (base, after)]
        assert all(agree(numbers(c), v, 0.0051) for c, v in zip(cells, expected, strict=False)), name
        assert agree(numbers(cells[-1]), teraflops(after), 0.0051)

    def thinks(arms: str, sign: int = 1) -> list[float]:
        mean, *ends = differences[arms]["think_sampled"]
        return [sign * mean, *sorted(sign * end for end in ends)]

    wanted = {
        r'"thinks" is (.*?) \(`late`\)': thinks("late_rlp - uniform_rlp", -1),
        r"\(`late`\) and (.*?) \(`last`\)": thinks("last_rlp - uniform_rlp", -1),
        r"below `uniform`'s \(by (.*?)\)": thinks("early - uniform", -1),
        r"excludes 0 \((.*?) to `uniform`": thinks("early_rlp - uniform_rlp"),
        r"to `uniform`, (.*?) to `late`": thinks("late_rlp - early_rlp", -1),
    }
    check_sentences("docs/mixtures.md", "### When to read traces", wanted)
    text = " ".join((ROOT / "docs" / "mixtures.md").read_text().split("### When to read traces")[1].split())
    seeds = re.findall(r"seeds are at (.*?), of `uniform` at (.*?), of `late` at (.*?)\. Over", text)[0]
    for written, name in zip(seeds, ("early_rlp", "uniform_rlp", "late_rlp"), strict=True):
        found = [float(number) for number in re.findall(r"\.\d+", written)]
        assert agree(found, methods[name]["by_seed"]["think_sampled"], 0.0051), name


def _interval(values: np.ndarray) -> list[float]:
    """Mean over seeds with its 95% interval."""
    half = student(len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return [float(value) for value in (values.mean(), values.mean() - half, values.mean() + half)]
