"""One decoder for every family, its heads and cache, and Hugging Face directories."""

from rlhf_jax.models.model import Model
