"""`rlhf-jax plan`: what every program of a stage costs on a TPU topology that need not be at hand. Floor 4."""

from rlhf_jax.planning.plan import run

__all__ = ["run"]
