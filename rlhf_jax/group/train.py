"""The stage of GRPO, RLOO and REINFORCE++: networks, text and rewards wired to the programs of `core`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from rlhf_jax.config import GroupArgs
from rlhf_jax.data.loading import Rows
from rlhf_jax.group import core
from rlhf_jax.group.checks import check, check_batches, settings_of
from rlhf_jax.inference.sampling import SamplingLaw
from rlhf_jax.keys import branch
from rlhf_jax.models.loading import Loaded, adapted
from rlhf_jax.online import loop
from rlhf_jax.online.iteration import LoopState, first_state
from rlhf_jax.online.method import Method, read_inputs
from rlhf_jax.online.networks import Networks, load_policy_and_reward
from rlhf_jax.online.programs import Programs, compile_programs, recomputes
from rlhf_jax.sharding import Mesh, copied, make_mesh, replicated
from rlhf_jax.training.state import TrainState, create_state
from rlhf_jax.types import GroupAdvantage, Params, PolicyLoss, RewardFn


def make_networks(
    config: GroupArgs, mesh: Mesh, policy: Loaded, reward: Loaded | None, key: jax.Array
) -> tuple[Networks[core.Models], Params]:
    """(the networks, what is trained at its start) of policy and reward model; of an abstract key, shapes.

    With a price of the KL the reference is the policy as it is now; with adapters, the frozen model that they stand
    on, which is there anyway.
    """
    policy = adapted(policy, config.lora, mesh, key)
    ref, params = policy.frozen, policy.params
    if ref is None and settings_of(config)[1].kl_coef:
        ref, params = params, copied(params)
    models = core.Models(policy.model, reward.model if reward else None, policy.frozen is not None)
    nets = Networks(models, policy, ref, reward.params if reward else None, policy.frozen)
    return nets, {"policy": params}


def make_programs(
    config: GroupArgs,
    nets: Networks[core.Models],
    params: Params,
    mesh: Mesh,
    stop_ids: tuple[int, ...],
    policy_loss: PolicyLoss | None = None,
    advantage: GroupAdvantage | None = None,
) -> tuple[Programs, TrainState]:
    """The sampler, score and update of `core`, and the first state; params, what is trained, is donated."""
    _, settings = settings_of(config)
    update, tx, schedule = core.make_group_step(nets.models, settings, config.optim, policy_loss)
    recompute = recomputes(config, settings, nets.models.policy)
    weight = config.reward.model_weight
    score = core.make_score(nets.models, settings, recompute=recompute, model_weight=weight, advantage=advantage)
    state = create_state(params, tx, mesh)
    parts = compile_programs(
        config, settings, nets, state, mesh, stop_ids, score=score, update=update, schedule=schedule
    )
    return parts, state


def setup(
    config: GroupArgs,
    *,
    rows: Rows | None = None,
    eval_rows: Rows | None = None,
    reward_functions: Sequence[RewardFn] | None = None,
    gold: RewardFn | None = None,
    policy_loss: PolicyLoss | None = None,
    advantage: GroupAdvantage | None = None,
) -> tuple[Method, LoopState]:
    """The method of a config, and what its loop carries at first; writes nothing."""
    check(config)
    _, settings = settings_of(config)
    mesh, size = make_mesh(config.mesh), settings.group_size
    check_batches(config, mesh)
    inputs = read_inputs(
        config, mesh, group_size=size, rows=rows, eval_rows=eval_rows, reward_functions=reward_functions, gold=gold
    )
    with jax.set_mesh(mesh.grid):
        key = branch(inputs.key, "weights")
        policy, reward = load_policy_and_reward(config, mesh, inputs.tokenizer, key)
        nets, params = make_networks(config, mesh, policy, reward, key)
        stop_ids = inputs.tokenizer.eos_ids
        programs, state = make_programs(config, nets, params, mesh, stop_ids, policy_loss, advantage)
        law = SamplingLaw.from_config(config.sampling, replicated(mesh))
        method = Method(config, settings, mesh, inputs, nets, programs, law, group_size=size)
        return method, first_state(method, state)


def run(config: GroupArgs, **overrides: Any) -> dict[str, Any]:
    """Train as configured and write the run directory; returns its summary. The config's class names the method.

    Keyword arguments replace what the config names: `rows`, `eval_rows` (lists of dicts), `reward_functions`, `gold`
    (Python functions), `policy_loss` and `advantage`.
    """
    return loop.run(settings_of(config)[0], config, setup, **overrides)
