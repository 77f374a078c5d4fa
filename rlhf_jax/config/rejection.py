"""Rejection sampling."""

from __future__ import annotations

from rlhf_jax.config.checks import check
from rlhf_jax.config.online import RewardSourceConfig
from rlhf_jax.config.settings import settings
from rlhf_jax.config.sft import SFTArgs
from rlhf_jax.errors import UserError, shown


@settings
class RejectionConfig:
    """Rounds of sampling, keeping the best response to each prompt, and SFT on what was kept.

    Args:
        rounds: how often; each samples from the model that the one before trained.
        num_samples: responses to each prompt.
        sample_batch_size: rows decoded at once.
    """

    rounds: int = 1
    num_samples: int = 8
    sample_batch_size: int = 64

    def __post_init__(self) -> None:
        check(self, "rejection.", {"at least 1": "rounds num_samples sample_batch_size"})


@settings
class RejectionArgs(SFTArgs):
    """All of `rlhf-jax rejection`; data.path holds prompts, `sft` and `optim` are those of every round."""

    reward: RewardSourceConfig = RewardSourceConfig()
    rejection: RejectionConfig = RejectionConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.mixture:
            raise UserError(
                f"data.mixture {shown(self.data.mixture)} does nothing in rejection, which learns from its own "
                "samples alone; put all prompts into the file of data.path"
            )
