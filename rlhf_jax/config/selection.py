"""Settings of the commands that keep the best of several samples."""

from __future__ import annotations

from rlhf_jax.config.checks import check
from rlhf_jax.config.feedback import DrawRun
from rlhf_jax.config.settings import PathText, settings
from rlhf_jax.config.stages import RewardSourceConfig, SFTRun


@settings
class BestOfNRun(DrawRun):
    """All of `rlhf-jax bestofn`: several responses to every prompt, of which a reward chooses one.

    Args:
        num_samples: N, responses to each prompt; rewards are reported of the best of n = 1, 2, 4 .. N of them.
        output: the .jsonl file to write, a row {prompt, response, response_ids, finished, score} per prompt. Until it
            is whole, OUTPUT.part holds what there is; the same command goes on.
    """

    num_samples: int = 16
    output: PathText = ""


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
class RejectionRun(SFTRun):
    """All of `rlhf-jax rejection`; data.path holds prompts, `sft` and `optim` are those of every round."""

    reward: RewardSourceConfig = RewardSourceConfig()
    rejection: RejectionConfig = RejectionConfig()
