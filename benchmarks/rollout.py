"""Speed of the rollout service over HTTP, of sampling ahead of the trainer, of a weight sync and its probe.

    python -m benchmarks.rollout [service async updates sync probe] [--json]

- service: tokens/s of `rlpretrain serve` with 32 clients, over vLLM's offline engine, and over vLLM's own
  server, same requests.
- async: step time with max_staleness 1 over the longer of rollout and training, with thoughts from another
  machine and from this one.
- updates: step time with `engine.updates: in_flight` over that with `drained`, one vLLM server.
- sync: in-process weight sync over a copy of the state dict, and vLLM's packing of its linear layers alone.
- probe: the probe's share of a step, hidden 512, a hundred positions.

Every part alternates between the things it compares and reports the median of their ratios. It needs vLLM
and Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.rollout_ahead import asynchronous
from benchmarks.rollout_service import service
from benchmarks.rollout_sync import probe, sync
from benchmarks.rollout_updates import updates

PARTS = {"service": service, "async": asynchronous, "updates": updates, "sync": sync, "probe": probe}


def main() -> None:
    """Run the requested parts, each in a process of its own, and print their results."""
    parser = argparse.ArgumentParser(description="Speed of the rollout service.")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    # runs the one part in this process and writes its result to this file
    parser.add_argument("--here", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there are {', '.join(PARTS)}, not {', '.join(unknown)}")
    if options.here:
        Path(options.here).write_text(json.dumps(PARTS[options.parts[0]]()))
        return
    results = {}
    for part in options.parts or PARTS:
        with tempfile.NamedTemporaryFile(suffix=".json") as result:
            command = [sys.executable, "-m", "benchmarks.rollout", part, "--here", result.name]
            subprocess.run(command, check=True, stdout=sys.stderr, env=os.environ | {"OMP_NUM_THREADS": "1"})
            results[part] = json.loads(Path(result.name).read_text())
        if not options.json:
            print(part, json.dumps(results[part], indent=1), flush=True)
    if options.json:
        print(json.dumps({"benchmark": "rollout", "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
