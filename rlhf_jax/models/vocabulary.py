"""The projection to the vocabulary: with the head's kernel, or with a tied embedding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.config import ArchConfig
from rlhf_jax.models.attention import softcapped
from rlhf_jax.models.decoder import times
from rlhf_jax.sharding import constrain, row_axes
from rlhf_jax.types import Params

MOST = 2 * 2**30
"""Bytes of a device that weights for each shard and their gradient may take, float32 both."""


def project(
    arch: ArchConfig, params: Params, hidden: Float[Array, "B T D"], over: str | None
) -> Float[Array, "B T V"]:
    """Logits in float32, their vocabulary over the mesh axis `over`; `params` of a model, or `for_each_shard`."""
    # [B, T, D] with [D, V], or with a tied embedding [V, D], [B, ...] each where every shard of rows has its own;
    # summed in float32 whatever the inputs are.
    precision = jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
    head = params.get("head", {})
    letters, kernel = ("dv", head["kernel"]) if "kernel" in head else ("vd", params["embed"]["tokens"])
    letters = f"btd,{'b' * (kernel.ndim - 2)}{letters}->btv"
    logits = jnp.einsum(
        letters, hidden, kernel.astype(hidden.dtype), precision=precision, preferred_element_type=jnp.float32
    )
    if "bias" in head:
        logits = logits + head["bias"].reshape(-1, 1, logits.shape[-1]).astype(jnp.float32)
    logits = softcapped(times(logits, arch.logit_multiplier), arch.logit_softcap)
    return constrain(logits, row_axes(), None, over)


def for_each_shard(params: Params, shards: int, over: str | None) -> Params:
    """What `project` reads of a model's parameters, once for each of W shards of rows: [W, D, V] or [W, V, D], [W, V].

    A loop over chunks of positions [W, C, D] has each of them multiplied where its rows lie: weights that lie over
    fsdp are gathered once, and their gradient is summed over the shards once, after the loop and not in each round.
    Where a device would need more than MOST for it, the parameters as they are.
    """
    head = params.get("head", {})
    kernel = head["kernel"] if "kernel" in head else params["embed"]["tokens"]
    if 8 * kernel.size > MOST * jax.sharding.get_abstract_mesh().shape.get(over, 1):
        return params

    def own(x: Array, *axes: str | None) -> Array:
        return constrain(jnp.broadcast_to(x, (shards, *x.shape)), row_axes(), *axes)

    axes = {"kernel": (None, over), "bias": (over,)}
    found: Params = {"head": {name: own(x, *axes[name]) for name, x in head.items()}}
    return found if "kernel" in head else {**found, "embed": {"tokens": own(params["embed"]["tokens"], over, None)}}
