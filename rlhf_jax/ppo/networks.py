"""The networks of PPO: a critic and a frozen reference, made of the policy and the reward model."""

from __future__ import annotations

from functools import partial

import jax

from rlhf_jax.config import PPOArgs
from rlhf_jax.config.functions import replace
from rlhf_jax.errors import UserError
from rlhf_jax.models import Model
from rlhf_jax.models.loading import Loaded, adapted
from rlhf_jax.models.members import merged_member
from rlhf_jax.online.networks import Networks, members, together
from rlhf_jax.ppo import core
from rlhf_jax.sharding import Mesh, copied, placed
from rlhf_jax.training.responses import first_of
from rlhf_jax.types import Params


def make_networks(
    config: PPOArgs,
    mesh: Mesh,
    policy: Loaded,
    reward: Loaded | None,
    key: jax.Array,
    teacher: Loaded | None = None,
) -> tuple[Networks, Params]:
    """(the networks, what is trained at its start) of policy, reward model and teacher; of an abstract key, shapes.

    Where a part of a model is trained, adapters or top layers, its frozen rest is shared: the policy stands on the
    reference, and the critic on that or on the reward model, of an ensemble the first. What is trained is a copy.
    """
    ppo = config.ppo
    policy = split_layers(policy, ppo.trainable_layers, mesh)
    ref, head = policy.params, None
    if reward is not None and not ppo.shared_trunk and ppo.value_init != "zeros":
        first, *others = members(reward)
        if first.model.own_adapters and (config.lora.rank or ppo.trainable_layers):
            what = f"lora.rank {config.lora.rank}" if config.lora.rank else f"trainable_layers {ppo.trainable_layers}"
            said = "the critic would stand on a reward model whose members have adapters"
            raise UserError(f"{what}: {said}; set ppo.value_init zeros, or ppo.shared_trunk true")
        first = split_layers(first, ppo.trainable_layers, mesh)
        weight, reward = config.reward.model_weight, together([first, *others])
        value, base, head = with_one_head(first, mesh, weight), "reward", partial(one_head, first.model, weight=weight)
    else:
        zeros = placed(mesh, lambda key: {"score": policy.model.init_score(key, zeros=True)}, key)["score"]
        scored = policy.model.with_score(policy.params, zeros)
        value = Loaded(replace(policy.model, score_head=True), scored, policy.base_config, path=policy.path)
        base = "ref"
    value = adapted(frozen_below(value), config.lora, mesh, key, "critic's adapters")
    policy = adapted(frozen_below(policy), config.lora, mesh, key)
    bases = {}
    if policy.frozen is not None:
        bases = {"policy": "ref"} if ppo.shared_trunk else {"policy": "ref", "value": base}
    judges = reward.model if reward else None, ppo.shared_trunk, teacher.model if teacher else None
    models = core.Models(policy.model, value.model, *judges, bases)
    frozen = {"ref": ref, "reward": reward.params if reward else None}
    critic = value if ppo.save_value_model else None
    teaches = teacher.params if teacher else None
    below = frozen if bases else None
    nets = Networks(models, policy, **frozen, frozen=below, critic=critic, teacher=teaches, critic_head=head)
    trained = {"score": value.params["score"]} if ppo.shared_trunk else value.params
    return nets, copied({"policy": policy.params, "value": trained})


def with_one_head(loaded: Loaded, mesh: Mesh, weight: float = 1.0) -> Loaded:
    """The reward model with `one_head`.

    Of members with adapters of their own it is the first of them.
    """
    model = loaded.model
    score = placed(mesh, lambda params: {"score": one_head(model, params, weight)}, loaded.params)
    if model.own_adapters:
        first = partial(merged_member, i=0, scale=model.lora_scale)
        loaded = replace(loaded, params=placed(mesh, first, loaded.params), model__lora_scale=1.0)
    return replace(loaded, model__members=0, model__own_adapters=False, params={**loaded.params, **score})


def one_head(model: Model, params: Params, weight: float) -> Params:
    """What pays `weight` times the score of a reward model, of several models the first, of several heads their mean.

    With a weight of 1 equal heads give that head to the bit.
    """
    score = first_of(params)["score"]
    if model.members:
        of_several = lambda x: x[0] if model.own_adapters else x[0] + (x - x[:1]).mean(axis=0)  # noqa: E731
        score = jax.tree.map(of_several, score)
    return jax.tree.map(lambda x: weight * x, score)


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
    return replace(loaded, params=placed(mesh, partial(loaded.model.split, top=top), loaded.params))


def frozen_below(loaded: Loaded) -> Loaded:
    """A model that `split_layers` cut, its embedding and lower layers frozen; any other as it is."""
    if "lower" not in loaded.params:
        return loaded
    frozen = {name: loaded.params[name] for name in ("embed", "lower")}
    return replace(loaded, params={n: t for n, t in loaded.params.items() if n not in frozen}, frozen=frozen)
