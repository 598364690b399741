"""The entry point in Python: `Pretrainer(PretrainConfig(...)).train()`."""

from __future__ import annotations

import signal
from dataclasses import replace
from typing import Any

from rlpretrain.config import ConfigError, PretrainConfig
from rlpretrain.files import CannotWrite
from rlpretrain.training import run_stop
from rlpretrain.training.interruption import Interrupted
from rlpretrain.training.loop import train
from rlpretrain.training.run import Run


class Pretrainer:
    """Continue the pretraining of a base checkpoint with a reinforcement-style objective.

    >>> from rlpretrain import Pretrainer, PretrainConfig
    >>> settings = {"model": "base", "data": "docs.jsonl", "objective": "rlp", "output_dir": "runs/rlp"}
    >>> config = PretrainConfig(**settings)  # doctest: +SKIP
    >>> Pretrainer(config).train()  # doctest: +SKIP
    """

    def __init__(self, config: PretrainConfig):
        self.config = config

    def train(self, resume: str | bool | None = None) -> dict[str, Any]:
        """Run to the end and save the model as `output_dir`/model; returns the last metrics.

        They include the reason for an early stop. `resume`: "auto" or True resumes from the newest usable
        checkpoint, or starts if there is none; a path resumes from that checkpoint. Without `resume`, an
        `output_dir` that holds another run is refused. Raises ConfigError for settings that cannot work,
        Diverged after `stop.nonfinite` skipped steps in a row, CannotWrite if the disk is full, Interrupted
        (a KeyboardInterrupt) if Ctrl-C or SIGTERM ended the run after a complete step and its checkpoint.
        """
        run = Run(self.config, resume)
        try:
            with run.signals:
                train(run)
                return run.end()
        except Interrupted:  # run.json is already marked
            raise
        except BaseException as error:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            _note(run, status, error)
            raise
        finally:
            run.close()

    def rollout(self) -> dict[str, Any]:
        """Only sample: store every step's groups under `output_dir`/rollouts, for `replay`.

        The starting weights sample all of them. Raises ConfigError for `data.mixing`, which needs losses.
        """
        if self.config.data.mixing is not None:
            raise ConfigError("data.mixing: a run that only samples has no losses to follow: leave it out")
        run = Run(replace(self.config, save_rollouts=True), None)
        groups = 0
        try:
            with run.signals:
                for step in run.remaining_steps():
                    groups += len(run.next_batch().groups)
                    run.step = step + 1
                    run.stopped = run_stop.interrupted(run)
            if run.stopped and run.step < run.total_steps:
                run.write_run_json("interrupted")
                raise Interrupted(
                    f"{run.stopped}; {run.step} of {run.total_steps} steps are in {run.folder / 'rollouts'}",
                    run.signals.number or signal.SIGTERM,
                )
            run.write_run_json("done")
        except Interrupted:
            raise
        except BaseException as error:
            _note(run, "interrupted" if isinstance(error, KeyboardInterrupt) else "failed", error)
            raise
        finally:
            run.close()
        return {"steps": run.step, "groups": groups, "rollouts": str(run.folder / "rollouts")}


def _note(run: Run, status: str, error: BaseException) -> None:
    """Mark run.json. On a full disk this may fail too; then the first error is still the one raised."""
    try:
        run.write_run_json(status, error=f"{type(error).__name__}: {error}")
    except CannotWrite as write_error:
        run.console.say(f"run.json could not be marked {status}: {write_error}")
