"""The projection to the vocabulary: with the head's kernel, or with a tied embedding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.config import ArchConfig
from rlhf_jax.models.attention import softcapped
from rlhf_jax.models.norms import times
from rlhf_jax.sharding import constrain, row_axes
from rlhf_jax.tokens import Blocks
from rlhf_jax.types import Params

MOST = 2 * 2**30
"""Bytes of a device that weights for each shard and their gradient may take, float32 both."""


def project(
    arch: ArchConfig, params: Params, hidden: Float[Array, "B T D"], over: str | None
) -> Float[Array, "B T V"]:
    """Logits in float32, their vocabulary over the mesh axis `over`; `params` of a model, or of `blocks_of`."""
    # [B, T, D] with [D, V], or with a tied embedding [V, D], [B, ...] each where every shard of rows has its own;
    # summed in float32 whatever the inputs are.
    precision = jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
    head = params.get("head", {})
    letters, kernel = ("dv", head["kernel"]) if "kernel" in head else ("vd", params["embed"]["tokens"])
    product = partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    if letters == "vd" and kernel.ndim == 2 and hidden.shape[1] == 1:  # of all forms a CPU takes [V, B] the fastest
        logits = jax.lax.optimization_barrier(product("vd,btd->vbt", kernel.astype(hidden.dtype), hidden))
        logits = jnp.moveaxis(logits, 0, 2)
    else:
        logits = product(f"btd,{'b' * (kernel.ndim - 2)}{letters}->btv", hidden, kernel.astype(hidden.dtype))
    if "bias" in head:
        logits = logits + head["bias"].reshape(-1, 1, logits.shape[-1]).astype(jnp.float32)
    logits = softcapped(times(logits, arch.logit_multiplier), arch.logit_softcap)
    return constrain(logits, row_axes(), None, over)


def blocks_of(arch: ArchConfig, params: Params, shards: int, over: str | None) -> Blocks | None:
    """What `project` reads, once for each of W shards of rows, in as few blocks of the vocabulary as MOST allows.

    A loop over chunks of positions [W, C, D] has each of them multiplied where its rows lie: weights that lie over
    fsdp are gathered once for each block, and their gradient is summed over the shards once, after the loop and not
    in each round. A block has ids of every shard of the vocabulary. None where it cannot be cut.
    """
    head = params.get("head", {})
    read: Params = (
        {"head": head} if "kernel" in head else {"head": head, "embed": {"tokens": params["embed"]["tokens"]}}
    )
    # [D, V], [V, D] and [V]: the axis that is cut, of [parts, N, v] ids.
    axis, parts = {"kernel": 1, "tokens": 0, "bias": 0}, jax.sharding.get_abstract_mesh().shape.get(over, 1)
    least = -(-8 * max(x.size for x in jax.tree.leaves(read)) // (MOST * parts))
    number = next((n for n in range(least, 65) if arch.vocab_size % (n * parts) == 0), 0)
    if number == 0:
        return None
    width = arch.vocab_size // (number * parts)

    def cut(path: Any, x: Array) -> Array:
        before, after = x.shape[: axis[path[-1].key]], x.shape[axis[path[-1].key] + 1 :]
        by_block = jnp.moveaxis(x.reshape(*before, parts, number, width, *after), len(before) + 1, 0)
        return by_block.reshape(number, *before, -1, *after)

    def own(path: Any, x: Array) -> Array:
        axes = [over if i == axis[path[-1].key] else None for i in range(x.ndim)]
        return constrain(jnp.broadcast_to(x, (shards, *x.shape)), row_axes(), *axes)

    def projection(weights: Params) -> Callable[[Array], Array]:
        weights = jax.tree_util.tree_map_with_path(own, weights)
        return lambda hidden: project(arch, weights, hidden, over)

    return Blocks(jax.tree_util.tree_map_with_path(cut, read), width, projection)
