"""What a user constructs: `Pretrainer(PretrainConfig(...)).train()`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rlpretrain.config import PretrainConfig
from rlpretrain.loop import train
from rlpretrain.run import Run


class Pretrainer:
    """Continue the pretraining of a base checkpoint with a reinforcement-style objective.

    >>> from rlpretrain import Pretrainer, PretrainConfig
    >>> config = PretrainConfig(model="base", data="docs.jsonl", objective="rlp", output_dir="runs/rlp")  # doctest: +SKIP
    >>> Pretrainer(config).train()                                                                    # doctest: +SKIP
    """

    def __init__(self, config: PretrainConfig):
        self.config = config

    def train(self, resume: str | bool | None = None) -> dict[str, Any]:
        """Run to the end and save the model under `output_dir`/model; returns the last metrics, with what ended the run.

        `resume`: "auto" or True goes on from the newest usable checkpoint (or starts), a path from that checkpoint. Without
        it an `output_dir` that holds another run is refused. Raises ConfigError for settings that cannot work, Diverged
        after `stop.nonfinite` skipped steps in a row.
        """
        run = Run(self.config, resume)
        try:
            train(run)
            return run.end()
        except BaseException as error:
            run.write_run_json("failed", error=f"{type(error).__name__}: {error}")
            raise
        finally:
            run.close()

    def rollout(self) -> dict[str, Any]:
        """Only sample: every step's groups under the starting weights, kept under `output_dir`/rollouts; for `replay`."""
        run = Run(replace(self.config, save_rollouts=True), None)
        groups = 0
        try:
            for step in run.remaining_steps():
                groups += len(run.take().groups)
                run.step = step + 1
            run.write_run_json("done")
        finally:
            run.close()
        return {"steps": run.step, "groups": groups, "rollouts": str(run.folder / "rollouts")}
