"""Several short trainings in one process group, one after the other; `launch` runs this in each rank."""

from __future__ import annotations

import faulthandler
import json
import sys
from pathlib import Path
from typing import Any

import torch

from rlpretrain import Pretrainer
from rlpretrain.config.io import build
from rlpretrain.scoring.packing import cost, families
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run
from rlpretrain.types import Batch, MicroBatch, Totals
from tests.builders.faults import poison


def gradient_of(config: dict[str, Any], path: str) -> None:
    """Train one step and save this rank's gradient and groups to `path`-RANK.pt."""
    run = Run(build(config), None)
    said: dict[str, Any] = {}
    step, pack = run.policy.step, run.pack

    def packed(batch: Batch, totals: Totals) -> list[MicroBatch]:
        micros = pack(batch, totals)
        said["drawn"], said["kept"] = (
            [g.id for g in batch.groups],
            sorted({g.id for m in micros for g in m.groups}),
        )
        said["drawn_cost"] = sum(cost(unit, run.layout) for unit in families(batch))
        there = {g.id: g for m in run.ranks.gather(batch.groups) for g in m}
        documents = {d.id: d for m in micros for d in m.documents}
        kept = Batch([there[i] for i in said["kept"]], list(documents.values()))
        said["kept_cost"] = sum(cost(unit, run.layout) for unit in families(kept))
        return micros

    def spy() -> Any:
        said["gradient"] = {
            n: p.grad.clone() for n, p in run.policy.model.named_parameters() if p.grad is not None
        }
        return step()

    run.pack, run.policy.step = packed, spy
    train(run)
    torch.save(said, f"{path}-{run.ranks.rank}.pt")
    run.close()


faulthandler.dump_traceback_later(250, exit=True)  # a hang shows where, and ends
for values in json.loads(Path(sys.argv[1]).read_text()):
    if "gradient" in values:
        gradient_of(values["config"], values["gradient"])
        continue
    if "poison" not in values:
        Pretrainer(build(values["config"])).train(resume=values.get("resume"))
        continue
    run = Run(build(values["config"]), None)
    if run.ranks.rank == 1:
        poison(run, values["poison"], at={2})
    train(run)
    run.end()
    run.close()
