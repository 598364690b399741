"""`rlpretrain compare`: objectives and seeds from one base with matched budgets, in one table with intervals,
and a plot.

Each training is a run folder of its own, in a process of its own; what is done is kept, so a comparison that
was stopped goes on where it was. Every model is evaluated twice on the same held-out documents: by one common
objective, so that methods can be compared, and by its own, against the base, so that one sees whether it
learnt what it was rewarded for. All methods answer the same held-out rows with the same seeds, so two of them
are compared by the differences there, whose intervals are narrower.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlpretrain import models
from rlpretrain.config import ConfigError, PretrainConfig
from rlpretrain.config.engines import own_settings
from rlpretrain.config.io import build, to_dict
from rlpretrain.data.stream import read_all
from rlpretrain.evaluation.evaluate import evaluate
from rlpretrain.evaluation.intervals import interval, points
from rlpretrain.experiments.experiment import BASE, Experiment, Job, Judged, load_experiment
from rlpretrain.files import check_writable, finite, writing
from rlpretrain.models import adapters
from rlpretrain.objectives import delimiters, load_objective
from rlpretrain.prompts import ensure_delimiters
from rlpretrain.ranks import join
from rlpretrain.training.checkpoint import MACHINE, changes, without
from rlpretrain.training.pretrainer import Pretrainer
from rlpretrain.training.records import write_json

COLUMNS = {
    "think_sampled": "thinks, sampled",
    "direct": "answers directly",
    "gain_frozen": "gain (nats)",
    "empty": "gain, empty",
    "shuffled": "gain, shuffled",
    "no_think_loss": "no-think loss",
}


def compare(
    path: str | Path, *, jobs: int | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Train and evaluate what is not done yet, then write and return the results; `jobs` in place of the
    file's.
    """
    path = Path(path).expanduser()
    experiment = load_experiment(path)
    experiment = replace(experiment, jobs=jobs) if jobs else experiment
    where, out = path.parent, Path(experiment.output_dir)
    check_writable(out, "output_dir")
    todo = [
        Job(experiment=experiment, name=name, seed=seed, where=where)
        for seed in experiment.seeds
        for name in (*experiment.methods, BASE)
    ]
    if not all((job.folder / "evaluation.json").exists() for job in todo):
        check(experiment, where)
    later = [
        job for job in todo if job.method and job.method.match
    ]  # budgets are known once the runs that set them are done
    for part in ([job for job in todo if job not in later], later):
        for text in _each(experiment, part):
            say(text)
    results = collect(experiment)
    write_json(out / "results.json", results)
    _write_csv(out / "results.csv", results)
    try:
        plot(results, out / "results.svg")
    except ImportError:
        say('no plot: pip install "rlpretrain[plot]"')
        return results | {"plotted": False}
    return results | {"plotted": True}


def check(experiment: Experiment, where: Path) -> None:
    """Make every objective with its tokenizer and read the held-out documents: what fails there fails before
    any training.

    Raises ConfigError that names the method, or `evaluation`.
    """
    e = experiment.evaluation
    parts = {
        f"method {name}": Job(
            experiment=experiment, name=name, seed=experiment.seeds[0], where=where
        ).config()
        for name in experiment.methods
    }
    common = _common(next(iter(parts.values())), e)
    for part, config in (parts | {"evaluation": common}).items():
        tokenizer = models.load_tokenizer(config.model)
        ensure_delimiters(tokenizer, None, delimiters(config.objective))
        try:
            adapters.check(config)
            load_objective(config, tokenizer)
        except ConfigError as error:
            raise ConfigError(f"{part}: {error}") from None
    read_all(e.data, models.load_tokenizer(common.model), limit=e.documents)


def _each(experiment: Experiment, jobs: Sequence[Job]) -> Iterator[str]:
    """Do all jobs, and yield a line for each; the first failure is raised, once what is under way has
    ended.
    """
    done = [job for job in jobs if to_train(job) is None and to_evaluate(job) is None]
    jobs = [job for job in jobs if job not in done]
    yield from map(do, done)
    if experiment.ray:
        try:
            import ray
        except ImportError as error:
            raise ImportError('compare on ray: pip install "rlpretrain[ray]"') from error
        ray.init(experiment.ray, include_dashboard=False, ignore_reinit_error=True, log_to_driver=False)
        work = ray.remote(max_retries=2, **experiment.resources)(do)
        waiting = [work.remote(job) for job in jobs]
        while waiting:
            (ended,), waiting = ray.wait(waiting)
            yield ray.get(ended)
        return
    context = multiprocessing.get_context("forkserver")  # imports torch and transformers once, for all jobs
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(experiment.jobs, mp_context=context, max_tasks_per_child=1) as pool:
        try:
            for future in as_completed([pool.submit(do, job) for job in jobs]):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def do(job: Job) -> str:
    """Train and evaluate, as far as it is not done; what happened, in a line."""
    said = []
    try:
        if config := to_train(job):
            job.folder.mkdir(parents=True, exist_ok=True)
            write_json(job.folder / "wanted.json", to_dict(config))
            ended = Pretrainer(config).train(resume="auto")
            said.append(
                f"trained {ended['steps']} steps" + (f" ({ended['stopped']})" if ended["stopped"] else "")
            )
        if settings := to_evaluate(job):
            measure(job, settings)
            said.append("evaluated")
    except ConfigError as error:
        raise ConfigError(f"{job.name}, seed {job.seed}: {error}") from None
    return f"{job.name}, seed {job.seed}: {', '.join(said) or 'done before'}"


