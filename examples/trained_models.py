"""The trained models under a folder, for scripts that sample from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from rlpretrain.training.records import write_json


def measure_models(folder: Path, measure: Callable[[Path], dict[str, float]]) -> None:
    """Print the numbers of each trained model under a folder, and write them to samples.json there."""
    results = {}
    for file in sorted(folder.rglob("model/config.json")):
        name = str(file.parent.parent.relative_to(folder))
        results[name] = measure(file.parent)
        print(name, json.dumps(results[name]), flush=True)
    write_json(folder / "samples.json", results)
