"""The projection to the vocabulary: with the head's kernel, or with a tied embedding."""

from __future__ import annotations

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

BLOCKS = CHUNKS = 8
"""Blocks are no more than these for the sake of larger chunks, and about as many chunks as these are left."""


def project(
    arch: ArchConfig, params: Params, hidden: Float[Array, "B T D"], over: str | None
) -> Float[Array, "B T V"]:
    """Logits in float32, their vocabulary over the mesh axis `over`; `params` of a model, or of `vocabulary_of`."""
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


def vocabulary_of(
    arch: ArchConfig, params: Params, positions: int, chunk: int, shards: int, over: str | None
) -> Blocks:
    """What `project` reads of W shards of rows with so many positions each.

    Of no more than a chunk, as it lies. A loop over chunks [W, C, D] has each of them multiplied where its rows lie:
    weights that lie over fsdp are gathered once for each block, and their gradient is summed over the shards once,
    after the loop and not in each round. There are as many blocks as MOST asks for, and up to BLOCKS where CHUNKS are
    left, each so many times longer: every chunk reads a block's weights and adds to their gradient. A block has ids of
    every shard of the vocabulary. One that cannot be cut is read as it lies.
    """
    head = params.get("head", {})
    read: Params = (
        {"head": head} if "kernel" in head else {"head": head, "embed": {"tokens": params["embed"]["tokens"]}}
    )
    # [D, V], [V, D] and [V]: the axis that is cut, of [parts, N, v] ids.
    axis, parts = {"kernel": 1, "tokens": 0, "bias": 0}, jax.sharding.get_abstract_mesh().shape.get(over, 1)
    least = -(-8 * max(x.size for x in jax.tree.leaves(read)) // (MOST * parts))
    most = max(least, min(BLOCKS, -(-positions // (CHUNKS * chunk))))
    divide = [n for n in range(least, 65) if arch.vocab_size % (n * parts) == 0]
    number = max((n for n in divide if n <= most), default=divide[0] if divide else 0)
    if positions <= chunk or number == 0:
        whole = jax.tree.map(lambda x: x[None], read)
        return Blocks(whole, lambda weights, hidden: project(arch, weights, hidden, over))
    width = arch.vocab_size // (number * parts)

    def cut(path: Any, x: Array) -> Array:
        before, after = x.shape[: axis[path[-1].key]], x.shape[axis[path[-1].key] + 1 :]
        by_block = jnp.moveaxis(x.reshape(*before, parts, number, width, *after), len(before) + 1, 0)
        return by_block.reshape(number, *before, -1, *after)

    def spread(weights: Params, dtype: Any) -> Params:
        def own(path: Any, x: Array) -> Array:
            name = path[-1].key
            axes = [over if i == axis[name] else None for i in range(x.ndim)]
            x = x if name == "bias" else x.astype(dtype)  # a bias is added to float32
            return constrain(jnp.broadcast_to(x, (shards, *x.shape)), row_axes(), *axes)

        return jax.tree_util.tree_map_with_path(own, weights)

    return Blocks(
        jax.tree_util.tree_map_with_path(cut, read),
        lambda weights, hidden: project(arch, weights, hidden, over),
        number,
        width,
        spread,
    )
