"""`plan`."""

from __future__ import annotations

from typing import Literal

from rlhf_jax.config.checks import check
from rlhf_jax.config.settings import settings
from rlhf_jax.errors import UserError


@settings
class PlanArgs:
    """What `rlhf-jax plan` adds to the options of the stage that it plans.

    Args:
        topology: TPU generation and shape of the slice, such as v5e:4x4 or v5p:4x4x4.
        stage: auto tells it by the groups of options given; pretrain must be said.
        responses: to each prompt, where rankings are trained on (rrhf; reward with reward.comparisons rankings).
        fill: share of the token slots of prompts and responses that hold tokens. What is packed or refilled costs less
            by as much; what cannot be, and what is refilled or packed imperfectly, does not.
        suggest: try mesh shapes and batch sizes, and rank those that fit.
        json: print one JSON object per line instead of tables.
    """

    topology: str = ""
    stage: Literal[
        "auto",
        "pretrain",
        "sft",
        "reward",
        "dpo",
        "kto",
        "rrhf",
        "ppo",
        "grpo",
        "rloo",
        "reinforce_pp",
        "distill",
    ] = "auto"
    responses: int = 4
    fill: float = 1.0
    suggest: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        check(self, "", {"at least 1": "responses", "above 0 and at most 1": "fill"})
        if not self.topology:
            raise UserError("topology is empty; write --topology v5e:4x4, or another slice")
