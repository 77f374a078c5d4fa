"""Products of rows with the kernels of their experts, which cost what the rows cost.

Shapes as in `experts.py`. Rows are (token, expert) pairs. They lie sorted by expert, each expert's in whole blocks of
b rows.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.models.kernels import Adapted, ExpertKernel, Split, dense, einsum

LARGEST_BLOCK = 512
PADDING = 8
"""Blocks are so small that those that are not full add at most an eighth to the rows."""
COUNTED = 128
"""Keys that are compared with each other where places are counted."""
FEW = 64
"""So many tokens go to all experts, if these are fewer than the pairs: it is reading the weights that costs."""


class Places(NamedTuple):
    """Where rows lie: in `blocks` of `size` rows, each of one expert.

    Attributes:
        source: the (token, choice) pair of every place, n * k where there is none.
        place: the place of every pair, that of no row where its expert is E.
        owner: the expert of every block; None where all experts have one, in turn.
        counts: places of every expert, whole blocks.
    """

    source: Int[Array, " R"]
    place: Int[Array, "n k"]
    owner: Int[Array, " blocks"] | None
    counts: Int[Array, " E"]

    @classmethod
    def of(cls, chosen: Int[Array, "n k"], experts: int) -> Places:
        """Of the experts of every token; a pair with expert E = `experts` has no place."""
        ids, pairs = chosen.reshape(-1), chosen.size
        if len(chosen) <= FEW and pairs > experts:
            return cls._of_few(chosen, experts)
        size = block_size(pairs, experts)
        blocks = (pairs + experts * (size - 1)) // size
        # Pairs in order of their experts; the first pair and the first place of each expert.
        order, rank, real, first = by_key(ids, experts)
        counts = -(-real // size) * size
        start = jnp.cumsum(counts) - counts
        # Every place's pair, and every pair's place.
        ends_before = jnp.cumsum(counts)[None] <= size * jnp.arange(blocks)[:, None]  # [blocks, E]
        owner = jnp.minimum(ends_before.sum(1, dtype=jnp.int32), experts - 1)
        of_place = jnp.repeat(owner, size)
        within = jnp.arange(blocks * size, dtype=jnp.int32) - start[of_place]
        source = order[jnp.minimum(first[of_place] + within, pairs - 1)]
        source = jnp.where(within < real[of_place], source, pairs)
        own = jnp.minimum(ids, experts - 1)
        place = jnp.where(ids < experts, start[own] + rank - first[own], blocks * size)
        return cls(source, place.reshape(chosen.shape), owner, counts)

    @classmethod
    def _of_few(cls, chosen: Int[Array, "n k"], experts: int) -> Places:
        """A block of all tokens for every expert, in which those that others have are empty."""
        tokens, rows = len(chosen), len(chosen) * experts
        place = chosen * tokens + jnp.arange(tokens, dtype=chosen.dtype)[:, None]
        place = jnp.where(chosen < experts, place, rows)
        pairs = jnp.arange(chosen.size, dtype=jnp.int32)
        source = jnp.full(rows, chosen.size, jnp.int32).at[place.reshape(-1)].set(pairs, mode="drop")
        return cls(source, place, None, jnp.full(experts, tokens, jnp.int32))

    def of_blocks(self, values: Array) -> Array:
        """Of [E, ...] what the owner of every block has, [blocks, ...]."""
        return values if self.owner is None else values[self.owner]


def by_key(
    keys: Int[Array, " n"], count: int
) -> tuple[Int[Array, " n"], Int[Array, " n"], Int[Array, " g"], Int[Array, " g"]]:
    """In the order of keys, with equal ones as they were: which are in turn, and the place of each.

    And of each of `count` keys, how many there are and the place of the first; larger keys come last. Nothing is
    sorted: a sort of 53,280 keys takes TPU's compiler 12.5 s, this 1.4.
    """
    n = len(keys)
    blocks = jnp.minimum(jnp.pad(keys, (0, -n % COUNTED), constant_values=count), count).reshape(-1, COUNTED)
    # Of every block [m] how many of each key there are, and where the first of them goes.
    hot = blocks[:, :, None] == jnp.arange(count + 1)[None, None]
    counts = hot.sum(1, dtype=jnp.int32)
    total = counts.sum(0)
    first = jnp.cumsum(total) - total
    start = first[None] + jnp.cumsum(counts, axis=0) - counts
    # Before a key stand those of earlier blocks and the equal ones to its left.
    left = jnp.arange(COUNTED)[:, None] > jnp.arange(COUNTED)[None]
    rank = ((blocks[:, :, None] == blocks[:, None]) & left[None]).sum(2, dtype=jnp.int32)
    place = (jnp.where(hot, start[:, None], 0).sum(2, dtype=jnp.int32) + rank).reshape(-1)[:n]
    order = jnp.zeros_like(place).at[place].set(jnp.arange(n, dtype=place.dtype), unique_indices=True)
    return order, place, total[:count], first[:count]


def block_size(pairs: int, experts: int) -> int:
    """Rows of a block: the largest power of two of which `experts` blocks are at most an eighth of the pairs."""
    return min(1 << max((pairs // (PADDING * experts)).bit_length() - 1, 0), LARGEST_BLOCK)


@jax.custom_vjp
def spread(x: Float[Array, "n D"], places: Places) -> Float[Array, "R D"]:
    """Every place with its token; any where there is none. Its gradient is a gather, too.

    Nothing is cleared that nobody reads: on TPU that would be one more pass over all rows.
    """
    return x.at[places.source // places.place.shape[1]].get(mode="clip")


@jax.custom_vjp
def collect(y: Float[Array, "R D"], places: Places) -> Float[Array, "n k D"]:
    """The rows of every token, anything for pairs without a place: the transpose of `spread`, but for a sum over k.

    The gradient is 0 in places without a pair, which `spread` does not clear: weights add up over whole blocks.
    """
    return y.at[places.place].get(mode="clip")


def _spread_gradient(places: Places, grad: Array) -> tuple[Array, None]:
    return grad.at[places.place].get(mode="fill", fill_value=0).sum(1), None


def _collect_gradient(places: Places, grad: Array) -> tuple[Array, None]:
    return grad.reshape(-1, grad.shape[-1]).at[places.source].get(mode="fill", fill_value=0), None


spread.defvjp(lambda x, places: (spread(x, places), places), _spread_gradient)
collect.defvjp(lambda y, places: (collect(y, places), places), _collect_gradient)


def grouped(x: Float[Array, "R D"], kernel: ExpertKernel, places: Places) -> list[Float[Array, "R F"]]:
    """Every row times the kernel of its expert, [E, D, M, F] or [E, D, F]: M products, or one.

    On TPU by `jax.lax.ragged_dot`, its own kernel for this, and elsewhere block by block: XLA lowers ragged_dot on CPU
    and GPU to products with all E experts.
    """
    if isinstance(kernel, Split):
        return [y for part in kernel.parts for y in grouped(x, part, places)]
    if isinstance(kernel, Adapted):
        (low,) = grouped(x, kernel.a, places)
        both = grouped(x, kernel.kernel, places), grouped(kernel.scale * low, kernel.b, places)
        return [whole + change for whole, change in zip(*both, strict=True)]
    weight = dense(kernel).astype(x.dtype)
    weight = weight.reshape(*weight.shape[:2], -1, weight.shape[-1])
    if x.dtype == jnp.float32:  # in full precision, which TPU kernels do not have
        return by_blocks(x, weight, places)
    return jax.lax.platform_dependent(x, weight, places, tpu=by_parts, default=by_blocks)


def by_blocks(x: Float[Array, "R D"], weight: Float[Array, "E D M F"], places: Places) -> list[Float[Array, "R F"]]:
    """A batched product of blocks with the weights of their owners."""
    weights = places.of_blocks(weight.reshape(*weight.shape[:2], -1))
    blocks = x.reshape(len(weights), -1, x.shape[1])
    return jnp.split(einsum("rbd,rdf->rbf", blocks, weights).reshape(len(x), -1), weight.shape[2], axis=-1)


def by_parts(x: Float[Array, "R D"], weight: Float[Array, "E D M F"], places: Places) -> list[Float[Array, "R F"]]:
    """The same by a kernel for each part: M and F are what a TPU has in tiles, and making one axis of them copies all
    weights by a program that takes the compiler minutes."""
    return [by_ragged_dot(x, weight[:, :, m], places) for m in range(weight.shape[2])]


@jax.custom_vjp
def by_ragged_dot(x: Float[Array, "R D"], weight: Float[Array, "E D F"], places: Places) -> Float[Array, "R F"]:
    """The same by one kernel; the gradient of the weights by megablox's, since ragged_dot's multiplies with all E."""
    return jax.lax.ragged_dot(x, weight, places.counts)


def _ragged_gradients(kept: tuple[Array, Array, Places], grad: Array) -> tuple[Array, Array, None]:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    x, weight, places = kept
    tile = 512 if len(x) >= 512 else -(-len(x) // 8) * 8
    padded = [jnp.pad(a, ((0, -len(x) % tile), (0, 0))) for a in (x, grad)]
    tiling = (tile, min(512, x.shape[1]), min(512, grad.shape[1]))
    of_weight = tgmm(padded[0].T, padded[1], places.counts, weight.dtype, tiling)
    return jax.lax.ragged_dot(grad, weight.swapaxes(1, 2), places.counts), of_weight, None


by_ragged_dot.defvjp(lambda *args: (by_ragged_dot(*args), args), _ragged_gradients)
