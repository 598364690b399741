"""Objectives in TRL's trainers: reward functions, a trainer, rollouts.

`RLPTrainer` and `RLPConfig` (trainer.py) need TRL and are loaded at their first use. `NAME_reward` is the
reward of the objective NAME; TRL's command line takes it by its path.
"""

from __future__ import annotations

from typing import Any

from rlpretrain.objectives import available
from rlpretrain.trl.data import COLUMNS, PROMPT_COLUMNS, to_prompt_dataset
from rlpretrain.trl.reward import InformationGainReward, ObjectiveReward

__all__ = ["COLUMNS", "PROMPT_COLUMNS", "InformationGainReward", "ObjectiveReward", "to_prompt_dataset"]

NAMED: dict[str, dict[str, Any]] = {
    "information_gain": {"name": "rlp"},
    "rlpr": {"name": "likelihood", "score": "debiased_prob"},
}
"""Rewards by path (`rlpretrain.trl.NAME_reward`) whose name is not that of an objective."""


def __getattr__(name: str) -> Any:
    short = name.removesuffix("_reward")
    asks_for_reward = short != name
    if asks_for_reward and (short in NAMED or short in available()):
        reward = ObjectiveReward(**NAMED.get(short, {"name": short}))  # a reward serves one trainer
        if short in NAMED:
            reward.__name__ = short
        return reward
    if name not in ("RLPConfig", "RLPTrainer"):
        known = ", ".join(f"{n}_reward" for n in (*NAMED, *available()))
        hint = f"; rewards are {known}" if asks_for_reward else ""
        raise AttributeError(f"module {__name__} has no attribute {name}{hint}")
    try:
        from rlpretrain.trl import trainer
    except ImportError as error:
        if error.name and error.name.partition(".")[0] == "trl":
            raise ImportError(f'{name} needs TRL: pip install "rlpretrain[trl]"') from error
        raise
    return getattr(trainer, name)
