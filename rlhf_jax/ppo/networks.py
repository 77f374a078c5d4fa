"""The networks of PPO: policy, frozen reference, reward model and critic, loaded and checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from rlhf_jax.config import PPOArgs, PPOConfig
from rlhf_jax.config.functions import replace
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.keys import Purpose, branch
from rlhf_jax.models.loading import Loaded, adapted, placed_init
from rlhf_jax.online.networks import load_policy_and_reward
from rlhf_jax.ppo import core
from rlhf_jax.sharding import Mesh, replicated, tree_shardings
from rlhf_jax.training.state import placed_shapes
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


def load_networks(config: PPOArgs, mesh: Mesh, tokenizer: Tokenizer, key: jax.Array, length: int) -> Networks:
    """Policy, frozen reference, reward model if any, and critic, for sequences of `length`."""
    policy, reward = load_policy_and_reward(config, mesh, tokenizer, key, length)

    def fresh_score() -> Params:
        return jax.jit(partial(policy.model.init_score, zeros=True), out_shardings=replicated(mesh))(key)

    def adapt(loaded: Loaded, purpose: Purpose) -> Loaded:
        return adapted(loaded, config.lora, placed_init(mesh, branch(key, purpose)))

    copy = partial(jax.tree.map, jnp.copy)
    return assemble(config.ppo, mesh, policy, reward, fresh_score=fresh_score, copy=copy, adapt=adapt)


def assemble(
    ppo: PPOConfig,
    mesh: Mesh,
    policy: Loaded,
    reward: Loaded | None,
    *,
    fresh_score: Callable[[], Params],
    copy: Callable[[Params], Params],
    adapt: Callable[[Loaded, Purpose], Loaded],
) -> Networks:
    """The critic that the config asks for, beside policy and reward model; what is trained is a copy.

    Where a part of a model is trained, adapters (`adapt(model, purpose)`) or top layers, its frozen rest is shared:
    the policy stands on the reference, and the critic on that or on the reward model.
    """
    policy = split_layers(policy, ppo.trainable_layers, mesh)
    ref = policy.params
    if reward is not None and not ppo.shared_trunk and ppo.value_init != "zeros":
        reward = split_layers(reward, ppo.trainable_layers, mesh)
        value, base = reward, "reward"
    else:
        scored = policy.model.with_score(policy.params, fresh_score())
        model = replace(policy.model, score_head=True)
        value, base = Loaded(model, scored, policy.base_config, path=policy.path), "ref"
    value, policy = adapt(frozen_below(value), "critic's adapters"), adapt(frozen_below(policy), "adapters")
    trained = {"score": value.params["score"]} if ppo.shared_trunk else value.params
    bases = {}
    if policy.frozen is not None:
        bases = {"policy": "ref"} if ppo.shared_trunk else {"policy": "ref", "value": base}
    models = core.Models(policy.model, value.model, reward.model if reward else None, ppo.shared_trunk, bases)
    params = {"policy": copy(policy.params), "value": copy(trained)}
    return Networks(models, policy, params, ref, reward.params if reward else None, value)


def split_layers(loaded: Loaded, top: int, mesh: Mesh) -> Loaded:
    """The model with all but its `top` layers apart, so that others may share them; as it is if `top` is 0.

    Raises:
        UserError: it has fewer layers.
    """
    if not top:
        return loaded
    if top > loaded.model.arch.num_layers:
        layers = loaded.model.arch.num_layers
        raise UserError(f"ppo.trainable_layers {top} is more than the {layers} layers of a model; lower it")
    split = partial(loaded.model.split, top=top)
    shapes = jax.eval_shape(split, loaded.params)
    places = tree_shardings(mesh, shapes)
    if isinstance(jax.tree.leaves(loaded.params)[0], jax.ShapeDtypeStruct):
        return replace(loaded, params=placed_shapes(shapes, places))
    return replace(loaded, params=jax.jit(split, out_shardings=places)(loaded.params))


def frozen_below(loaded: Loaded) -> Loaded:
    """A model that `split_layers` cut, its embedding and lower layers frozen; any other as it is."""
    if "lower" not in loaded.params:
        return loaded
    frozen = {name: loaded.params[name] for name in ("embed", "lower")}
    return replace(loaded, params={n: t for n, t in loaded.params.items() if n not in frozen}, frozen=frozen)
