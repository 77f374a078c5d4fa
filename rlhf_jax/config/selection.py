"""Settings of the commands that keep the best of several samples."""

# ruff: noqa: RUF009 (the defaults are frozen dataclasses, which ruff recognises in their own file only)
from __future__ import annotations

from dataclasses import dataclass

from rlhf_jax.config.checks import check
from rlhf_jax.config.feedback import DrawRun
from rlhf_jax.config.stages import RewardSourceConfig, SFTRun


@dataclass(frozen=True)
class BestOfNRun(DrawRun):
    """All of `rlhf-jax bestofn`: several responses to every prompt, of which a reward chooses one.

    Args:
        num_samples: N, responses to each prompt; rewards are reported of the best of n = 1, 2, 4 .. N of them.
        output: the .jsonl file to write, a row {prompt, response, finished, score} per prompt. Until it is whole,
            OUTPUT.part holds what there is; the same command goes on.
    """

    num_samples: int = 16
    output: str = ""


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class RejectionRun(SFTRun):
    """All of `rlhf-jax rejection`; data.path holds prompts, `sft` and `optim` are those of every round."""

    reward: RewardSourceConfig = RewardSourceConfig()
    rejection: RejectionConfig = RejectionConfig()
