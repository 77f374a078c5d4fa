"""The compiled programs of an iteration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.stages import Wrapped
from jaxtyping import Array

from rlhf_jax.config import OnlineArgs, OnlineConfig, RewardSourceConfig
from rlhf_jax.inference.generate import make_sampler
from rlhf_jax.inference.sampling import SamplingLaw
from rlhf_jax.online import core, pool
from rlhf_jax.online.law import TrainedLaw
from rlhf_jax.online.networks import Networks
from rlhf_jax.sharding import Mesh, batch_sharding, replicated, rollout_mesh, tree_shardings
from rlhf_jax.training.state import Schedule, TrainState, create_state
from rlhf_jax.types import Params, Rollout

EXACT = {"xla_allow_excess_precision": False}
"""XLA may else leave out the rounding to bfloat16 between operations that it fuses, and no two programs fuse alike."""


@dataclass(frozen=True)
class Cut:
    """The compiled programs of `pool`.

    Attributes:
        go_on: (policy, pool, number, prompt, mask, key, law, samples) -> (pool, which rows have ended).
        take: (pool, rows) -> (Rollout of these, pool without them).
    """

    go_on: Wrapped | OnMesh
    take: Wrapped


@dataclass(frozen=True)
class Programs:
    """The compiled programs of an iteration.

    Attributes:
        rollout: (policy, tokens, mask, key, law, active=None, samples=1) -> Rollout, as `inference.sampling.sample`.
        cut: what a pool goes on with; None unless rows are cut.
        score: (params, ref, reward, rollout, host rewards, kl_coef, temperature, teacher=None) -> (experience, kl_coef
            of the next iteration, metrics, numbers per row).
        update: (state, experience, key, temperature, ptx, frozen) -> (state, metrics); donates the state.
        average: (average, policy) -> the next average, which is donated.
        schedule: learning rate of the policy by iteration.
    """

    rollout: Wrapped | OnMesh
    score: Wrapped
    update: Wrapped
    average: Callable[[Params, Params], Params]
    schedule: Schedule
    cut: Cut | None = None


def reward_settings(source: RewardSourceConfig) -> dict[str, Any]:
    """The settings of `core.rewards_of` that are of the `reward` group."""
    combining = {"combine": source.combine, "combine_coef": source.combine_coef, "model_weight": source.model_weight}
    of_teacher = {"teacher_divergence": source.teacher_divergence, "teacher_beta": source.teacher_beta}
    return {**combining, "teacher_coef": source.teacher_coef, **of_teacher}


def compile_programs(
    config: OnlineArgs,
    settings: OnlineConfig,
    nets: Networks,
    params: Params,
    mesh: Mesh,
    stop_ids: tuple[int, ...],
    training: core.Training,
    make_score: Callable[..., core.Score],
) -> tuple[Programs, TrainState]:
    """The sampler of a config and a method's score and update, jitted over the mesh, and the first state.

    `make_score` takes recompute, importance and settings of `core.rewards_of`. `params`, what is trained, is donated.
    """
    law = TrainedLaw.of(settings, config.sampling, nets.models.policy.compute_dtype)
    options = {"recompute": law.recompute, "importance": law.importance, **reward_settings(config.reward)}
    update, tx, schedule = training
    state = create_state(params, tx, mesh)
    stops = () if settings.stop == "truncate" else stop_ids
    sampler = make_sampler(nets.models.policy, config.sampling, stops, carry=True, routing=settings.replay_routing)

    def rollout(
        policy: Params,
        tokens: Array,
        mask: Array,
        key: Array,
        law: SamplingLaw,
        active: Array | None = None,
        samples: int = 1,
    ) -> Rollout:
        drawn = sampler(policy, tokens, mask, key, law, active, samples=samples)
        return drawn if settings.stop == "eos" else core.truncated(drawn, stop_ids, settings.truncate_after)

    rows, whole, sampling_mesh = batch_sharding(mesh), replicated(mesh), rollout_mesh(config.mesh, mesh)
    for tree in (state.params["policy"], nets.ref):  # adapters may lack the heads that rollout_tensor must divide
        tree_shardings(sampling_mesh, tree)
    # Sampler, scorer and update round where the code says, so that the same products come to the same bits in each.
    jitted = partial(jax.jit, compiler_options=EXACT)
    sampled = partial(jitted, out_shardings=rows, static_argnames="samples")
    on_mesh = (lambda x: x) if sampling_mesh is mesh else partial(OnMesh, sampling_mesh)
    cut = None
    if config.sampling.cut:
        go_on = partial(pool.go_on, partial(sampler, budget=config.sampling.cut))
        cut = Cut(on_mesh(sampled(go_on)), jax.jit(pool.take, out_shardings=rows))
    places = tree_shardings(mesh, state)
    programs = Programs(
        rollout=on_mesh(sampled(rollout)),
        score=jitted(make_score(**options), out_shardings=(rows, whole, whole, rows)),
        # To look for a NaN the update is run again, from the state before it.
        update=jitted(update, donate_argnums=() if config.faults.debug_nans else 0, out_shardings=(places, whole)),
        # Without out_shardings the average could come to lie elsewhere.
        average=jax.jit(
            partial(core.ema, decay=settings.ema_decay), donate_argnums=0, out_shardings=places.params["policy"]
        ),
        schedule=schedule,
        cut=cut,
    )
    return programs, state


class OnMesh:
    """A jitted function that is traced and run with another mesh than the rest."""

    def __init__(self, mesh: Mesh, function: Wrapped):
        self.mesh, self.function = mesh, function

    def __call__(self, *args: Any, **options: Any) -> Any:
        with jax.set_mesh(self.mesh.grid):
            return self.function(*args, **options)

    def trace(self, *args: Any, **options: Any) -> Any:
        """As of a jitted function."""
        with jax.set_mesh(self.mesh.grid):
            return self.function.trace(*args, **options)
