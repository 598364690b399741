"""The configuration of a run: one dataclass per section, with the same names in YAML, CLI and Python.

`base` has the types that sections share; `model`, `data`, `mixing`, `engines`, `optim` and `schema` have the
sections; `io` reads and checks them.
"""

from rlpretrain.config.base import STRICT, Amount, ConfigError, Count, PathText, Seed, Whole, as_text, headed
from rlpretrain.config.data import DataConfig, SourceConfig, TextConfig
from rlpretrain.config.engines import EngineConfig
from rlpretrain.config.mixing import MixingConfig
from rlpretrain.config.model import ModelConfig, ReferenceConfig
from rlpretrain.config.optim import AverageConfig, OptimConfig, ScheduleConfig
from rlpretrain.config.policy import FsdpConfig, LoraConfig, PolicyConfig
from rlpretrain.config.sampling import SamplingConfig
from rlpretrain.config.schema import (
    PAPER_RECIPE,
    BaselineConfig,
    CheckpointConfig,
    EvalConfig,
    LossConfig,
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
    "FsdpConfig",
    "LoraConfig",
    "LossConfig",
    "MixingConfig",
    "ModelConfig",
    "OptimConfig",
    "PathText",
    "PolicyConfig",
    "PretrainConfig",
    "ReferenceConfig",
    "SamplingConfig",
    "ScheduleConfig",
    "Seed",
    "SourceConfig",
    "StopConfig",
    "TaskSettings",
    "TextConfig",
    "Whole",
    "as_text",
    "headed",
]
