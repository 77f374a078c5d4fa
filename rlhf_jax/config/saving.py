"""When a run saves itself, what it keeps, and what it does when something goes wrong."""

from __future__ import annotations

from typing import Literal

from rlhf_jax.config.checks import check
from rlhf_jax.config.settings import settings


@settings
class CheckpointConfig:
    """Checkpoints in output_dir/checkpoints, from which a run that was stopped or killed continues bit by bit.

    Written in the background: training goes on. An evaluation that is the best so far is saved too (run.keep_best),
    and so is the step at which Ctrl-C or SIGTERM stops the run.

    Args:
        minutes: minutes between saves, the most that a kill can cost; 0 leaves the clock out.
        every: steps between saves; 0 leaves the count out.
        keep_last: newest checkpoints that stay on disk. The best evaluation's stays as well.
        keep_every: steps whose multiples are saved and kept for good; 0 keeps none.
        keep_finished: keep the checkpoints of a finished run, to go on with more steps later.
        on_failure: a save that fails (disk full, no permission) is said, and training continues or stops.
        allow_changes: continue a run whose config differs in settings that may change, such as the number of steps.
    """

    minutes: float = 10.0
    every: int = 0
    keep_last: int = 2
    keep_every: int = 0
    keep_finished: bool = False
    on_failure: Literal["continue", "stop"] = "continue"
    allow_changes: bool = False

    def __post_init__(self) -> None:
        check(self, "checkpoint.", {"at least 0": "minutes every keep_every", "at least 1": "keep_last"})


@settings
class FaultConfig:
    """Losses and gradients that are not finite; such an update changes nothing and is counted in optim/skipped.

    Args:
        max_skipped: steps (PPO: iterations) in a row without one finite update after which the run stops; 0 never.
        debug_nans: stop at the first such update and name the operation that made it; every step waits for its result.
    """

    max_skipped: int = 10
    debug_nans: bool = False

    def __post_init__(self) -> None:
        check(self, "faults.", {"at least 0": "max_skipped"})


MAY_CHANGE = (
    "checkpoint.", "faults.", "mesh.", "run.log_every", "run.eval_every", "run.loggers", "run.profile",
    "data.path", "model.remat", "model.logprob_chunk", "sampling.microbatch", "data.pack", "data.microbatch_tokens",
    "sft.steps", "sft.epochs", "sft.accumulate", "sft.num_samples",
    "reward.steps", "reward.epochs", "reward.accumulate", "reward.timeout", "reward.retries", "reward.on_failure",
    *(f"reward.judge.{setting}" for setting in ("url", "api_key_env", "timeout", "retries", "workers")),
    "rejection.rounds",
    "dpo.steps", "dpo.epochs", "dpo.accumulate", "kto.steps", "kto.epochs", "rrhf.steps", "rrhf.epochs",
    "rrhf.accumulate",
    "ppo.iterations", "ppo.microbatch_tokens", "ppo.score_microbatch", "ppo.accumulate", "ppo.kl_target",
    "ppo.kl_horizon",
    *(f"{name}.{setting}" for name in ("grpo", "rloo", "reinforce_pp", "distill") for setting in
      ("iterations", "microbatch_tokens", "score_microbatch", "accumulate", "num_samples", "sample_every")),
    "ppo.num_samples", "ppo.sample_every", "ppo.save_value_model",
    "optim.learning_rate", "optim.schedule", "optim.warmup_steps", "optim.warmup_ratio",
    "optim.end_fraction",
    "value_optim.learning_rate", "value_optim.schedule", "value_optim.warmup_steps",
    "value_optim.warmup_ratio", "value_optim.end_fraction",
)  # fmt: skip
"""Settings, or groups that end in a dot, with which a checkpoint of other values still fits (allow_changes)."""

ALWAYS_MAY_CHANGE = (
    "run.output_dir", "run.overwrite", "run.progress", "run.report", "run.push_to_hub", "run.exit_code_when_stopped",
    "output_dir", "overwrite", "progress",
    "checkpoint.allow_changes", "faults.debug_nans",
)  # fmt: skip
"""Settings that say nothing about the run itself."""
