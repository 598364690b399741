"""What processes need, imported once in the process from which tests/builders/processes.py forks them."""

import contextlib

import rlpretrain.cli
import rlpretrain.experiments.compare
import rlpretrain.training.pretrainer  # noqa: F401

with contextlib.suppress(ImportError):
    from rlpretrain.compat import import_deepspeed

    import_deepspeed(on_cpu=True)
with contextlib.suppress(ImportError):
    import peft  # noqa: F401
with contextlib.suppress(ImportError):
    import trl.cli.main  # noqa: F401
    from trl.experimental import async_grpo  # noqa: F401

    import tests.builders.trl  # noqa: F401
    from rlpretrain.trl import RLPTrainer  # noqa: F401
with contextlib.suppress(ImportError):
    import vllm.entrypoints.openai.api_server
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker  # noqa: F401
