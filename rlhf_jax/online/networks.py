"""The networks that every method needs: policy, and a reward model if the config names one."""

from __future__ import annotations

from typing import Any

import jax

from rlhf_jax.config.functions import replace
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.models.loading import Loaded, check_same_tokenizer, check_vocabulary, load_model
from rlhf_jax.sharding import Mesh


def load_policy_and_reward(
    config: Any, mesh: Mesh, tokenizer: Tokenizer, key: jax.Array, length: int
) -> tuple[Loaded, Loaded | None]:
    """config.model and config.reward.model, which must know the tokenizer's ids, for sequences of `length`.

    Raises:
        UserError: a vocabulary that is too small, or a reward model with another tokenizer.
    """
    policy = load_model(config.model, mesh, key, length=length)
    check_vocabulary(policy.model.arch, tokenizer, config.model.path or "model.arch")
    if not config.reward.model:
        return policy, None
    named = replace(config.model, path=config.reward.model, arch=None)
    reward = load_model(named, mesh, key, head="trained", length=length)
    check_vocabulary(reward.model.arch, tokenizer, config.reward.model)
    check_same_tokenizer(tokenizer, config.reward.model, "reward model")
    return policy, reward
