"""The main job on a CPU, in minutes: RLP on a base checkpoint that can think but does not bother, beside its
controls.

    python -m examples.demo [--out runs/demo] [--seeds 0 1] [--fresh]

Makes the dial corpus, pretrains a small base model on it with the objective `ntp` (or takes the cached one),
trains from it with `rlp`, and with `ntp` on the same tokens and on the same compute, and prints one table.
Each training is a run folder of its own under --out; the numbers go to results.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DEPTHS = ("1", "2", "3", "4")
NUMBERS = ("direct", "think_sampled", "think_greedy", "gain_frozen", "no_think_loss")
CONTROLS = ("empty", "shuffled", "other")
GATE = 0.9
BASE_SEEDS = [0, 1, 2]


def main(argv: Sequence[str] | None = None) -> int:
    """Everything, or (with --worker) what one seed needs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1], help="seeds of the trainings from the base model"
    )
    parser.add_argument(
        "--base-seeds",
        type=int,
        nargs="+",
        default=BASE_SEEDS,
        help="tried in turn until one passes the gate",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="forget cached results first, the base model too"
    )
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker is not None:
        return worker(args.out, args.worker)
    if args.fresh:
        shutil.rmtree(args.out, ignore_errors=True)
    begin = time.perf_counter()
    seconds: dict[str, float] = {}
    make_corpus(args.out)
    seconds["base"] = make_base(args.out, args.base_seeds)
    print(
        f"training rlp, ntp on the same tokens, and ntp on the same compute, seeds {args.seeds} ...",
        flush=True,
    )
    run_workers(args.out, args.seeds)
    results = collect(args.out, args.seeds)
    results["seconds"] |= seconds | {"total": time.perf_counter() - begin}
    from rlpretrain.training.records import write_json

    write_json(args.out / "results.json", results)
    show(results)
    print(f"numbers: {args.out / 'results.json'}; {results['seconds']['total']:.0f} seconds in all")
    return 0


def make_corpus(out: Path, mix: str = "c8") -> None:
    """The dial corpus under `out`/corpus."""
    from rlpretrain.corpora import dial

    if not (out / "corpus" / "model" / "config.json").exists():
        print("making the dial corpus ...", flush=True)
        dial.write(out / "corpus", base=130_000, mix=mix)


def make_base(out: Path, seeds: Sequence[int]) -> float:
    """Pretrain the base model from scratch with `ntp`, gated on skill; returns the seconds it took (0 if
    cached).
    """
    from rlpretrain.config import ModelConfig
    from rlpretrain.corpora import dial
    from rlpretrain.models import load_model, load_tokenizer

    if (out / "base" / "model" / "model.safetensors").exists():
        print(f"base model: cached in {out / 'base'}")
        return 0.0
    begin = time.perf_counter()
    for seed in seeds:
        print(f"pretraining the base model from scratch, seed {seed} ...", flush=True)
        folder = out / f"base-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        train(
            "dial_base.yaml",
            model=out / "corpus" / "model",
            data=out / "corpus" / "base.jsonl",
            output_dir=folder,
            seed=seed,
            console=True,
        )
        config = ModelConfig(path=str(folder / "model"))
        skill = dial.trace_skill(load_model(config), load_tokenizer(config))
        print(f"skill of the base model (teacher-forced values of true traces): {skill:.3f}", flush=True)
        if skill >= GATE:
            shutil.rmtree(out / "base", ignore_errors=True)
            folder.rename(out / "base")
            return time.perf_counter() - begin
    raise SystemExit(
        f"no base model reached skill {GATE} with the seeds {list(seeds)}: try others with --base-seeds"
    )


def train(
    recipe: str, *, model: Path, data: Path, output_dir: Path, objective: Any = None, **fields: Any
) -> dict[str, Any]:
    """One run of an example configuration with some fields replaced (nested ones as `section__field`)."""
    import yaml

    from rlpretrain import Pretrainer
    from rlpretrain.config.io import build

    values = yaml.safe_load((HERE / recipe).read_text())
    head = values["model"] if isinstance(values["model"], dict) else {}
    values |= {"model": head | {"path": str(model)}, "output_dir": str(output_dir), "console": False}
    values["data"] |= {"path": str(data)}
    if objective is not None:
        values["objective"] = objective
    for name, value in fields.items():
        section, _, field = name.partition("__")
        values[section] = values[section] | {field: value} if field else value
    return Pretrainer(build(values)).train()


