"""What training carries from step to step, and the optimiser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool

from rlhf_jax.config import OptimConfig
from rlhf_jax.errors import UserError
from rlhf_jax.sharding import Mesh, abstract, placed_shapes, tree_shardings
from rlhf_jax.types import Params

Schedule = Callable[[jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Step, parameters and optimiser state; the optimiser, the model and the config are closed over.

    Attributes:
        step: int32[], optimiser steps taken, skipped ones included.
        params: nested dict of arrays, float32 unless model.param_dtype says otherwise.
        opt_state: what the optax transformation keeps.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState

    @classmethod
    def create(cls, params: Params, tx: optax.GradientTransformation) -> TrainState:
        """A state at step 0; what the optimiser keeps is float32, whatever the parameters are."""
        return cls(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(in_float32(params)))


def in_float32(tree: Params) -> Params:
    """A tree's arrays in float32, in which all is added up: in bfloat16 a decay of 0.999 is 1, and 256 + 1 is 256."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def create_state(params: Params, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A sharded state at step 0; `params` may lie anywhere and are donated. Of ShapeDtypeStructs, its shapes alone."""
    create = partial(TrainState.create, tx=tx)
    shapes = jax.eval_shape(create, params)
    shardings = tree_shardings(mesh, shapes)
    if abstract(params):
        return placed_shapes(shapes, shardings)
    placed = jax.device_put(params, shardings.params)  # where they lie there already, this copies nothing
    return jax.jit(create, out_shardings=shardings, donate_argnums=0)(placed)


def make_schedule(config: OptimConfig, total: int) -> Schedule:
    """Learning rate at a count in [0, total): linear warm-up from 0, then constant, linear or cosine decay.

    Raises:
        UserError: the config names no learning rate; a stage's settings have one chosen.
    """
    if config.learning_rate is None:
        raise UserError("learning_rate is null, and only a stage's settings choose one; name it")
    peak, end = config.learning_rate, config.learning_rate * config.end_fraction
    warmup_steps = warmup_of(config, total)
    decay_steps = max(total - warmup_steps, 1)
    if config.schedule == "constant":
        main = optax.constant_schedule(peak)
    elif config.schedule == "linear":
        main = optax.linear_schedule(peak, end, decay_steps)
    else:
        main = optax.cosine_decay_schedule(peak, decay_steps, alpha=config.end_fraction)
    if not warmup_steps:
        return main
    # The first step of the warm-up already moves: counts 0, 1, 2 of 4 give 1/4, 2/4, 3/4.
    warmup = optax.linear_schedule(peak / warmup_steps, peak, max(warmup_steps - 1, 1))
    return optax.join_schedules([warmup, main], [warmup_steps])


def warmup_of(config: OptimConfig, total: int) -> int:
    """Steps of the warm-up of a run of `total` steps."""
    return config.warmup_steps or round(config.warmup_ratio * total)


AT_ONCE = 4096
"""Rates that are computed together."""


def learning_rates(schedule: Schedule) -> Callable[[int], float]:
    """The schedule at a count, on the host, for logging without a transfer per step: computed AT_ONCE counts a time,
    since a run that is to be ended by hand may have a thousand million steps.
    """
    some = jax.jit(lambda first: jax.vmap(schedule)(first + jnp.arange(AT_ONCE)))

    @lru_cache(maxsize=1)
    def block(number: int) -> list[float]:
        return jax.device_get(some(jax.device_put(np.int32(number * AT_ONCE)))).tolist()

    return lambda count: block(count // AT_ONCE)[count % AT_ONCE]


def decay_mask(params: Params) -> Params:
    """True for matrices; norms, biases, sinks, rates, gains and scalar heads are not decayed."""

    def is_matrix(path: jax.tree_util.KeyPath, _: object) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        odd = name.endswith(("bias", "sinks", "_rate", "_gain", "gain/scale"))
        return not (odd or "_norm" in name or "score" in name)

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def scale_by_adam_tf(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam with epsilon added to the uncorrected root: m sqrt(1 - b2^t) / (1 - b1^t) / (sqrt(v) + eps).

    As TensorFlow 1 has it; Kingma and Ba 2015, end of section 2 ("epsilon hat").
    """
    inner = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

    def update(
        updates: optax.Updates, state: optax.ScaleByAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        _, state = inner.update(updates, state, params)
        count = state.count.astype(jnp.float32)
        scale = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        return jax.tree.map(lambda m, v: scale * m / (jnp.sqrt(v) + eps), state.mu, state.nu), state

    return optax.GradientTransformation(inner.init, update)


def scale_by_learning_rate_of_step(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    """Multiply by -schedule(step) with the `step` that the train step hands over.

    A schedule that counts its own calls would lag after skipped updates and early-stopped epochs.
    """

    def update(
        updates: Params, state: optax.OptState, params: Params | None = None, *, step: jax.Array, **_: object
    ) -> tuple[Params, optax.OptState]:
        rate = schedule(step)
        return jax.tree.map(lambda u: -rate * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def moves(grads: Params) -> Bool[Array, ""]:
    """Whether any number of a gradient is not 0; the norm does not say it, since squares of 1e-22 are 0."""
    return jnp.stack([g.any() for g in jax.tree.leaves(grads)]).any()


def held_at_zero(inner: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """`inner`, but a gradient of 0 changes neither weights nor state, which momentum and weight decay would."""

    def update(grads: Params, state: optax.OptState, *args: Any, **more: Any) -> tuple[Params, optax.OptState]:
        there, as_it_was = moves(grads), (jax.tree.map(jnp.zeros_like, grads), state)
        made = inner.update(grads, state, *args, **more)
        return jax.tree.map(lambda new, old: jnp.where(there, new, old), made, as_it_was)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def make_optimizer(config: OptimConfig, schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    """Clip by global norm, Adam, decoupled weight decay of matrices, learning rate by step."""
    adam = scale_by_adam_tf if config.eps_form == "tensorflow" else optax.scale_by_adam
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    parts.append(adam(b1=config.b1, b2=config.b2, eps=config.eps))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=decay_mask))
    return optax.chain(*parts, scale_by_learning_rate_of_step(schedule))


@jax.jit
def _bits(tree: Params) -> jax.Array:
    def of(i: int, leaf: jax.Array) -> jax.Array:
        words = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32).reshape(-1)
        mixed = words + jnp.arange(words.size, dtype=jnp.uint32) * jnp.uint32(2654435761) + jnp.uint32(i)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # MurmurHash3's finaliser
            mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
        return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)

    return jnp.stack([of(i, leaf) for i, leaf in enumerate(jax.tree.leaves(tree))]).sum(dtype=jnp.uint32)


def digest(tree: Params) -> int | None:
    """A number that any change of the parameters would change but by a chance of 2**-32, the same on every mesh.

    None for no parameters. Sums modulo 2**32 are exact in any order.
    """
    return None if tree is None else int(_bits(tree))