def to_train(job: Job) -> PretrainConfig | None:
    """What is to be trained; None if it was. ConfigError if it was begun with other settings."""
    method, wanted, record = job.method, job.folder / "wanted.json", job.folder / "run.json"
    if method is None:
        return None
    config = job.config()
    if method.like:
        spent = last_row(replace(job, name=method.like).folder)
        limit = (
            {"input_tokens": int(spent["num_input_tokens"])}
            if method.match == "tokens"
            else {"flops": spent["num_flops"]}
        )
        config = replace(config, stop=replace(config.stop, **limit))
    sides = [_read_settings(wanted), json.loads(json.dumps(to_dict(config)))] if wanted.exists() else [{}, {}]
    if different := changes(*(without(side, MACHINE) for side in sides)):
        raise ConfigError(
            f"it was run otherwise: {'; '.join(different)}. Remove {job.folder} or choose another output_dir"
        )
    return None if record.exists() and json.loads(record.read_text())["status"] == "done" else config


def _read_settings(file: Path) -> dict[str, Any]:
    """The settings that a run was begun with; older versions wrote those of all engines."""
    settings = json.loads(file.read_text())
    return settings | {"engine": own_settings(settings["engine"])}


def to_evaluate(job: Job) -> dict[str, Any] | None:
    """The settings of an evaluation that is to be made; None if it was."""
    file, names = job.folder / "evaluation.json", [job.name] if job.method else list(job.experiment.methods)
    wanted = {
        "evaluation": to_dict(job.experiment.evaluation),
        "objectives": {n: job.config(n).objective for n in names},
    }
    settings = json.loads(json.dumps(wanted))
    found = json.loads(file.read_text()) if file.exists() else {}
    return (
        None if found.get("settings") == settings and "rows" in found.get("common", {}) else settings
    )  # older ones lack rows


def last_row(folder: Path) -> dict[str, float]:
    """The last line of a run's log."""
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def measure(job: Job, settings: dict[str, Any]) -> None:
    """Evaluate by the common objective, and by the method's own (the base: by those of all methods)."""
    e = job.experiment.evaluation
    configs = {n: replace(job.config(n), data=e.data, ntp_data=e.data) for n in settings["objectives"]}
    own = next(iter(configs.values()))
    if own.threads:
        torch.set_num_threads(own.threads)
    path = str(job.folder / "model") if job.method else own.model.path
    found = {
        "settings": settings,
        "common": _evaluated(job, _common(own, e), path, controls=True),
        "own": {n: _evaluated(job, c, path) for n, c in configs.items()},
    }
    job.folder.mkdir(parents=True, exist_ok=True)
    write_json(job.folder / "evaluation.json", found)


def _common(own: PretrainConfig, judged: Judged) -> PretrainConfig:
    """The configuration by which all models are compared, on the model and device of `own`."""
    return build(
        {
            "model": to_dict(own.model),
            "data": to_dict(judged.data),
            "objective": judged.objective,
            "device": own.device,
            "sampling": {"max_thought_tokens": judged.max_thought_tokens},
        }
    )


def _evaluated(job: Job, config: PretrainConfig, path: str, controls: bool = False) -> dict[str, list[Any]]:
    """Numbers per position of the model at `path`, against the base, and each position's source row."""
    e, device = job.experiment.evaluation, join(config.device).device
    tags = delimiters(config.objective)
    start = replace(config.model, path=path)
    if job.method:
        start = replace(start, quantization="none")  # what was saved is merged
    model, tokenizer, _ = models.load_with_tokenizer(start, tags, job.seed)
    base = models.load_with_tokenizer(config.model, tags, job.seed)[0]
    found = evaluate(
        model.to(device),
        load_objective(config, tokenizer),
        read_all(e.data, tokenizer, limit=e.documents),
        frozen=base.to(device),
        thoughts=e.thoughts,
        seed=job.seed,
        controls=controls,
        greedy=False,
        pad_id=tokenizer.pad_token_id or 0,
    )
    values = found.values | {"no_think_loss": found.losses, "tokens": found.tokens}
    return {name: v.tolist() for name, v in values.items()} | {"rows": found.rows}


