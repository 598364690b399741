"""The tables of `benchmarks.gpu` in Markdown."""

from __future__ import annotations

from typing import Any

REFERENCE = """\
For comparison: prime-rl reports 11.9k tokens/s and 11.1% MFU for full RL training of Qwen3-0.6B on one H100
at 16k tokens, and 23.7% for supervised training. The goal for trees at documents of 2,048 tokens is 45%."""
COLUMNS: dict[str, dict[str, tuple[str, str]]] = {
    "parity": {
        "nats": ("log-probs (nats)", ".1e"),
        "gradient": ("gradients (relative)", ".1e"),
        "eager_nats": ("eager, same precision: log-probs", ".1e"),
        "eager_gradient": ("gradients", ".1e"),
    },
    "compilation": {
        "tokens": ("tokens of the tree", ",.0f"),
        "compilations": ("compilations so far", ".0f"),
        "first_training_s": ("first forward and backward (s)", ".3f"),
        "first_scoring_s": ("first forward (s)", ".3f"),
        "training_s": ("forward and backward (s)", ".4f"),
        "scoring_s": ("forward (s)", ".4f"),
        "mask_s": ("mask (s)", ".3f"),
        "memory_gib": ("peak GiB", ".2f"),
    },
    "steps": {
        "seconds": ("s/step", ".3f"),
        "tokens": ("tokens", ",.0f"),
        "useful_tokens_per_s": ("the tree's tokens/s", ",.0f"),
        "mfu": ("MFU", ".1%"),
        "memory_gib": ("peak GiB", ".1f"),
        "micro_batches": ("micro-batches", ".0f"),
        "positions_measured": ("positions measured", ".0f"),
        "recomputed": ("recomputed", ""),
    },
    "sampling": {"tokens_per_s": ("tokens/s", ",.0f"), "memory_gib": ("peak GiB", ".1f")},
    "run": {
        "step_time": ("s/step", ".3f"),
        "perf/rollout_s": ("sampling (s)", ".3f"),
        "perf/train_s": ("training (s)", ".3f"),
        "mfu_with_sampling": ("MFU, sampling included", ".1%"),
        "memory_gib": ("peak GiB", ".1f"),
        "tree_check_nats": ("tree against padded (nats)", ".1e"),
    },
    "paths": {
        "seconds": ("s", ".1f"),
        "loss": ("loss of the last step", ".4f"),
        "apart": ("largest difference of a weight", ".1e"),
        "memory_gib": ("peak GiB", ".2f"),
    },
    "methods": {
        "seconds": ("s", ".1f"),
        "loss": ("loss of the last step", ".4f"),
        "apart": ("largest difference of a loss from a CPU's", ".1e"),
        "thought": ("steps that trained thoughts", ".0f"),
    },
    "services": {"seconds": ("s", ".1f"), "loss": ("loss of the last step", ".4f")},
}
TITLES = {
    "methods": "Three steps of each method on a small model",
    "services": "Four steps through servers, Ray and TRL",
    "paths": "Short runs of a small model, one for each path",
    "parity": "Trees on FlexAttention against padded rows on eager attention in float32",
    "compilation": "FlexAttention on trees of many sizes, at the model's heads, bfloat16",
    "steps": "Training steps",
    "sampling": "Sampling with the HF engine",
    "run": "A run through the library's entry",
}


def table(results: dict[str, Any]) -> str:
    """All parts that have results."""
    lines = ["# GPU benchmark", "", _command(results), ""]
    for name, part in results["parts"].items():
        if name in TITLES:
            lines += [f"## {TITLES[name]}", ""]
        if part["status"] != "ok":
            lines += [f"**{part['status']}**: {_line(part.get('error') or 'see the rows')}", ""]
        if name == "environment":
            lines += _facts(part)
        elif part["cells"]:
            lines += _rows(part["cells"], COLUMNS[name])
        if name == "steps":
            lines += [REFERENCE, ""]
    return "\n".join(lines)


def _command(results: dict[str, Any]) -> str:
    tiny = " --tiny: a test of the code, not a measurement" if results["tiny"] else ""
    return f"`python -m benchmarks.gpu --device {results['device']}`{tiny}"


def _facts(part: dict[str, Any]) -> list[str]:
    values = {
        key: value for cell in part["cells"] for key, value in cell["values"].items() if value is not None
    }
    return [
        ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in values.items()
        ),
        "",
    ]


def _rows(cells: list[dict[str, Any]], columns: dict[str, tuple[str, str]]) -> list[str]:
    lines = [
        "| | " + " | ".join(title for title, _ in columns.values()) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for cell in cells:
        shown = [_shown(cell["values"].get(key), form) for key, (_, form) in columns.items()]
        if cell["status"] != "ok":
            shown[0] = f"{cell['status']}: {_line(cell['error'] or '')}" if cell["error"] else cell["status"]
        lines.append(f"| {cell['name']} | " + " | ".join(shown) + " |")
    return [*lines, ""]


def _shown(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def _line(text: str) -> str:
    return " ".join(text.split())[-300:].replace("|", "/")