def run_workers(out: Path, seeds: Sequence[int]) -> None:
    """One process per seed, as many at a time as there are cores, each with one thread."""
    cores = os.cpu_count() or 1
    waiting, running = list(seeds), []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    while waiting or running:
        while waiting and len(running) < cores:
            command = [
                sys.executable,
                "-m",
                "examples.demo",
                "--out",
                str(out),
                "--worker",
                str(waiting.pop(0)),
            ]
            running.append(
                subprocess.Popen(command, env=environment, cwd=HERE.parent if not out.is_absolute() else None)
            )
        done = [p for p in running if p.poll() is not None]
        for p in done:
            running.remove(p)
            if p.returncode:
                for other in running:
                    other.kill()
                raise SystemExit(f"a training failed (exit code {p.returncode}); its output is above")
        time.sleep(0.2)


def worker(out: Path, seed: int) -> int:
    """RLP and both controls for one seed, and their evaluation."""
    from rlpretrain.training.records import write_json

    seconds: dict[str, float] = {}
    corpus, base = out / "corpus", out / "base" / "model"
    for name in ("rlp", "ntp_tokens", "ntp_compute"):
        folder = out / f"{name}-{seed}"
        if (folder / "seconds.json").exists():
            continue
        shutil.rmtree(folder, ignore_errors=True)
        begin = time.perf_counter()
        if name == "rlp":
            train("dial_rlp.yaml", model=base, data=corpus / "train.jsonl", output_dir=folder, seed=seed)
        else:
            train(
                "dial_rlp.yaml",
                model=base,
                data=corpus / "train.jsonl",
                output_dir=folder,
                seed=seed,
                objective="ntp",
                **ntp_budget(out, name, seed),
            )
        seconds[name] = time.perf_counter() - begin
        write_json(folder / "spent.json", spent_by(folder))
        write_json(folder / "seconds.json", seconds[name])
        print(f"seed {seed}: {name} trained in {seconds[name]:.0f} s", flush=True)
    for name in ("base", "rlp", "ntp_tokens", "ntp_compute"):
        folder = out / "base" if name == "base" else out / f"{name}-{seed}"
        file = folder / f"evaluation-{seed}.json"
        if not file.exists():
            write_json(
                file,
                evaluation(folder / "model", base, corpus / "held_out.jsonl", seed, controls=name == "rlp"),
            )
    return 0