def collect(experiment: Experiment) -> dict[str, Any]:
    """Every number of every method with its 95% interval and each seed's own, differences between methods,
    and what it cost.
    """
    out: dict[str, Any] = {}
    folder = Path(experiment.output_dir)
    read = {
        name: [json.loads((folder / f"{name}-{s}" / "evaluation.json").read_text()) for s in experiment.seeds]
        for name in (BASE, *experiment.methods)
    }
    for name, parts in read.items():
        common = [p["common"] for p in parts]
        row: dict[str, Any] = {n: _interval(common, n) for n in COLUMNS if n in common[0]}
        row["by_seed"] = {n: _by_seed(common, n) for n in COLUMNS if n in common[0]}
        if name != BASE:
            own, before = ([p["own"][name] for p in read[n]] for n in (name, BASE))
            given = experiment.methods[name].own
            number = given or next(
                (n for n in ("asked", "reward", "gain_frozen") if n in own[0]), "no_think_loss"
            )
            if number not in own[0]:
                raise ConfigError(
                    f"method {name}: own '{number}' is none of its numbers: {', '.join(own[0])}"
                )
            row["own"] = {
                "number": number,
                "before": _interval(before, number),
                "after": _interval(own, number),
                "change": _interval(own, number, before),
                "by_seed": _by_seed(own, number),
            }
            spent = [last_row(folder / f"{name}-{s}") for s in experiment.seeds]
            runs = [json.loads((folder / f"{name}-{s}" / "run.json").read_text()) for s in experiment.seeds]
            row["spent"] = {
                n: float(np.mean([r[f"num_{n}"] for r in spent])) for n in ("input_tokens", "tokens", "flops")
            }
            row["steps"], row["stopped"] = [r["step"] for r in spent], [r["stopped"] for r in runs]
        out[name] = row
    documents = len(read[BASE][0]["common"]["tokens"])
    sources = len(set(read[BASE][0]["common"]["rows"]))
    results = {
        "folder": str(folder),
        "seeds": list(experiment.seeds),
        "documents": documents,
        "source_rows": sources,
        "methods": out,
        "differences": _differences(read),
    }
    return finite(results)


def _differences(read: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, list[float]]]:
    """{"a - b": {number: [mean, low, high]}} of every two methods, the base among them, on the same rows
    and seeds.
    """
    names, out = list(read), {}
    for k, second in enumerate(names):
        for first in names[k + 1 :]:
            parts, others = ([p["common"] for p in read[n]] for n in (first, second))
            both = [n for n in COLUMNS if n in parts[0] and n in others[0]]
            out[f"{first} - {second}"] = {n: _interval(parts, n, others) for n in both}
    return out


def _interval(
    parts: Sequence[dict[str, list[Any]]], name: str, less: Sequence[dict[str, list[Any]]] | None = None
) -> list[float]:
    """[mean, low, high] over source rows and seeds, of a number or of its differences from `less` at the same
    positions.

    NaN (not applicable) counts nowhere.
    """
    values = np.array([p[name] for p in parts], float)
    if less is not None:
        values = values - np.array([p[name] for p in less], float)
    mean, (low, high) = interval(values, _weights(parts, name), rows=parts[0]["rows"])
    return [mean, low, high]


def _by_seed(parts: Sequence[dict[str, list[Any]]], name: str) -> list[float]:
    """The mean of each seed."""
    return points(np.array([p[name] for p in parts], float), _weights(parts, name)).tolist()


def _weights(parts: Sequence[dict[str, list[Any]]], name: str) -> np.ndarray | None:
    """A loss per token is weighed by its tokens, everything else counts alike."""
    return np.array([p["tokens"] for p in parts], float) if name == "no_think_loss" else None


def _write_csv(path: Path, results: dict[str, Any]) -> None:
    """A line for each method (or difference of two) and number: method, number, mean, low, high, and each
    seed's mean.
    """
    work = path.with_name(f".{path.name}.tmp")
    with writing(path), work.open("w", newline="") as f:
        out = csv.writer(f)
        out.writerow(("method", "number", "mean", "low", "high", *(f"seed {s}" for s in results["seeds"])))
        for name, row in results["methods"].items():
            numbers = {n: [*row[n], *row["by_seed"][n]] for n in COLUMNS if n in row}
            if "own" in row:
                numbers |= {
                    f"own {row['own']['number']}, {when}": row["own"][when] for when in ("before", "after")
                }
                numbers |= {n: [v, "", ""] for n, v in row["spent"].items()}
            out.writerows((name, number, *values) for number, values in numbers.items())
        for pair, found in results["differences"].items():
            out.writerows((pair, number, *values) for number, values in found.items())
    work.replace(path)


