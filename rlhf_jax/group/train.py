"""The stage of GRPO, RLOO, REINFORCE++ and distillation: networks and rewards wired to the programs of `core`."""

from __future__ import annotations

from functools import partial
from typing import Any, Unpack

import jax

from rlhf_jax.config import DistillArgs, GroupArgs, GroupConfig, GRPOArgs, ReinforcePPArgs, RLOOArgs, bind
from rlhf_jax.errors import UserError
from rlhf_jax.group import core
from rlhf_jax.models.loading import Loaded, adapted
from rlhf_jax.online import checks, loop
from rlhf_jax.online.iteration import LoopState, first_state
from rlhf_jax.online.method import Method, Sources, read_inputs
from rlhf_jax.online.networks import Networks, load_policy_and_reward, load_teacher
from rlhf_jax.online.programs import Programs, compile_programs
from rlhf_jax.runs.twin import in_buckets
from rlhf_jax.sharding import Mesh, copied, make_mesh
from rlhf_jax.training.state import TrainState
from rlhf_jax.types import GroupAdvantage, Params, PolicyLoss


def settings_of(config: GroupArgs) -> tuple[str, GroupConfig]:
    """The method, which is the name of its command and of its group of the config; and that group."""
    if isinstance(config, GRPOArgs):
        return "grpo", config.grpo
    if isinstance(config, RLOOArgs):
        return "rloo", config.rloo
    if isinstance(config, ReinforcePPArgs):
        return "reinforce_pp", config.reinforce_pp
    if isinstance(config, DistillArgs):
        return "distill", config.distill
    kinds = "a GRPOArgs, an RLOOArgs, a ReinforcePPArgs or a DistillArgs"
    raise UserError(f"{type(config).__name__} is of no method; give {kinds}")


def check(config: GroupArgs) -> None:
    """Raise a UserError for settings that contradict each other."""
    name, settings = settings_of(config)
    checks.check(config, settings, name)
    if name == "distill" and not config.reward.teacher:
        raise UserError("distill has no teacher; set reward.teacher to the directory of a language model")
    if config.data.batch_size % settings.group_size:
        raise UserError(
            f"data.batch_size {config.data.batch_size}, responses of an iteration, is not divisible by "
            f"{name}.group_size {settings.group_size}; change one of them"
        )
    if config.sampling.microbatch % settings.group_size:
        raise UserError(
            f"sampling.microbatch {config.sampling.microbatch} is not a multiple of {name}.group_size "
            f"{settings.group_size}, whose rows share a prompt; choose a multiple"
        )


def make_networks(
    config: GroupArgs,
    mesh: Mesh,
    policy: Loaded,
    reward: Loaded | None,
    key: jax.Array,
    teacher: Loaded | None = None,
) -> tuple[Networks, Params]:
    """(the networks, what is trained at its start) of policy, reward model and teacher; of an abstract key, shapes.

    With a price of the KL the reference is the policy as it is now; with adapters, the frozen model that they stand
    on, which is there anyway.
    """
    policy = adapted(policy, config.lora, mesh, key)
    ref, params = policy.frozen, policy.params
    if ref is None and settings_of(config)[1].kl_coef:
        ref, params = params, copied(params)
    judges = [each.model if each else None for each in (reward, teacher)]
    models = core.Models(policy.model, judges[0], policy.frozen is not None, judges[1])
    judges = [each.params if each else None for each in (reward, teacher)]
    nets = Networks(models, policy, ref, judges[0], policy.frozen, teacher=judges[1])
    return nets, {"policy": params}


def make_programs(
    config: GroupArgs,
    nets: Networks,
    params: Params,
    mesh: Mesh,
    stop_ids: tuple[int, ...],
    policy_loss: PolicyLoss | None = None,
    advantage: GroupAdvantage | None = None,
) -> tuple[Programs, TrainState]:
    """The sampler, score and update of `core`, and the first state; params, what is trained, is donated."""
    name, settings = settings_of(config)
    checks.check_losses(settings, name, policy_loss=policy_loss or settings.policy_loss)
    if config.reward.judge.named():
        compare = bind(advantage or settings.advantage, settings)
        checks.check_unanswered(compare, settings.group_size, f"{name}.advantage")
    training = core.make_group_step(nets.models, settings, config.optim, policy_loss)
    score = partial(core.make_score, nets.models, settings, advantage=advantage)
    return compile_programs(config, settings, nets, params, mesh, stop_ids, training, score)


def setup(
    config: GroupArgs,
    *,
    policy_loss: PolicyLoss | None = None,
    advantage: GroupAdvantage | None = None,
    **sources: Unpack[Sources],
) -> tuple[Method, LoopState]:
    """The method of a config, and what its loop carries at first; writes nothing."""
    check(config)
    name, settings = settings_of(config)
    mesh, size = make_mesh(config.mesh), settings.group_size
    checks.check_batches(config, settings, name, mesh)
    inputs = read_inputs(config, mesh, group_size=size, **sources)
    tokenizer = inputs.tokenizer
    with jax.set_mesh(mesh.grid):
        loaded = load_policy_and_reward(config, mesh, tokenizer, inputs.key)
        nets, params = make_networks(config, mesh, *loaded, load_teacher(config, mesh, tokenizer, inputs.key))
        programs, state = make_programs(config, nets, params, mesh, tokenizer.eos_ids, policy_loss, advantage)
        method = Method(config, settings, mesh, inputs, nets, programs, group_size=size, redraws=settings.redraws)
        return method, first_state(method, state)


@in_buckets
def run(config: GroupArgs, **overrides: Any) -> dict[str, Any]:
    """Train as configured and write the run directory; returns its summary. The config's class names the method.

    Keyword arguments replace what the config names: `rows`, `eval_rows` (lists of dicts), `reward_functions`, `gold`
    (Python functions), `policy_loss` and `advantage`.
    """
    return loop.run(settings_of(config)[0], config, setup, **overrides)
