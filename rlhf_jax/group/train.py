"""The stage of GRPO, RLOO and REINFORCE++: networks, text and rewards wired to the programs of `core`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.config import GroupArgs, GroupConfig
from rlhf_jax.data.loading import Rows
from rlhf_jax.group import core
from rlhf_jax.group.checks import check, check_batches, settings_of
from rlhf_jax.keys import branch
from rlhf_jax.models.loading import Loaded, adapted, placed_init
from rlhf_jax.online import loop
from rlhf_jax.online.networks import load_policy_and_reward
from rlhf_jax.online.programs import Programs, compile_programs, recomputes
from rlhf_jax.online.stage import Online
from rlhf_jax.sharding import Mesh, make_mesh, rollout_mesh, tree_shardings
from rlhf_jax.training.state import create_state
from rlhf_jax.types import Params, PolicyLoss


@dataclass(frozen=True)
class Networks:
    """What the methods compute with; reference and reward parameters are frozen, params start the training state."""

    models: core.Models
    policy: Loaded
    params: Params
    ref: Params | None
    reward: Params | None

    @property
    def frozen(self) -> Params | None:
        """What trained adapters stand on; None where all of the policy is trained."""
        return self.policy.frozen


def assemble(
    settings: GroupConfig, policy: Loaded, reward: Loaded | None, *, copy: Callable[[Params], Params]
) -> Networks:
    """Policy and reward model, and with a price of the KL the policy as it is now for a reference.

    With adapters the reference is the frozen model that they stand on, which is there anyway.
    """
    ref = policy.frozen
    if ref is None and settings.kl_coef:
        ref = policy.params
    params = copy(policy.params) if ref is policy.params else policy.params
    models = core.Models(policy.model, reward.model if reward else None, policy.frozen is not None)
    return Networks(models, policy, {"policy": params}, ref, reward.params if reward else None)


def make_programs(
    config: GroupArgs, nets: Networks, mesh: Mesh, stop_ids: tuple[int, ...], policy_loss: PolicyLoss | None = None
) -> Programs:
    """The sampler, score and update of `core`, and the first state; nets.params is donated."""
    _, settings = settings_of(config)
    update, tx, schedule = core.make_group_step(nets.models, settings, config.optim, policy_loss)
    tree_shardings(rollout_mesh(config.mesh, mesh), nets.frozen)  # adapters may lack the heads that must divide
    recompute = recomputes(config, settings, nets.models.policy)
    return compile_programs(
        config,
        settings,
        mesh,
        nets.models.policy,
        stop_ids,
        score=core.make_score(nets.models, settings, recompute=recompute, model_weight=config.reward.model_weight),
        update=update,
        state=create_state(nets.params, tx, mesh),
        schedule=schedule,
    )


class Group(Online):
    """The parts of a method without a critic."""

    def __init__(
        self,
        config: GroupArgs,
        *,
        rows: Rows | None = None,
        eval_rows: Rows | None = None,
        reward_functions: Sequence[Callable[..., Any]] | None = None,
        gold: Callable[..., Any] | None = None,
        policy_loss: PolicyLoss | None = None,
    ):
        """Read the data, load the networks, build the programs; writes nothing."""
        check(config)
        _, settings = settings_of(config)
        mesh = make_mesh(config.mesh)
        check_batches(config, mesh)
        given: dict[str, Any] = {"rows": rows, "eval_rows": eval_rows, "reward_functions": reward_functions}
        super().__init__(config, settings, mesh, group_size=settings.group_size, gold=gold, **given)
        with jax.set_mesh(mesh.grid):
            key = branch(self.key, "weights")
            policy, reward = load_policy_and_reward(config, mesh, self.tokenizer, key, self.length)
            policy = adapted(policy, config.lora, placed_init(mesh, branch(key, "adapters")))
            nets = assemble(settings, policy, reward, copy=partial(jax.tree.map, jnp.copy))
            self.check_lengths(policy.model, nets.models.reward)
            self.start(nets, make_programs(config, nets, mesh, self.tokenizer.eos_ids, policy_loss))


def run(config: GroupArgs, **overrides: Any) -> dict[str, Any]:
    """Train as configured and write the run directory; returns its summary. The config's class names the method.

    Keyword arguments replace what the config names: `rows`, `eval_rows` (lists of dicts), `reward_functions`, `gold`
    (Python functions) and `policy_loss`.
    """
    return loop.run(settings_of(config)[0], config, Group, **overrides)
