"""What a user constructs: `Pretrainer(PretrainConfig(...)).train()`."""

from __future__ import annotations

import signal
from dataclasses import replace
from typing import Any

from rlpretrain.config import PretrainConfig
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
        """Run to the end and save the model under `output_dir`/model; returns the last metrics, with what
        ended the run.

        `resume`: "auto" or True goes on from the newest usable checkpoint (or starts), a path from that
        checkpoint. Without it an `output_dir` that holds another run is refused. Raises ConfigError for
        settings that cannot work, Diverged after `stop.nonfinite` skipped steps in a row, CannotWrite where
        the disk is full, Interrupted (a KeyboardInterrupt) once Ctrl-C or SIGTERM ended the run behind a
        whole step and its checkpoint.
        """
        run = Run(self.config, resume)
        try:
            with run.signals:
                train(run)
                return run.end()
        except Interrupted:  # run.json says so already
            raise
        except BaseException as error:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            _note(run, status, error)
            raise
        finally:
            run.close()

    def rollout(self) -> dict[str, Any]:
        """Only sample: every step's groups under the starting weights, kept under `output_dir`/rollouts;
        for `replay`.
        """
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
    """Mark run.json. On a full disk that may fail too: the first error is the one to see."""
    try:
        run.write_run_json(status, error=f"{type(error).__name__}: {error}")
    except CannotWrite as second:
        run.console.say(f"run.json could not be marked {status}: {second}")
