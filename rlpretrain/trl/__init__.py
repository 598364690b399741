"""Objectives in TRL's trainers: reward functions, a trainer, rollouts. TRL is imported with the first name
that needs it.

`RLPTrainer` and `RLPConfig` (trainer.py) are loaded when they are asked for. So is `NAME_reward`, the reward
of the objective NAME, which TRL's command line takes by its path.
"""

from __future__ import annotations

from typing import Any

from rlpretrain.objectives import available
from rlpretrain.trl.data import COLUMNS, to_prompt_dataset
from rlpretrain.trl.reward import InformationGainReward, ObjectiveReward

__all__ = ["COLUMNS", "InformationGainReward", "ObjectiveReward", "to_prompt_dataset"]

NAMED = {"information_gain": {"name": "rlp"}, "rlpr": {"name": "likelihood", "score": "debiased_prob"}}
"""Rewards by path (`rlpretrain.trl.NAME_reward`) whose name is not that of an objective."""


def __getattr__(name: str) -> Any:
    if (short := name.removesuffix("_reward")) != name and (short in NAMED or short in available()):
        reward = ObjectiveReward(
            **NAMED.get(short, {"name": short})
        )  # a new one each time: it will be one trainer's
        reward.__name__ = short if short in NAMED else reward.__name__
        return reward
    if name not in ("RLPConfig", "RLPTrainer"):
        known = ", ".join(f"{n}_reward" for n in (*NAMED, *available()))
        rewards = f"; rewards are {known}" if short != name else ""
        raise AttributeError(f"module {__name__} has no attribute {name}{rewards}")
    try:
        from rlpretrain.trl import trainer
    except ImportError as error:
        if error.name and error.name.partition(".")[0] == "trl":
            raise ImportError(f'{name} needs TRL: pip install "rlpretrain[trl]"') from error
        raise
    return getattr(trainer, name)
