"""The networks of PPO: policy, frozen reference, reward model and critic, loaded and checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax.config import PPOConfig, PPORun
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.ppo import core
from rlhf_jax.sharding import replicated
from rlhf_jax.stage import Loaded, check_same_tokenizer, check_vocabulary, load_model, replace
from rlhf_jax.types import Params


@dataclass(frozen=True)
class Networks:
    """All that PPO computes with; reference and reward parameters are frozen, params start the training state."""

    models: core.Models
    policy: Loaded
    params: Params
    ref: Params
    reward: Params | None
    value: Loaded


def load_networks(config: PPORun, mesh: Mesh, tokenizer: Tokenizer, key: jax.Array) -> Networks:
    """Policy, frozen copy of it, reward model if any, and critic."""
    policy = load_model(config.model, mesh, key)
    check_vocabulary(policy.model.arch, tokenizer, config.model.path or "model.arch")
    reward = None
    if config.reward.model:
        reward_config = replace(config.model, path=config.reward.model, arch=None)
        reward = load_model(reward_config, mesh, key, head="trained")
        check_vocabulary(reward.model.arch, tokenizer, config.reward.model)
        check_same_tokenizer(tokenizer, config.reward.model, "reward model")

    def fresh_score() -> Params:
        return jax.jit(partial(policy.model.init_score, zeros=True), out_shardings=replicated(mesh))(key)

    return assemble(config.ppo, policy, reward, fresh_score=fresh_score, copy=partial(jax.tree.map, jnp.copy))


def assemble(
    ppo: PPOConfig,
    policy: Loaded,
    reward: Loaded | None,
    *,
    fresh_score: Callable[[], Params],
    copy: Callable[[Params], Params],
) -> Networks:
    """The critic that the config asks for, beside policy and reward model; what is trained is a copy."""
    if reward is not None and not ppo.shared_trunk and ppo.value_init != "zeros":
        value, value_params = reward, copy(reward.params)
    else:
        score = fresh_score()
        on_policy = policy.model.with_score(policy.params, score)
        value = Loaded(replace(policy.model, score_head=True), on_policy, policy.base_config)
        value_params = {"score": score} if ppo.shared_trunk else copy(on_policy)
    models = core.Models(policy.model, value.model, reward.model if reward else None, ppo.shared_trunk)
    params = {"policy": copy(policy.params), "value": value_params}
    return Networks(models, policy, params, policy.params, reward.params if reward else None, value)
