"""The compiled programs of an iteration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.config import OnlineConfig
from rlhf_jax.inference.generate import make_sampler
from rlhf_jax.models import Model
from rlhf_jax.online import core
from rlhf_jax.online.checks import filters
from rlhf_jax.sharding import Mesh, batch_sharding, replicated, rollout_mesh, tree_shardings
from rlhf_jax.training.state import Schedule, TrainState
from rlhf_jax.types import Rollout


@dataclass(frozen=True)
class Programs:
    """The compiled programs of an iteration, and the state that it starts from.

    Attributes:
        rollout: (policy, tokens, mask, key, law) -> Rollout.
        score: (params, ref, reward, rollout, host rewards, kl_coef, temperature) -> (experience, kl_coef of the next
            iteration, metrics, numbers per row).
        update: (state, experience, key, temperature, ptx, frozen) -> (state, metrics); donates the state.
        state: the first one.
        schedule: learning rate of the policy by iteration.
    """

    rollout: Callable[..., Rollout]
    score: Callable[..., Any]
    update: Callable[..., Any]
    state: TrainState
    schedule: Schedule


def compile_programs(
    config: Any,
    settings: OnlineConfig,
    mesh: Mesh,
    policy: Model,
    stop_ids: tuple[int, ...],
    *,
    score: Callable[..., Any],
    update: Callable[..., Any],
    state: TrainState,
    schedule: Schedule,
) -> Programs:
    """The sampler of a config, and a method's score and update, jitted over the mesh."""
    sampler = make_sampler(policy, config.sampling, () if settings.stop == "truncate" else stop_ids)

    def rollout(*args: Any) -> Rollout:
        drawn = sampler(*args)
        return drawn if settings.stop == "eos" else core.truncated(drawn, stop_ids, settings.truncate_after)

    rows, whole, sampling_mesh = batch_sharding(mesh), replicated(mesh), rollout_mesh(config.mesh, mesh)
    tree_shardings(sampling_mesh, state.params["policy"])  # refuses heads that do not divide by rollout_tensor
    rollout = jax.jit(rollout, out_shardings=rows)
    return Programs(
        rollout=rollout if sampling_mesh is mesh else OnMesh(sampling_mesh, rollout),
        score=jax.jit(score, out_shardings=(rows, whole, whole, rows)),
        # To look for a NaN the update is run again, from the state before it.
        update=jax.jit(
            update,
            donate_argnums=() if config.faults.debug_nans else 0,
            out_shardings=(tree_shardings(mesh, state), whole),
        ),
        state=state,
        schedule=schedule,
    )


def recomputes(config: Any, settings: OnlineConfig, policy: Model) -> bool:
    """Whether old log-probs are computed by a forward pass rather than taken from the sampler."""
    exact = policy.compute_dtype == jnp.float32 and not filters(config.sampling)
    return settings.old_logprobs == "recompute" or (settings.old_logprobs == "auto" and not exact)


class OnMesh:
    """A jitted function that is traced and run with another mesh than the rest."""

    def __init__(self, mesh: Mesh, function: Any):
        self.mesh, self.function = mesh, function

    def __call__(self, *args: Any) -> Any:
        with jax.set_mesh(self.mesh.grid):
            return self.function(*args)

    def trace(self, *args: Any) -> Any:
        """As of a jitted function."""
        with jax.set_mesh(self.mesh.grid):
            return self.function.trace(*args)