def spent_by(folder: Path) -> dict[str, float]:
    """Steps, document tokens, and floating-point operations of a run, from its log."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {"steps": rows[-1]["step"], "flops": rows[-1]["num_flops"], "tokens": rows[-1]["num_tokens"]}


def ntp_budget(out: Path, name: str, seed: int, documents: int = 64) -> dict[str, Any]:
    """What an NTP control may spend: the very documents RLP saw, or as many as RLP's floating-point
    operations pay for.
    """
    rlp = json.loads((out / f"rlp-{seed}" / "spent.json").read_text())
    if name == "ntp_tokens":
        return {"max_steps": rlp["steps"]}
    once = json.loads((out / f"ntp_tokens-{seed}" / "spent.json").read_text())
    per_document = once["flops"] / (once["steps"] * 16)
    return {
        "max_steps": max(1, round(rlp["flops"] / (per_document * documents))),
        "positions_per_step": documents,
    }


def evaluation(model: Path, frozen: Path, data: Path, seed: int, controls: bool) -> dict[str, Any]:
    """Numbers per held-out problem: at the answer, one sampled thought and the greedy one."""
    from rlpretrain.config.io import build
    from rlpretrain.data.stream import read_all
    from rlpretrain.evaluation.evaluate import evaluate
    from rlpretrain.models import load_model, load_tokenizer
    from rlpretrain.objectives import load_objective

    config = build(
        {
            "model": str(model),
            "data": {"path": str(data), "meta_columns": ["depth"]},
            "objective": {"name": "rlp", "positions": "after", "marker": "shows"},
            "sampling": {"max_thought_tokens": 32},
        }
    )
    tokenizer = load_tokenizer(config.model)
    reference = load_model(build({"model": str(frozen), "data": "-"}).model)
    found = evaluate(
        load_model(config.model),
        load_objective(config, tokenizer),
        read_all(config.data, tokenizer),
        frozen=reference,
        thoughts=2,
        seed=seed,
        controls=controls,
        pad_id=tokenizer.pad_token_id,
    )
    values = {k: v.tolist() for k, v in found.values.items()} | {
        "no_think_loss": found.losses.tolist(),
        "tokens": found.tokens.tolist(),
    }
    return {"depth": [str(d.meta["depth"]) for d in found.documents], "rows": found.rows, **values}


def collect(out: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """results.json: every number with its 95% interval over problems and seeds, and each seed's own."""
    results: dict[str, Any] = {"seeds": list(seeds), "by_k": {}, "seconds": {}}
    for name in ("base", "rlp", "ntp_tokens", "ntp_compute"):
        folders = [out / "base" if name == "base" else out / f"{name}-{s}" for s in seeds]
        parts = [
            json.loads((f / f"evaluation-{s}.json").read_text()) for f, s in zip(folders, seeds, strict=True)
        ]
        results[name] = numbers(parts, DEPTHS, NUMBERS)
        results["by_k"][name] = {k: numbers(parts, (k,), NUMBERS) for k in sorted(set(parts[0]["depth"]))}
        if name == "rlp":
            results["controls"] = numbers(parts, DEPTHS, CONTROLS)
        if name != "base":
            results["seconds"][name] = [json.loads((f / "seconds.json").read_text()) for f in folders]
    return results


def numbers(parts: Sequence[dict[str, Any]], depths: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """Means over the problems of these depths and over seeds, each with its interval and, as `_seeds`,
    each seed's own.
    """
    import numpy as np

    from rlpretrain.evaluation.intervals import interval, points

    keep = np.isin(parts[0]["depth"], depths)
    rows = np.array(parts[0].get("rows", range(len(keep))), str)[
        keep
    ]  # one document a row where an older evaluation is silent
    out: dict[str, Any] = {}
    for name in names:
        values = np.array([p[name] for p in parts])[:, keep]
        weights = np.array([p["tokens"] for p in parts])[:, keep] if name == "no_think_loss" else None
        out[name], out[f"{name}_ci"] = interval(values, weights, rows=rows)
        out[f"{name}_seeds"] = points(values, weights).tolist()
    return out


def show(results: dict[str, Any]) -> None:
    """One table for a person."""
    from rich.console import Console
    from rich.table import Table

    def cell(row: dict[str, Any], name: str) -> str:
        low, high = row[f"{name}_ci"]
        return f"{row[name]:.2f} [{low:.2f}, {high:.2f}]"

    table = Table(
        "",
        "answers directly",
        "thinks, sampled",
        "thinks, greedy",
        "gain (nats)",
        "no-think loss",
        title=f"Depths 1 to 4, held-out problems, seeds {results['seeds']}; 95% intervals",
    )
    said = {
        "base": "base",
        "rlp": "RLP",
        "ntp_tokens": "NTP, same tokens",
        "ntp_compute": "NTP, same compute",
    }
    for name, label in said.items():
        table.add_row(label, *(cell(results[name], n) for n in NUMBERS))
    console = Console(width=120)
    console.print(table)
    deep = Table("thinks, sampled, by depth", *(f"k={k}" for k in results["by_k"]["rlp"]))
    for name, label in said.items():
        deep.add_row(label, *(f"{row['think_sampled']:.2f}" for row in results["by_k"][name].values()))
    console.print(deep)
    c = results["controls"]
    console.print(
        "gain of thoughts that should not help (nats): " + ", ".join(f"{n} {cell(c, n)}" for n in CONTROLS)
    )


if __name__ == "__main__":
    sys.exit(main())
