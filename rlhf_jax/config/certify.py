"""`certify`."""

from __future__ import annotations

from typing import Literal

from rlhf_jax.config.checks import check
from rlhf_jax.config.settings import settings


@settings
class CertifyArgs:
    """What `rlhf-jax certify` adds to the options of the method that it looks at.

    Args:
        stage: auto tells it by the groups of options given.
        batch: which iteration's prompts are answered, from 0.
        layers: where log-probs differ, look for the lowest layer from which they do; compiles a few smaller models.
        json: print one JSON object instead of lines.
    """

    stage: Literal["auto", "ppo", "grpo", "rloo", "reinforce_pp", "distill"] = "auto"
    batch: int = 0
    layers: bool = True
    json: bool = False

    def __post_init__(self) -> None:
        check(self, "", {"at least 0": "batch"})
