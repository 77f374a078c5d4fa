"""`rlhf-jax plan`: what every program of a stage costs on a TPU topology that need not be at hand."""

from rlhf_jax.commands.plan.command import run, run_alone
