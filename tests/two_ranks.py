"""Run by tests/helpers.py's `launch` under torchrun: several short trainings in one process group, one after the other."""

from __future__ import annotations

import faulthandler
import json
import sys
from pathlib import Path

from rlpretrain import Pretrainer
from rlpretrain.config_io import build
from rlpretrain.loop import train
from rlpretrain.run import Run
from tests.test_nonfinite import poison

faulthandler.dump_traceback_later(250, exit=True)  # a hang shows where, and ends
for values in json.loads(Path(sys.argv[1]).read_text()):
    if "poison" not in values:
        Pretrainer(build(values["config"])).train(resume=values.get("resume"))
        continue
    run = Run(build(values["config"]), None)
    if run.ranks.rank == 1:
        poison(run, values["poison"], at={2})
    train(run)
    run.end()
    run.close()
