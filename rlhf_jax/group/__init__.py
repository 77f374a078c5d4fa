"""GRPO, RLOO, REINFORCE++ and distillation, which need no critic: `core` is pure functions, `train` the stage."""

from rlhf_jax.group.core import Experience, Models, advantages_of, make_group_step, make_score, objective
from rlhf_jax.group.train import run
