"""The networks of a method: the policy and what it is compared with and judged by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from rlhf_jax.config import OnlineArgs
from rlhf_jax.config.functions import replace
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.inference.generate import total_length
from rlhf_jax.keys import branch
from rlhf_jax.models.loading import Loaded, check_length, check_same_tokenizer, check_vocabulary, load_model
from rlhf_jax.sharding import Mesh
from rlhf_jax.types import Params


@dataclass(frozen=True)
class Networks:
    """What never changes of a method's networks; what is trained is in the training state.

    Attributes:
        models: the method's `core.Models`, which compute.
        policy: the model; its parameters may have been donated to training.
        ref: parameters of the reference; None without any.
        reward: parameters of the reward model; None without any.
        frozen: what trained adapters or layers stand on, as `models.whole` and the update take it; None if all is
            trained.
        critic: the critic that is written to output_dir/value_model; None if none is.
    """

    models: Any
    policy: Loaded
    ref: Params | None
    reward: Params | None
    frozen: Params | None
    critic: Loaded | None = None


def load_policy_and_reward(
    config: OnlineArgs, mesh: Mesh, tokenizer: Tokenizer, key: jax.Array
) -> tuple[Loaded, Loaded | None, jax.Array]:
    """config.model and config.reward.model, which must know the tokenizer's ids and hold prompt and response.

    Also returns the key of new weights, a branch of the run's `key`.

    Raises:
        UserError: a vocabulary or positions that are too few, or a reward model with another tokenizer.
    """
    length, key = total_length(config.sampling, config.data.max_prompt_length), branch(key, "weights")
    policy, reward = load_model(config.model, mesh, key, length=length), None
    check_vocabulary(policy.model.arch, tokenizer, config.model.path or "model.arch")
    if config.reward.model:
        named = replace(config.model, path=config.reward.model, arch=None)
        reward = load_model(named, mesh, key, head="trained", length=length)
        check_vocabulary(reward.model.arch, tokenizer, config.reward.model)
        check_same_tokenizer(tokenizer, config.reward.model, "reward model")
    for loaded in (policy, reward):
        if loaded is not None:
            check_length(loaded.model.arch, length, "prompt length + sampling.max_new_tokens =")
    return policy, reward, key
