"""Every setting, as frozen dataclasses; YAML files and dotted overrides fill them (`rlhf_jax.cli`).

Imports nothing of jax, so that `rlhf-jax --help` answers at once. Notebooks build the same classes by hand and pass
them to `sft.run`, `reward.run` and `ppo.run`. Counts are in the unit that the name says; lengths are in tokens. A
value out of range is a UserError where the class is made.
"""

from rlhf_jax.config.adapters import LoRAConfig
from rlhf_jax.config.arch import ArchConfig, RopeScaling
from rlhf_jax.config.bestofn import BestOfNRun
from rlhf_jax.config.checks import key_of
from rlhf_jax.config.collect import CollectRun, JudgeRun
from rlhf_jax.config.datasets import DataAggregateRun, DataInspectRun, DataMakeRun, DataPrepareRun
from rlhf_jax.config.evaluate import EvaluateRun
from rlhf_jax.config.feedback import DrawRun, JudgeConfig, SourceConfig, SourcesRun
from rlhf_jax.config.functions import bind, no_code_below, resolve, to_dict
from rlhf_jax.config.group import REINFORCE_PP, RLOO, GroupConfig, GroupRun, GRPORun, ReinforcePPRun, RLOORun
from rlhf_jax.config.inspection import ConvertRun, InspectRun
from rlhf_jax.config.label import LabelRun
from rlhf_jax.config.online import PPO_OPTIM, OnlineConfig, RewardSourceConfig
from rlhf_jax.config.parts import DataConfig, MeshConfig, ModelConfig, OptimConfig, RunConfig, SamplingConfig
from rlhf_jax.config.plan import PlanRun
from rlhf_jax.config.ppo import PPOConfig, PPORun
from rlhf_jax.config.preference import DPOConfig, DPORun, KTOConfig, KTORun, RRHFConfig, RRHFRun
from rlhf_jax.config.quickstart import QuickstartConfig
from rlhf_jax.config.rate import RateRun
from rlhf_jax.config.recipe import RecipeRun
from rlhf_jax.config.rejection import RejectionConfig, RejectionRun
from rlhf_jax.config.reward import RewardConfig, RewardRun
from rlhf_jax.config.sample import SampleRun, ScoreRun
from rlhf_jax.config.saving import ALWAYS_MAY_CHANGE, MAY_CHANGE, CheckpointConfig, FaultConfig
from rlhf_jax.config.sft import PretrainRun, SFTConfig, SFTRun

__all__ = [
    "ALWAYS_MAY_CHANGE",
    "MAY_CHANGE",
    "PPO_OPTIM",
    "REINFORCE_PP",
    "RLOO",
    "ArchConfig",
    "BestOfNRun",
    "CheckpointConfig",
    "CollectRun",
    "ConvertRun",
    "DPOConfig",
    "DPORun",
    "DataAggregateRun",
    "DataConfig",
    "DataInspectRun",
    "DataMakeRun",
    "DataPrepareRun",
    "DrawRun",
    "EvaluateRun",
    "FaultConfig",
    "GRPORun",
    "GroupConfig",
    "GroupRun",
    "InspectRun",
    "JudgeConfig",
    "JudgeRun",
    "KTOConfig",
    "KTORun",
    "LabelRun",
    "LoRAConfig",
    "MeshConfig",
    "ModelConfig",
    "OnlineConfig",
    "OptimConfig",
    "PPOConfig",
    "PPORun",
    "PlanRun",
    "PretrainRun",
    "QuickstartConfig",
    "RLOORun",
    "RRHFConfig",
    "RRHFRun",
    "RateRun",
    "RecipeRun",
    "ReinforcePPRun",
    "RejectionConfig",
    "RejectionRun",
    "RewardConfig",
    "RewardRun",
    "RewardSourceConfig",
    "RopeScaling",
    "RunConfig",
    "SFTConfig",
    "SFTRun",
    "SampleRun",
    "SamplingConfig",
    "ScoreRun",
    "SourceConfig",
    "SourcesRun",
    "bind",
    "key_of",
    "no_code_below",
    "resolve",
    "to_dict",
]
