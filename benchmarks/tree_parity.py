"""Tree packing against padded rows: the largest differences, over architectures, in float32 on a CPU.

    python -m benchmarks.tree_parity --json

Random batches (1 to 3 documents, 1 to 8 positions, 1 to 16 thoughts, ragged and empty ones, targets of 1 to
32): the largest difference of a log-probability in nats, and of a gradient over the largest entry of its
parameter. `spread`: micro-batches so small that every group is split. `templates`: prompts that share only a
part of their beginning, and have no document.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from typing import Any

from tests.builders.batches import random_batch
from tests.builders.trees import MODELS, laid, model_of, numbers, templated


def worst(model: Any, batch: Any, budget: int = 10**6) -> tuple[float, float]:
    """(nats, relative gradient) between tree and padded rows."""
    theirs, their_grads = numbers(model, laid(batch, tree=False))
    ours, our_grads = numbers(model, laid(batch, tree=True, budget=budget))
    nats = max(float((ours[n] - theirs[n]).abs().max()) for n in theirs if theirs[n].numel())
    largest = max(float(g.abs().max()) for g in their_grads.values())
    apart = (
        float((our_grads[n] - g).abs().max()) / max(float(g.abs().max()), 1e-3 * largest)
        for n, g in their_grads.items()
    )
    return nats, max(apart)


def measure(batches: int) -> dict[str, Any]:
    """Every architecture in every form."""
    out: dict[str, Any] = {}
    for name in MODELS:
        model, rng = model_of(name), random.Random(7)
        forms: dict[str, list[tuple[float, float]]] = {"whole": [], "spread": [], "templates": []}
        for _ in range(batches):
            batch = random_batch(
                rng, rng.randint(1, 3), rng.randint(1, 8), rng.randint(1, 16), rng.randint(1, 32)
            )
            forms["whole"].append(worst(model, batch))
            forms["spread"].append(worst(model, batch, budget=100))
            forms["templates"].append(worst(model, templated(rng, rng.randint(1, 5), rng.randint(1, 8))))
        out[name] = {
            form: dict(zip(("nats", "gradient"), map(max, zip(*found, strict=True)), strict=True))
            for form, found in forms.items()
        }
    return {"benchmark": "tree_parity", "batches": batches, "models": out}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Tree packing against padded rows, over architectures.")
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args(argv)
    found = measure(options.batches)
    if options.json:
        print(json.dumps(found))
        return
    for name, forms in found["models"].items():
        print(
            name,
            *(f"{form}: {x['nats']:.1e} nats, gradient {x['gradient']:.1e};" for form, x in forms.items()),
        )


if __name__ == "__main__":
    main()