def table(results: dict[str, Any]) -> Any:
    """The results as a rich table."""
    from rich.table import Table

    shown = Table(
        "",
        "its own number",
        "base",
        "after",
        *COLUMNS.values(),
        "tokens",
        "TFLOP",
        title=f"{results['documents']} held-out documents of {results['source_rows']} rows, "
        f"seeds {results['seeds']}; 95% intervals over rows and seeds",
    )
    for name, row in results["methods"].items():
        own, spent = row.get("own"), row.get("spent")
        mine = (own["number"], cell(own["before"]), cell(own["after"])) if own else ("", "", "")
        cost = (f"{spent['input_tokens'] / 1e6:.3f} M", f"{spent['flops'] / 1e12:.2f}") if spent else ("", "")
        shown.add_row(name, *mine, *(cell(row.get(n)) for n in COLUMNS), *cost)
    return shown


def differences(results: dict[str, Any]) -> Any:
    """A rich table of paired differences: of each method from the base and from the first method."""
    from rich.table import Table

    first = next(name for name in results["methods"] if name != BASE)
    shown = Table(
        "paired differences", *COLUMNS.values(), title="at the same rows, with the same seeds; 95% intervals"
    )
    for pair, row in results["differences"].items():
        if pair.endswith((f" - {BASE}", f" - {first}")):
            shown.add_row(pair, *(cell(row.get(n)) for n in COLUMNS))
    return shown


def cell(values: Sequence[float | None] | None) -> str:
    """Mean and interval; empty where there is none."""
    if values is None or values[0] is None:
        return ""
    mean, *ends = values
    return f"{mean:.2f}" if None in ends else f"{mean:.2f} [{ends[0]:.2f}, {ends[1]:.2f}]"


def plot(results: dict[str, Any], path: Path) -> None:
    """Accuracy with and without a thought, and the gain, of every method, and its difference from the first,
    with intervals.

    Seeds are the pale points.
    """
    import matplotlib
    from matplotlib.figure import Figure

    names = list(results["methods"])[::-1]
    figure = Figure(figsize=(14, 0.34 * len(names) + 1.4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    panels = [
        [("think_sampled", "o", 0.12), ("direct", "s", -0.12)],
        [("gain_frozen", "o", 0.12), ("shuffled", "s", -0.12)],
    ]
    for axis, panel in zip(axes, panels, strict=False):
        for number, mark, shift in panel:
            rows = {
                i + shift: results["methods"][n]
                for i, n in enumerate(names)
                if number in results["methods"][n]
            }
            line = _bars(axis, {at: row[number] for at, row in rows.items()}, mark, COLUMNS[number])
            for at, row in rows.items():
                seeds = row["by_seed"][number]
                axis.plot(seeds, [at] * len(seeds), "|", color=line, alpha=0.5, markersize=5)
        axis.grid(axis="x", alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    axes[0].set(
        yticks=range(len(names)), yticklabels=names, xlabel="share of held-out positions", xlim=(0, 1)
    )
    axes[1].set(xlabel="nats against the frozen base")
    first = next(name for name in results["methods"] if name != BASE)
    for number, mark, shift in panels[0]:
        pairs = {
            i + shift: results["differences"].get(f"{n} - {first}", {}).get(number)
            for i, n in enumerate(names)
        }
        _bars(axes[2], {at: row for at, row in pairs.items() if row}, mark, COLUMNS[number])
    axes[2].axvline(0, color="black", linewidth=0.6)
    axes[2].grid(axis="x", alpha=0.3)
    axes[2].set(xlabel=f"the same less that of {first}, paired")
    with matplotlib.rc_context({"svg.hashsalt": "rlpretrain"}):  # the same numbers give the same file
        figure.savefig(path, format="svg", metadata={"Date": None})


def _bars(axis: Any, rows: dict[float, list[float | None]], mark: str, label: str) -> Any:
    """Means with their intervals, where there is one, at the heights `rows`; returns their colour."""
    mean, low, high = (np.array([r[k] for r in rows.values()], float) for k in range(3))
    ends = np.nan_to_num([mean - low, high - mean])
    return axis.errorbar(mean, list(rows), xerr=ends, fmt=mark, capsize=2, label=label)[0].get_color()
