"""Settings of low-rank adapters."""

from __future__ import annotations

from dataclasses import field

from rlhf_jax.config.checks import check, check_list
from rlhf_jax.config.parts import DataConfig, ModelConfig, OptimConfig, StepsConfig
from rlhf_jax.config.settings import settings
from rlhf_jax.errors import UserError


@settings
class LoRAConfig:
    """Low-rank adapters: the model stays frozen, and y = x W + scale (x A) B is trained in A and B (Hu et al. 2021).

    Score heads are trained and saved with them. PPO's reference is then the model without its adapters.

    Args:
        rank: columns of A and rows of B; 0 trains the whole model instead.
        alpha: scale = alpha / rank.
        rank_stabilized: scale = alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732).
        targets: modules that get adapters, by the last parts of their names in transformers, as q_proj or
            mlp.up_proj; empty means every linear layer of the blocks.
    """

    rank: int = 0
    alpha: float = 16.0
    rank_stabilized: bool = False
    targets: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check(self, "lora.", {"at least 0": "rank", "above 0": "alpha"})
        check_list(self, "targets", "lora.")
        if not self.rank and (self.targets or self.rank_stabilized):
            name = "targets" if self.targets else "rank_stabilized"
            raise UserError(f"lora.{name} does nothing with lora.rank 0, which trains the whole model; set lora.rank")


def check_frozen(model: ModelConfig, lora: LoRAConfig) -> None:
    """Raise a UserError for a quantised model that would be trained, and for random weights that would not."""
    if model.quantize != "none" and not lora.rank:
        cure = "set lora.rank to train adapters on it"
        raise UserError(f"model.quantize {model.quantize}: a quantised model cannot be trained; {cure}")
    if lora.rank and model.arch is not None:
        raise UserError(f"lora.rank {lora.rank} would leave the random weights of model.arch as they are; set it to 0")


def check_training(
    group: str, own: StepsConfig, data: DataConfig, model: ModelConfig, lora: LoRAConfig, optim: OptimConfig
) -> None:
    """Raise a UserError unless a method on rows, whose settings are `own`, can train so; `group` is their name."""
    optim.check("optim.")
    check_frozen(model, lora)
    if data.batch_size % own.accumulate:
        raise UserError(
            f"data.batch_size {data.batch_size} is not divisible by {group}.accumulate {own.accumulate}; "
            "change one of them"
        )
