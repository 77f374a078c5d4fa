"""All model families."""

from __future__ import annotations

from rlhf_jax.models.hf.expert_families import EXPERTS
from rlhf_jax.models.hf.families import FIRST
from rlhf_jax.models.hf.hybrid_families import HYBRIDS
from rlhf_jax.models.hf.near_families import NEAR

FAMILIES = {family.model_type: family for family in (*FIRST, *NEAR, *EXPERTS, *HYBRIDS)}
"""By model_type; the first that can hold a shape is taken for a model with random weights."""
