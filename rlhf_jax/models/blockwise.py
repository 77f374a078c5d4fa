"""Attention by blocks in plain XLA, for CPU: time follows what is seen, memory the length of a row.

A block of queries meets one block of keys after another, and pairs of blocks in which nothing is seen are left out:
what lies ahead, other segments, other branches, what is beyond a window. The softmax is put together on the way, and
the backward pass computes its weights anew (Dao et al. 2022, arXiv 2205.14135).

Shapes as in `attention.py`. A row has n blocks of SIZE columns, all B rows X = B n: queries [X, K, G, SIZE, N], keys
and values [X, K, SIZE, N], a mask [X n, SIZE, SIZE].
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

SIZE = 64
"""On two cores 128 takes 1.3 to 1.5 times as long, 32 as long or longer."""
LEAST = float(jnp.finfo(jnp.float32).min)
KERNEL_OUTPUT = "attention"
"""What a remat policy may keep of attention by blocks: its result and its log-sum-exp."""


def masked_scores(
    q: Float[Array, "B K G T N"], k: Float[Array, "B K S N"], mask: Bool[Array, "B T S"], softcap: float
) -> Float[Array, "B K G T S"]:
    """Scores in float32, soft-capped; those off the mask are the least there is."""
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = jnp.einsum("bkgtn,bksn->bkgts", q, k, precision=precision, preferred_element_type=jnp.float32)
    return jnp.where(mask[:, None, None], softcapped(scores, softcap), LEAST)


def softcapped(scores: Array, cap: float) -> Array:
    """cap * tanh(scores / cap); the scores themselves if the cap is 0."""
    return cap * jnp.tanh(scores / cap) if cap else scores


class Pairs(NamedTuple):
    """Blocks of queries and of keys, int32[X n] each: those in which something is seen first, the `used`, by query."""

    queries: Int[Array, " Xn"]
    keys: Int[Array, " Xn"]
    masks: Int[Array, " Xn"]
    used: Int[Array, ""]


def tiles_of(mask: Bool[Array, "B T T"]) -> Bool[Array, "B n n SIZE SIZE"]:
    """A mask by blocks; columns behind the last are seen by none."""
    pad = -mask.shape[1] % SIZE
    mask = jnp.pad(mask, ((0, 0), (0, pad), (0, pad)))
    return mask.reshape(len(mask), mask.shape[1] // SIZE, SIZE, -1, SIZE).swapaxes(2, 3)


def blockwise_attention(
    q: Float[Array, "B K G T N"],
    k: Float[Array, "B K T N"],
    v: Float[Array, "B K T N"],
    tiles: Bool[Array, "B n n SIZE SIZE"],
    sinks: Float[Array, "K G"] | None = None,
    *,
    softcap: float,
) -> Float[Array, "B K G T N"]:
    """`attention` with the mask of `tiles`, of queries that are scaled."""
    rows, number, length = len(q), tiles.shape[1], q.shape[3]

    def cut(x: Array) -> Array:
        """[B, ..., T, N] by blocks, zeros behind the last column."""
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, number * SIZE - length), (0, 0)])
        x = jnp.moveaxis(x.reshape(*x.shape[:-2], number, SIZE, x.shape[-1]), -3, 1)
        return x.reshape(rows * number, *x.shape[2:])

    seen = tiles.any((3, 4)).ravel()
    order = jnp.argsort(~seen, stable=True).astype(jnp.int32)  # tile (b n + i) n + j of queries i, keys j of row b
    queries = order // number
    pairs = Pairs(queries, queries // number * number + order % number, order, seen.sum(dtype=jnp.int32))
    least = jnp.full(q.shape[1:3], LEAST) if sinks is None else sinks.astype(jnp.float32)
    mixed = _mixed(softcap, cut(q), cut(k), cut(v), least, tiles.reshape(-1, SIZE, SIZE), pairs)
    by_row = jnp.moveaxis(mixed.reshape(rows, number, *mixed.shape[1:]), 1, 3)  # [B, K, G, n, SIZE, N]
    return by_row.reshape(*q.shape[:3], -1, q.shape[4])[:, :, :, :length]


def _at(x: Array, i: Array) -> Array:
    """Block i, [1, ...]."""
    return jax.lax.dynamic_slice_in_dim(x, i, 1)


def _put(x: Array, new: Array, i: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, new, i, 0)


def _product(letters: str, a: Array, b: Array) -> Array:
    """In float32, of numbers that are rounded to the second one's dtype."""
    precision = jax.lax.Precision.HIGHEST if b.dtype == jnp.float32 else None
    return jnp.einsum(letters, a.astype(b.dtype), b, precision=precision, preferred_element_type=jnp.float32)


