"""PPO for language models: `core` is the algorithm as pure functions, `train` the stage that runs it."""

from rlhf_jax.ppo.core import (
    Experience,
    Models,
    make_ppo_optimizer,
    make_ppo_step,
    make_ppo_update,
    make_score,
    objective,
)
from rlhf_jax.ppo.train import run
