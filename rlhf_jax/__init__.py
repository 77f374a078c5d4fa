"""RLHF in JAX: pretraining, supervised fine-tuning, reward models and PPO as pure functions over a device mesh."""

__version__ = "0.1.0"
