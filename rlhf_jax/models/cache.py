"""What layers keep of the tokens that a model has read: keys and values by column, or a state of one size."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Float

from rlhf_jax.config import ArchConfig
from rlhf_jax.models.delta import Recurrent
from rlhf_jax.sharding import constrain, row_axes

Columns = tuple[Float[Array, "B K S N"], Float[Array, "B K S N"]]
"""Keys and values of one layer."""
Cache = Columns | Recurrent
"""Of one layer; that of a model is a list of these, of the layers that have keys and values of their own."""


def written(cache: Columns | None, index: Array | None, k: Array, v: Array) -> Columns:
    """Keys and values [B, K, T, N] in the cache [B, K, S, N], which is then attended to; themselves without one."""
    if cache is None or index is None:
        return k, v
    write = jax.lax.dynamic_update_slice_in_dim
    keys, values = (write(old, new.astype(old.dtype), index, axis=2) for old, new in zip(cache, (k, v), strict=True))
    return keys, values


def apart(cache: list[Cache]) -> tuple[list[Columns | None], list[Recurrent | None]]:
    """The layers with columns and those with a state, each list with None in the places of the other."""
    states = [entry if isinstance(entry, Recurrent) else None for entry in cache]
    return [None if isinstance(entry, Recurrent) else entry for entry in cache], states


def together(columns: list[Columns | None], states: list[Recurrent | None]) -> list[Cache]:
    """Undo `apart`."""
    pairs = zip(columns, states, strict=True)
    return [entry for pair in pairs for entry in pair if entry is not None]


def pinned(cache: Any, heads: str | None, key_heads: str | None) -> Any:
    """A cache, or part of one, with rows over the data axes, and heads, or those of states, over these."""

    def of(entry: Cache) -> Cache:
        if isinstance(entry, Recurrent):
            past = constrain(entry.past, row_axes(), None, key_heads, None)
            return Recurrent(past, constrain(entry.memory, row_axes(), key_heads, None, None, None))
        return jax.tree.map(lambda x: constrain(x, row_axes(), heads, None, None), entry)

    return jax.tree.map(of, cache, is_leaf=lambda entry: isinstance(entry, tuple))


def column_bytes(arch: ArchConfig, itemsize: int) -> int:
    """Of a token, all layers, with keys and values of so many bytes a number."""
    heads = [arch.heads_of(mixer) for mixer in arch.mixers if mixer not in ("delta", "queries", "full_queries")]
    return 2 * sum(count * width for count, width in heads) * itemsize


def state_bytes(arch: ArchConfig, itemsize: int) -> int:
    """Of a sequence, all layers, however long it is."""
    heads, key, value = arch.delta_value_heads, arch.delta_key_dim, arch.delta_value_dim
    channels = 2 * arch.delta_key_heads * key + heads * value
    past = (arch.delta_kernel - 1) * channels * itemsize
    return len(arch.delta_layers) * (past + 4 * heads * key * value)
