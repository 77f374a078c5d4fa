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
from rlhf_jax.online.networks import load_policy_and_reward
from rlhf_jax.ppo import core
from rlhf_jax.sharding import replicated
from rlhf_jax.stage import Loaded, adapted, placed_init, replace
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

    @property
    def frozen(self) -> dict[str, Params] | None:
        """What trained adapters stand on; None where all of policy and critic is trained."""
        return {"ref": self.ref, "reward": self.reward} if self.models.bases else None

    def critic(self, params: Params) -> Params:
        """What is trained of the critic among `params`, its trunk included where the policy's is its own."""
        if not self.models.shared_trunk:
            return params["value"]
        trunk = {name: tree for name, tree in params["policy"].items() if name != "head"}
        return {**trunk, "score": params["value"]["score"]}


def load_networks(config: PPORun, mesh: Mesh, tokenizer: Tokenizer, key: jax.Array) -> Networks:
    """Policy, frozen copy of it (or its base without adapters), reward model if any, and critic."""
    policy, reward = load_policy_and_reward(config, mesh, tokenizer, key)

    def fresh_score() -> Params:
        return jax.jit(partial(policy.model.init_score, zeros=True), out_shardings=replicated(mesh))(key)

    def adapt(loaded: Loaded, number: int) -> Loaded:
        return adapted(loaded, config.lora, placed_init(mesh, jax.random.fold_in(key, number)))

    copy = partial(jax.tree.map, jnp.copy)
    return assemble(config.ppo, policy, reward, fresh_score=fresh_score, copy=copy, adapt=adapt)


def assemble(
    ppo: PPOConfig,
    policy: Loaded,
    reward: Loaded | None,
    *,
    fresh_score: Callable[[], Params],
    copy: Callable[[Params], Params],
    adapt: Callable[[Loaded, int], Loaded],
) -> Networks:
    """The critic that the config asks for, beside policy and reward model; what is trained is a copy.

    With adapters, `adapt(model, number)` gives what is trained of a model, and its frozen rest is shared: the
    reference is the policy's base, and the critic stands on that or on the reward model.
    """
    ref = policy.params
    if reward is not None and not ppo.shared_trunk and ppo.value_init != "zeros":
        value, base = adapt(reward, 2), "reward"
    else:
        scored = policy.model.with_score(policy.params, fresh_score())
        model = replace(policy.model, score_head=True)
        value, base = adapt(Loaded(model, scored, policy.base_config, path=policy.path), 2), "ref"
    policy = adapt(policy, 1)
    trained = {"score": value.params["score"]} if ppo.shared_trunk else value.params
    bases = {}
    if policy.frozen is not None:
        bases = {"policy": "ref"} if ppo.shared_trunk else {"policy": "ref", "value": base}
    models = core.Models(policy.model, value.model, reward.model if reward else None, ppo.shared_trunk, bases)
    params = {"policy": copy(policy.params), "value": copy(trained)}
    return Networks(models, policy, params, ref, reward.params if reward else None, value)
