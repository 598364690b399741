"""Run by tests/test_policies.py under torchrun: several short trainings in one process group, one after the other."""

from __future__ import annotations

import faulthandler
import json
import sys
from pathlib import Path

from rlpretrain import Pretrainer
from rlpretrain.config_io import build

faulthandler.dump_traceback_later(100, exit=True)  # a hang shows where, and ends
for values in json.loads(Path(sys.argv[1]).read_text()):
    Pretrainer(build(values["config"])).train(resume=values.get("resume"))
