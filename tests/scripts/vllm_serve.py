"""vLLM's own HTTP server, in a session of its own and with its engine process forked from it.

On a CPU vLLM would start its engine as a fresh interpreter, which imports all of vLLM again.
"""

from __future__ import annotations

import multiprocessing
import os

from vllm.entrypoints.launchers.api_server.entry import main
from vllm.v1.engine import utils

if __name__ == "__main__":
    os.setsid()
    utils.get_mp_context = lambda: multiprocessing.get_context("fork")
    main()
