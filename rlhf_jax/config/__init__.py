"""Every setting, as frozen dataclasses; YAML files and dotted overrides fill them (`rlhf_jax.cli`).

Imports nothing of jax, so that `rlhf-jax --help` answers at once. Notebooks build the same classes by hand and pass
them to `sft.run`, `reward.run` and `ppo.run`. Counts are in the unit that the name says; lengths are in tokens. A
value out of range is a UserError where the class is made.
"""

from types import ModuleType as _Module

from rlhf_jax.config.adapters import LoRAConfig
from rlhf_jax.config.arch import ArchConfig
from rlhf_jax.config.bestofn import BestOfNArgs
from rlhf_jax.config.certify import CertifyArgs
from rlhf_jax.config.chat import ChatArgs
from rlhf_jax.config.checks import key_of
from rlhf_jax.config.collect import CollectArgs, JudgeArgs
from rlhf_jax.config.datasets import DataAggregateArgs, DataInspectArgs, DataMakeArgs, DataPrepareArgs
from rlhf_jax.config.env import EnvArgs
from rlhf_jax.config.evaluate import EvaluateArgs
from rlhf_jax.config.feedback import DrawArgs, SourceConfig, SourcesArgs
from rlhf_jax.config.functions import bind, no_code_below, resolve, to_dict
from rlhf_jax.config.group import (
    DISTILL,
    REINFORCE_PP,
    RLOO,
    DistillArgs,
    GroupArgs,
    GroupConfig,
    GRPOArgs,
    ReinforcePPArgs,
    RLOOArgs,
)
from rlhf_jax.config.inspection import ConvertArgs, InspectArgs
from rlhf_jax.config.judge import JudgeConfig, RewardJudgeConfig
from rlhf_jax.config.label import LabelArgs
from rlhf_jax.config.online import PPO_OPTIM, OnlineConfig, RewardSourceConfig
from rlhf_jax.config.parts import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SamplingConfig,
    StepsConfig,
)
from rlhf_jax.config.plan import PlanArgs
from rlhf_jax.config.ppo import PPOArgs, PPOConfig
from rlhf_jax.config.preference import DPOArgs, DPOConfig, KTOArgs, KTOConfig, PreferenceArgs, RRHFArgs, RRHFConfig
from rlhf_jax.config.quickstart import QuickstartArgs
from rlhf_jax.config.rate import RateArgs
from rlhf_jax.config.recipe import RecipeArgs
from rlhf_jax.config.rejection import RejectionArgs, RejectionConfig
from rlhf_jax.config.report import ReportArgs, WatchArgs
from rlhf_jax.config.reward import RewardArgs, RewardConfig
from rlhf_jax.config.rope import RopeScaling
from rlhf_jax.config.sample import SampleArgs, ScoreArgs
from rlhf_jax.config.saving import ALWAYS_MAY_CHANGE, MAY_CHANGE, CheckpointConfig, FaultConfig
from rlhf_jax.config.sft import PretrainArgs, SFTArgs, SFTConfig

TrainArgs = SFTArgs | RewardArgs | PreferenceArgs
"""All of a method on rows that stay as they are."""
OnlineArgs = PPOArgs | GroupArgs
"""All of a method that learns from its own samples."""
StageArgs = TrainArgs | OnlineArgs
"""All of a command with a run directory."""

# `import *` brings no module: config.sft would hide rlhf_jax.sft
__all__ = [name for name, it in list(globals().items()) if not name.startswith("_") and not isinstance(it, _Module)]
