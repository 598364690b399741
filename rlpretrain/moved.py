"""Old names of modules that moved into folders: `rlpretrain.loop` is now `rlpretrain.training.loop`.

A script that imports an old name gets the module, with a DeprecationWarning that gives the new name.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "abandoned": "training.abandoned",
    "adapters": "models.adapters",
    "advantages": "training.advantages",
    "as_json": "files",
    "attention": "scoring.attention",
    "baseline": "scoring.references",
    "batches": "rollouts.batches",
    "builder": "training.builder",
    "checkpoint": "training.checkpoint",
    "compare": "experiments.compare",
    "config_io": "config.io",
    "console": "tracking.console",
    "doctor": "tools.doctor",
    "documents": "data.stream",
    "dry_run": "tools.dry_run",
    "engines": "rollouts.engines",
    "evaluate": "evaluation.evaluate",
    "experiment": "experiments.loading",
    "health": "tracking.health",
    "heat": "reporting.token_gains",
    "interruption": "training.interruption",
    "intervals": "evaluation.intervals",
    "kernels": "models.kernels",
    "lengths": "models.lengths",
    "loop": "training.loop",
    "losses": "training.losses",
    "memory": "tools.memory",
    "metrics": "tracking.metrics",
    "outputs": "training.outputs",
    "packing": "scoring.packing",
    "page": "reporting.html",
    "policy": "training.backends",
    "positions": "data.positions",
    "pretrainer": "training.pretrainer",
    "randomness": "models.randomness",
    "readiness": "tools.readiness",
    "records": "training.records",
    "report": "reporting.report",
    "rows": "data.rows",
    "run": "training.run",
    "run_evaluation": "training.run_evaluation",
    "run_output": "training.run_output",
    "run_state": "training.run_state",
    "run_stop": "training.run_stop",
    "serve": "tools.serve",
    "sources": "data.opening",
    "spending": "models.spending",
    "tag_gain": "training.tag_gain",
    "token_text": "data.token_text",
    "trl_async": "trl.async_rollout",
    "trl_data": "trl.data",
    "trl_live": "trl.callback",
    "trl_prompts": "trl.prompts",
    "trl_rollout": "trl.rollout",
    "trl_trainer": "trl.trainer",
    "trunks": "scoring.trunks",
    "writing": "files",
}
"""Old name to new name, both relative to `rlpretrain`."""


class OldNames(MetaPathFinder, Loader):
    """Finds the modules in `MOVED`. It is the last finder, so it never hides a file that exists."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for an old name, None for any other name."""
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == "rlpretrain" and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        """Return None for Python's default: `exec_module` replaces that module."""

    def exec_module(self, module: ModuleType) -> None:
        """Import the module under its new name and register it under the old one."""
        old = module.__name__
        new = f"rlpretrain.{MOVED[old.partition('.')[2]]}"
        warnings.warn(f"{old} is {new} now", DeprecationWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(new)


def install() -> None:
    """Register the finder of old names, once per process."""
    if not any(isinstance(finder, OldNames) for finder in sys.meta_path):
        sys.meta_path.append(OldNames())
