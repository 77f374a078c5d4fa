"""Settings of PPO that contradict each other, or the mesh."""

from __future__ import annotations

from rlhf_jax.config import PPOArgs
from rlhf_jax.errors import UserError
from rlhf_jax.online import checks
from rlhf_jax.sharding import Mesh, check_rows


def check(config: PPOArgs) -> None:
    """Raise a UserError for settings that contradict each other."""
    ppo = config.ppo
    checks.check(config, ppo, "ppo")
    if ppo.kl_controller == "adaptive" and ppo.kl_target <= 0:
        raise UserError(f"ppo.kl_target {ppo.kl_target} must be positive; or set ppo.kl_controller fixed")
    if ppo.ptx_coef and not ppo.ptx_path:
        raise UserError(f"ppo.ptx_coef {ppo.ptx_coef} needs text; set ppo.ptx_path")
    if ppo.trainable_layers and config.lora.rank:
        raise UserError(
            f"ppo.trainable_layers {ppo.trainable_layers} and lora.rank {config.lora.rank} both say what is trained; "
            "set one of them to 0"
        )
    if ppo.value_init == "reward_model" and (not config.reward.model or ppo.shared_trunk):
        raise UserError("ppo.value_init reward_model needs reward.model, and ppo.shared_trunk false")


def check_batches(config: PPOArgs, mesh: Mesh) -> None:
    """Raise a UserError unless every batch and microbatch divides over the mesh."""
    ppo = config.ppo
    if ppo.ptx_coef and ppo.ptx_batch_size % ppo.accumulate:
        raise UserError(
            f"ppo.ptx_batch_size {ppo.ptx_batch_size} is not divisible by ppo.accumulate {ppo.accumulate}; "
            "change one of them"
        )
    checks.check_batches(config, ppo, "ppo", mesh)
    if ppo.ptx_coef:
        check_rows(mesh, ppo.ptx_batch_size // ppo.accumulate, "ppo.ptx_batch_size / ppo.accumulate =")
