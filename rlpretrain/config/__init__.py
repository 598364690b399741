"""The configuration of a run: one dataclass per section, with the same names in YAML, CLI and Python.

`base` has the types that sections share; `inputs`, `engines`, `optim` and `schema` have the sections; `io`
reads and checks them.
"""

from rlpretrain.config.base import STRICT, Amount, ConfigError, Count, PathText, Seed, Whole, headed
from rlpretrain.config.engines import EngineConfig
from rlpretrain.config.inputs import DataConfig, ModelConfig
from rlpretrain.config.optim import AverageConfig, OptimConfig, ScheduleConfig
from rlpretrain.config.sampling import SamplingConfig
from rlpretrain.config.schema import (
    PAPER_RECIPE,
    BaselineConfig,
    CheckpointConfig,
    EvalConfig,
    LoraConfig,
    LossConfig,
    PolicyConfig,
    PretrainConfig,
    StopConfig,
    TaskSettings,
)

__all__ = [
    "PAPER_RECIPE",
    "STRICT",
    "Amount",
    "AverageConfig",
    "BaselineConfig",
    "CheckpointConfig",
    "ConfigError",
    "Count",
    "DataConfig",
    "EngineConfig",
    "EvalConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "PathText",
    "PolicyConfig",
    "PretrainConfig",
    "SamplingConfig",
    "ScheduleConfig",
    "Seed",
    "StopConfig",
    "TaskSettings",
    "Whole",
    "headed",
]
