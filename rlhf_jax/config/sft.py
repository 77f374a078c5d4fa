"""Supervised fine-tuning and pretraining."""

from __future__ import annotations

from typing import Literal

from rlhf_jax.config.adapters import LoRAConfig, check_training
from rlhf_jax.config.parts import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SamplingConfig,
    StepsConfig,
)
from rlhf_jax.config.rates import settle
from rlhf_jax.config.saving import CheckpointConfig, FaultConfig
from rlhf_jax.config.settings import settings


@settings
class SFTConfig(StepsConfig):
    """Next-token training on demonstrations or plain text.

    Args:
        loss_on: the response only, all assistant turns, or all tokens.
        loss_reduction: token (mean over the batch's tokens) or sequence (mean over rows of their means).
        pack: several documents in one sequence, not attending to each other.
        loss: a function (logprobs, weights) -> (scalar, metrics), as "module:name".
        num_samples: continuations written to samples.jsonl after each evaluation.
    """

    loss_on: Literal["response", "assistant", "all"] = "response"
    loss_reduction: Literal["token", "sequence"] = "token"
    pack: bool = False
    loss: str = "rlhf_jax.losses:next_token_loss"
    num_samples: int = 4

    def __post_init__(self) -> None:
        self.check("sft.", "num_samples")


@settings
class SFTArgs:
    """All of `rlhf-jax sft`."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    sft: SFTConfig = SFTConfig()
    lora: LoRAConfig = LoRAConfig()
    optim: OptimConfig = OptimConfig()
    sampling: SamplingConfig = SamplingConfig()
    mesh: MeshConfig = MeshConfig()
    run: RunConfig = RunConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultConfig = FaultConfig()

    def __post_init__(self) -> None:
        settle(self, "sft")
        check_training("sft", self.sft, self.data, self.model, self.lora, self.optim)
        self.sampling.check_buckets("data.max_prompt_length", self.data.max_prompt_length)
        self.sampling.check_whole()


@settings
class PretrainArgs(SFTArgs):
    """All of `rlhf-jax pretrain`: SFT with packing and the loss on all tokens."""

    sft: SFTConfig = SFTConfig(pack=True, loss_on="all")
