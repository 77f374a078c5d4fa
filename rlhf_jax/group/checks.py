"""Which of the methods a config is of, and settings that contradict each other, or the mesh."""

from __future__ import annotations

from rlhf_jax.config import GroupArgs, GroupConfig, GRPOArgs, ReinforcePPArgs, RLOOArgs
from rlhf_jax.errors import UserError
from rlhf_jax.online import checks
from rlhf_jax.sharding import Mesh


def settings_of(config: GroupArgs) -> tuple[str, GroupConfig]:
    """The method, which is the name of its command and of its group of the config; and that group."""
    if isinstance(config, GRPOArgs):
        return "grpo", config.grpo
    if isinstance(config, RLOOArgs):
        return "rloo", config.rloo
    if isinstance(config, ReinforcePPArgs):
        return "reinforce_pp", config.reinforce_pp
    raise UserError(f"{type(config).__name__} is of no method; give a GRPOArgs, an RLOOArgs or a ReinforcePPArgs")


def check(config: GroupArgs) -> None:
    """Raise a UserError for settings that contradict each other."""
    name, settings = settings_of(config)
    checks.check(config, settings, name)
    if config.data.batch_size % settings.group_size:
        raise UserError(
            f"data.batch_size {config.data.batch_size}, responses of an iteration, is not divisible by "
            f"{name}.group_size {settings.group_size}; change one of them"
        )


def check_batches(config: GroupArgs, mesh: Mesh) -> None:
    """Raise a UserError unless every batch and microbatch divides over the mesh."""
    name, settings = settings_of(config)
    checks.check_batches(config, settings, name, mesh)
