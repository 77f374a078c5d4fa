"""The compiled programs of an iteration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from rlhf_jax.config import OnlineArgs, OnlineConfig
from rlhf_jax.inference.generate import make_sampler
from rlhf_jax.models import Model
from rlhf_jax.online import core
from rlhf_jax.online.checks import filters
from rlhf_jax.online.networks import Networks
from rlhf_jax.sharding import Mesh, batch_sharding, replicated, rollout_mesh, tree_shardings
from rlhf_jax.training.state import Schedule, TrainState
from rlhf_jax.types import Params, Rollout


class Program(Protocol):
    """A jitted function."""

    def __call__(self, *args: Any) -> Any: ...

    def trace(self, *args: Any) -> Any:
        """As of a jitted function: what can be lowered, for arguments that may be ShapeDtypeStructs."""


@dataclass(frozen=True)
class Programs:
    """The compiled programs of an iteration.

    Attributes:
        rollout: (policy, tokens, mask, key, law) -> Rollout.
        score: (params, ref, reward, rollout, host rewards, kl_coef, temperature) -> (experience, kl_coef of the next
            iteration, metrics, numbers per row).
        update: (state, experience, key, temperature, ptx, frozen) -> (state, metrics); donates the state.
        average: (average, policy) -> the next average, which is donated.
        schedule: learning rate of the policy by iteration.
    """

    rollout: Program
    score: Program
    update: Program
    average: Callable[[Params, Params], Params]
    schedule: Schedule


def compile_programs(
    config: OnlineArgs,
    settings: OnlineConfig,
    nets: Networks[Any],
    state: TrainState,
    mesh: Mesh,
    stop_ids: tuple[int, ...],
    *,
    score: core.Score,
    update: core.Update,
    schedule: Schedule,
) -> Programs:
    """The sampler of a config, and a method's score and update, jitted over the mesh; `state` gives shapes alone."""
    sampler = make_sampler(nets.models.policy, config.sampling, () if settings.stop == "truncate" else stop_ids)

    def rollout(*args: Any) -> Rollout:
        drawn = sampler(*args)
        return drawn if settings.stop == "eos" else core.truncated(drawn, stop_ids, settings.truncate_after)

    rows, whole, sampling_mesh = batch_sharding(mesh), replicated(mesh), rollout_mesh(config.mesh, mesh)
    for params in (state.params["policy"], nets.ref):  # adapters may lack the heads that rollout_tensor must divide
        tree_shardings(sampling_mesh, params)
    rollout = jax.jit(rollout, out_shardings=rows)
    places = tree_shardings(mesh, state)
    return Programs(
        rollout=rollout if sampling_mesh is mesh else OnMesh(sampling_mesh, rollout),
        score=jax.jit(score, out_shardings=(rows, whole, whole, rows)),
        # To look for a NaN the update is run again, from the state before it.
        update=jax.jit(update, donate_argnums=() if config.faults.debug_nans else 0, out_shardings=(places, whole)),
        # Without out_shardings the average could come to lie elsewhere.
        average=jax.jit(
            partial(core.ema, decay=settings.ema_decay), donate_argnums=0, out_shardings=places.params["policy"]
        ),
        schedule=schedule,
    )


def recomputes(config: OnlineArgs, settings: OnlineConfig, policy: Model) -> bool:
    """Whether old log-probs are computed by a forward pass rather than taken from the sampler."""
    exact = policy.compute_dtype == jnp.float32 and not filters(config.sampling)
    return settings.old_logprobs == "recompute" or (settings.old_logprobs == "auto" and not exact)


class OnMesh:
    """A jitted function that is traced and run with another mesh than the rest."""

    def __init__(self, mesh: Mesh, function: Program):
        self.mesh, self.function = mesh, function

    def __call__(self, *args: Any) -> Any:
        with jax.set_mesh(self.mesh.grid):
            return self.function(*args)

    def trace(self, *args: Any) -> Any:
        """As of a jitted function."""
        with jax.set_mesh(self.mesh.grid):
            return self.function.trace(*args)