def _forward(
    softcap: float, q: Array, k: Array, v: Array, sinks: Array, tiles: Array, pairs: Pairs
) -> tuple[Array, Array]:
    """The mixture of the values and the log-sum-exp of the scores [X, K, G, SIZE, 1]."""

    def add(pair: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        i, j = pairs.queries[pair], pairs.keys[pair]
        mixed, total, peak = (_at(x, i) for x in sums)
        scores = masked_scores(_at(q, i), _at(k, j), _at(tiles, pairs.masks[pair]), softcap)
        highest = jnp.maximum(peak, scores.max(axis=-1, keepdims=True))
        weights, kept = jnp.exp(scores - highest), jnp.exp(peak - highest)
        mixed = mixed * kept + _product("bkgts,bksn->bkgtn", weights, _at(v, j))
        new = (mixed, total * kept + weights.sum(axis=-1, keepdims=True), highest)
        return tuple(_put(x, y, i) for x, y in zip(sums, new, strict=True))

    # A sink is one more key without a value, before all others.
    peak = jnp.broadcast_to(sinks[None, :, :, None, None], (*q.shape[:-1], 1))
    total = jnp.where(peak > LEAST, 1.0, 0.0)
    mixed, total, peak = jax.lax.fori_loop(0, pairs.used, add, (jnp.zeros(q.shape, jnp.float32), total, peak))
    total = jnp.maximum(total, 1.0)  # it is 1 at least where anything is seen, and 0 in blocks that see nothing
    return (mixed / total).astype(q.dtype), peak + jnp.log(total)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed(softcap: float, q: Array, k: Array, v: Array, sinks: Array, tiles: Array, pairs: Pairs) -> Array:
    return _forward(softcap, q, k, v, sinks, tiles, pairs)[0]


def _kept(softcap: float, *args: Any) -> tuple[Array, Any]:
    out, log_sum = (checkpoint_name(x, KERNEL_OUTPUT) for x in _forward(softcap, *args))
    return out, (*args, out, log_sum)


def _backward(softcap: float, kept: Any, change: Array) -> tuple[Any, ...]:
    q, k, v, sinks, tiles, pairs, out, log_sum = kept
    # A weight is exp(score - log_sum), and log_sum moves with every score by its weight: what that changes.
    of_sum = -(change.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)

    def add(pair: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        i, j = pairs.queries[pair], pairs.keys[pair]
        ends = _at(log_sum, i)

        def parts(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
            weights = jnp.exp(masked_scores(q, k, _at(tiles, pairs.masks[pair]), softcap) - ends)
            return _product("bkgts,bksn->bkgtn", weights, v), weights.sum(axis=-1, keepdims=True)

        pull = jax.vjp(parts, _at(q, i), _at(k, j), _at(v, j))[1]
        new = pull((_at(change, i).astype(jnp.float32), _at(of_sum, i)))
        return tuple(_put(x, _at(x, at) + y, at) for x, y, at in zip(sums, new, (i, j, j), strict=True))

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    sums = jax.lax.fori_loop(0, pairs.used, add, zeros)
    of_sinks = (jnp.exp(sinks[None, :, :, None, None] - log_sum) * of_sum).sum((0, 3, 4))
    return *(x.astype(like.dtype) for x, like in zip(sums, (q, k, v), strict=True)), of_sinks, None, None


_mixed.defvjp(_kept, _backward)
