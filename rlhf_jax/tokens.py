"""Masks, positions, weights, packed rows, and log-probs of chosen tokens without the whole of the logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

Tree = TypeVar("Tree")
OUT = -1e30
"""A logit of what cannot be drawn: finite, since its product with a probability of 0 has gradients."""


def positions_from_mask(mask: Bool[Array, "*B S"]) -> Int[Array, "*B S"]:
    """Position ids: the exclusive cumulative sum of the mask, 0 on padding.

    A left-padded row with mask [0, 0, 1, 1, 1] gets [0, 0, 0, 1, 2].
    """
    counts = jnp.cumsum(mask, axis=-1, dtype=jnp.int32)
    return jnp.where(mask, counts - 1, 0)


def sees(segments: Int[Array, "*B T"], branches: Int[Array, "*B T"] | None = None) -> Bool[Array, "*B T T"]:
    """Which tokens [., d] each [c] sees: itself and what is before it in its own segment.

    With branches, of these what is of its own branch or of 0, which all share.
    """
    size = segments.shape[-1]
    causal = jnp.tri(size, dtype=bool).reshape((1,) * (segments.ndim - 1) + (size, size))
    seen = causal & (segments[..., :, None] == segments[..., None, :])
    if branches is None:
        return seen
    return seen & ((branches[..., None, :] == 0) | (branches[..., None, :] == branches[..., :, None]))


def token_weights(mask: Bool[Array, "B T"], reduction: str) -> Float[Array, "B T"]:
    """Weights that make `sum(weights * token_loss)` a mean over the optimiser batch; zero off the mask.

    token: every valid token weighs the same. sequence: every row with a valid token weighs the same, its tokens
    share that. fixed: every token weighs 1 / (B T), however few are valid (Liu et al. 2025, arXiv 2503.20783).
    """
    valid = mask.astype(jnp.float32)
    if reduction == "token":
        return valid / jnp.maximum(valid.sum(), 1.0)
    if reduction == "sequence":
        per_row = valid.sum(axis=-1, keepdims=True)
        rows = jnp.maximum((per_row > 0).astype(jnp.float32).sum(), 1.0)
        return valid / jnp.maximum(per_row, 1.0) / rows
    if reduction == "fixed":
        return valid / mask.size
    raise ValueError(f"unknown reduction {reduction!r}; use token, sequence or fixed")


@jax.custom_vjp
def _permuted(x: Array, order: Int[Array, "W N"], place: Int[Array, "W N"]) -> Array:
    """x[w, order[w]] of x [W, N, ...]; `place` is the inverse, which makes the gradient a gather, too."""
    return jax.vmap(lambda x, order: x[order])(x, order)


_permuted.defvjp(
    lambda x, order, place: (_permuted(x, order, place), (order, place)),
    lambda kept, grad: (_permuted(grad, kept[1], kept[0]), None, None),
)


@dataclass(frozen=True)
class Blocks:
    """A vocabulary that is projected one block after another, so that the weights of a block alone are gathered.

    Attributes:
        weights: a tree of arrays [N, ...], those of block i at i.
        project: (spread weights of a block, hidden [W, C, D]) -> logits [W, C, V / N].
        number: N; 1 is the vocabulary as it lies.
        width: v. Block i has of every N v ids those from i v to (i + 1) v, one after another.
        spread: (weights of a block, a dtype) -> these in that dtype, as the shards of rows read them; linear.
    """

    weights: Any
    project: Callable[[Any, Array], Array]
    number: int = 1
    width: int = 1
    spread: Callable[[Any, Any], Any] = lambda weights, dtype: weights

    def find(self, block: Array | int, ids: Array) -> tuple[Array, Array]:
        """(the place of each id in a block, whether it is there)."""
        which, rest = ids // self.width, ids % self.width
        return which // self.number * self.width + rest, (ids >= 0) & (which % self.number == block)

    def at(
        self, block: Array | int, values: Float[Array, "W C v"], ids: Int[Array, "W C K"], other: float
    ) -> Float[Array, "W C K"]:
        """What a block says of ids, `other` of those that it has not."""
        place, there = self.find(block, ids)
        return jnp.where(there, jnp.take_along_axis(values, jnp.maximum(place, 0), axis=-1), other)

    def scaled(self, block: Array | int, logits: Array, temperature: Array, kept: Array | None) -> Array:
        """z [W, C, v or K]: logits over the temperature, of the ids that a block has, or of those that are kept."""
        z = logits.astype(jnp.float32) / temperature
        return z if kept is None else self.at(block, z, kept, OUT)


class _Told(NamedTuple):
    """Of z at each position: the target's (of a block 0 if another has it), logsumexp, the mean (0 if not asked)."""

    chosen: Float[Array, "*N W C"]
    log_sum: Float[Array, "*N W C"]
    mean: Float[Array, "*N W C"]


def _told(
    blocks: Blocks, with_entropy: bool, block: Array | int, logits: Array, temperature: Array, ids: tuple[Any, Any]
) -> _Told:
    """What a block tells of (targets [W, C], kept [W, C, K] or None)."""
    targets, kept = ids
    z = blocks.scaled(block, logits, temperature, None)
    chosen = blocks.at(block, z, targets[..., None], 0.0)[..., 0]
    z = z if kept is None else blocks.at(block, z, kept, OUT)
    log_sum = jax.nn.logsumexp(z, axis=-1)
    if not with_entropy:
        return _Told(chosen, log_sum, jnp.zeros_like(chosen))
    # As a product, which a CPU computes in a tenth of the time of a sum over products.
    probs = jnp.exp(z - log_sum[..., None])
    return _Told(chosen, log_sum, jnp.einsum("wcv,wcv->wc", probs, z, precision=jax.lax.Precision.HIGHEST))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_chunks(
    blocks: Blocks, with_entropy: bool, weights: Any, temperature: Array, hidden: Array, some: Array, ids: Any
) -> _Told:
    """What is told of chunks [A, W, C, ...], those without `some` [A] that is needed skipped, block by block."""

    def of_block(block: tuple[Array, Any]) -> _Told:
        number, weights = block
        spread = blocks.spread(weights, hidden.dtype)

        def of_chunk(chunk: Any) -> _Told:
            some, hidden, ids = chunk
            told = lambda: _told(blocks, with_entropy, number, blocks.project(spread, hidden), temperature, ids)  # noqa: E731
            return jax.lax.cond(some, told, lambda: _Told(*(jnp.zeros(hidden.shape[:2]),) * 3))

        return jax.lax.map(of_chunk, (some, hidden, ids))

    # Each [N, A, W, C]; the logarithm of a sum of exponentials is that of the blocks' sums.
    of = jax.lax.map(of_block, (jnp.arange(blocks.number), weights))
    log_sum = jax.nn.logsumexp(of.log_sum, axis=0)
    return _Told(of.chosen.sum(0), log_sum, jnp.sum(jnp.exp(of.log_sum - log_sum[None]) * of.mean, axis=0))


def _forward(blocks: Blocks, with_entropy: bool, *inputs: Any) -> tuple[_Told, Any]:
    frozen = not any(x.perturbed for x in jax.tree.leaves(inputs[0]))
    inputs = jax.tree.map(lambda x: x.value, inputs)
    told = _in_chunks(blocks, with_entropy, *inputs)
    return told, (*inputs, told, () if frozen else None)  # a static answer is kept as a tree without arrays


def _backward(blocks: Blocks, with_entropy: bool, residuals: Any, grads: _Told) -> tuple[Any, ...]:
    """Logits are computed once more; softmax is exp(z - logsumexp), so nothing is summed over the vocabulary again.

    Frozen weights have no gradient: the sum that a loop carries is kept by XLA though nobody reads it.
    """
    weights, temperature, hidden, some, ids, told, frozen = residuals
    frozen = frozen is not None
    grads = _Told(*(jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x for x in grads))
    add = partial(jax.tree.map, lambda total, x: total + x.astype(jnp.float32))
    zeros = partial(jax.tree.map, lambda x: jnp.zeros(x.shape, jnp.float32))

    def by_z(block: Array, z: Array, ids: Any, told: _Told, grads: _Told) -> Array:
        (targets, kept), (by_chosen, by_log_sum, by_mean) = ids, (x[..., None] for x in grads)
        slope = by_log_sum + by_mean * (1 + z - told.mean[..., None]) if with_entropy else by_log_sum
        place, there = blocks.find(block, targets[..., None] if kept is None else kept)
        columns = jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1)
        is_target = there & ((columns == place) if kept is None else (kept == targets[..., None]))
        return jnp.exp(z - told.log_sum[..., None]) * slope + jnp.where(is_target, by_chosen, 0.0)

    def of_block(carry: Any, block: tuple[Array, Any]) -> tuple[Any, Any]:
        (by_hidden, by_temperature), (number, weights) = carry, block
        spread = blocks.spread(weights, hidden.dtype)

        def of_chunk(carry: Any, chunk: Any) -> tuple[Any, Array]:
            some, hidden, ids, told, grads, by_hidden = chunk

            def more() -> tuple[Any, Array]:
                project = (lambda _, hidden: blocks.project(spread, hidden)) if frozen else blocks.project
                logits, by_logits = jax.vjp(project, None if frozen else spread, hidden)
                z, by_scaled = jax.vjp(lambda x, t: blocks.scaled(number, x, t, ids[1]), logits, temperature)
                of_logits, of_temperature = by_scaled(by_z(number, z, ids, told, grads))
                # Stored in the dtype of the products that read it, which would round it anyway.
                of_spread, of_hidden = by_logits(of_logits.astype(hidden.dtype).astype(logits.dtype))
                return add(carry, (of_spread, of_temperature)), add(by_hidden, of_hidden)

            return jax.lax.cond(some, more, lambda: (carry, by_hidden))

        chunks = some, hidden, ids, told, grads, by_hidden
        start = None if frozen else zeros(spread), by_temperature
        (by_spread, by_temperature), by_hidden = jax.lax.scan(of_chunk, start, chunks)
        if frozen:
            return (by_hidden, by_temperature), None
        by_weights = jax.vjp(lambda weights: blocks.spread(weights, jnp.float32), weights)[1](by_spread)[0]
        return (by_hidden, by_temperature), by_weights

    first, numbered = (zeros(hidden), zeros(temperature)), (jnp.arange(blocks.number), weights)
    (by_hidden, by_temperature), by_weights = jax.lax.scan(of_block, first, numbered)
    return by_weights, by_temperature, by_hidden.astype(hidden.dtype), None, None


_in_chunks.defvjp(_forward, _backward, symbolic_zeros=True)


def token_logprobs(
    vocabulary: Blocks,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    temperature: Float[Array, ""] | float,
    *,
    chunk: int,
    needed: Bool[Array, "B T"] | None = None,
    kept: Int[Array, "B T K"] | None = None,
    shards: int = 1,
    with_entropy: bool = False,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probs (nats) of `targets` under softmax(logits / temperature), and the entropy if asked (else 0).

    log p = z_target - logsumexp(z), float32. `hidden[:, t]` predicts `targets[:, t]`; both results are 0 off `needed`
    (None: all are). Where ids are `kept`, of up to K tokens a position and -1 in the places of none, the law is that
    of these tokens alone, renormalised, and the target is one of them.

    The B T positions lie in W = `shards` blocks of whole rows, as rows lie on a mesh, and the logits of at most
    `chunk` positions of such a block, and of one block of the vocabulary, are alive at once, in the backward pass too,
    which computes them again. Where there are more, they run in chunks, the needed ones first, and a chunk without any
    is skipped. A vocabulary in one block whose positions are one chunk is a plain product.
    """
    shape, count = targets.shape, targets.size // shards
    num, temperature = -(-count // chunk), jnp.asarray(temperature, jnp.float32)
    needed = jnp.ones(shape, bool) if needed is None else needed
    if num == vocabulary.number == 1:
        weights = jax.tree.map(lambda x: x[0], vocabulary.weights)
        logits = vocabulary.project(vocabulary.spread(weights, hidden.dtype), hidden)
        told = _told(vocabulary, with_entropy, 0, logits, temperature, (targets, kept))
    else:
        # Where each position [W, B T / W] goes: the needed ones keep their order at the front, the others theirs.
        pad = ((0, 0), (0, -count % num))
        front = jnp.pad(needed.reshape(shards, -1), pad)
        before = jnp.cumsum(front, axis=1, dtype=jnp.int32)
        place = jnp.where(front, before, before[:, -1:] + jnp.cumsum(~front, axis=1, dtype=jnp.int32)) - 1
        order = jnp.argsort(place, axis=1)

        def cut(x: Array) -> Array:  # [B, T, ...] -> [A, W, C, ...]
            x = jnp.pad(x.reshape(shards, count, *x.shape[2:]), (*pad, *((0, 0),) * (x.ndim - 2)))
            return _permuted(x, order, place).reshape(shards, num, -1, *x.shape[2:]).swapaxes(0, 1)

        ids = cut(targets), None if kept is None else cut(kept)
        static, some = dataclasses.replace(vocabulary, weights=None), cut(needed).any(axis=(1, 2))
        told = _in_chunks(static, with_entropy, vocabulary.weights, temperature, cut(hidden), some, ids)
        back = lambda x: _permuted(x.swapaxes(0, 1).reshape(shards, -1), place, order)[:, :count]  # noqa: E731
        told = jax.tree.map(lambda x: back(x).reshape(shape), told)
    entropy = told.log_sum - told.mean if with_entropy else jnp.zeros_like(told.mean)
    return jnp.where(needed, told.chosen - told.log_sum, 0.0), jnp.where(needed, entropy, 0.0)


def to_microbatches(tree: Tree, num: int) -> Tree:
    """Every leaf [B, ...] as [num, B / num, ...], row i in microbatch i % num.

    This order leaves every device its own rows; reshape(num, -1) would insert an all-gather of the batch.
    """
    return jax.tree.map(lambda x: x.reshape(-1, num, *x.shape[1:]).swapaxes(0, 1), tree)


def from_microbatches(tree: Tree) -> Tree:
    """Undo `to_microbatches`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def map_microbatches(fn: Callable[[Any], Any], batch: Any, rows: int) -> Any:
    """fn over microbatches of `rows` rows, one after another, as if over the whole batch; rows = 0 means all at once.

    Raises:
        ValueError: the batch is not a multiple of `rows`.
    """
    total = jax.tree.leaves(batch)[0].shape[0]
    if rows in (0, total):
        return fn(batch)
    if total % rows:
        raise ValueError(f"batch of {total} rows is not a multiple of the microbatch {rows}; choose a divisor")
    return from_microbatches(jax.lax.map(fn, to_microbatches(batch, total // rows)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed:
    """Rows, each a prompt and a response, side by side in sequences of one length: what a network reads.

    Arrays are [M, N, S]: M sequences of S columns in each of N microbatches, of which those that hold anything come
    first. `at(i)` is microbatch i, a view [M, S]. What a network says of a column belongs to one token of one row:
    prompt [p, q] and response [a, b] stand in columns p, q, a, b; q is place 0 (it predicts a, and its value is that
    of the state before a), a is place 1, b is place 2 and ends the row.

    Attributes:
        tokens: int32.
        positions: int32, those of a row from 0.
        segment_ids: int32, what attention keeps apart; 0 is padding.
        row: int32, the row that a column's output belongs to; num_rows where none, as within a prompt.
        place: int32, t where the column stands before response token t of its row, the response's length at its end.
        ends: bool, the last token of its row.
        branches: int32, or None where every segment is one row. Rows of a segment share its prompt: 0 is that prompt,
            seen by all, k the k-th row behind it, whose positions go on from the prompt's.
        num_rows: R, static.
        full: microbatches that are used where every row is full, static; 0 is all N.
    """

    tokens: Int[Array, "*MN S"]
    positions: Int[Array, "*MN S"]
    segment_ids: Int[Array, "*MN S"]
    row: Int[Array, "*MN S"]
    place: Int[Array, "*MN S"]
    ends: Bool[Array, "*MN S"]
    branches: Int[Array, "*MN S"] | None = None
    num_rows: int = field(default=0, metadata={"static": True})
    full: int = field(default=0, metadata={"static": True})

    @property
    def used(self) -> Int[Array, ""]:
        """Microbatches that hold a row."""
        return jnp.any(self.row < self.num_rows, axis=(0, 2)).sum(dtype=jnp.int32)

    @property
    def filled(self) -> Float[Array, ""]:
        """The share of tokens in the columns of the microbatches that hold a row."""
        columns = self.used * self.tokens.shape[0] * self.tokens.shape[-1]
        return jnp.sum(self.segment_ids > 0) / jnp.maximum(columns, 1)

    def at(self, i: Int[Array, ""] | int) -> Packed:
        """Microbatch i, [M, S]."""
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False), self)

    @property
    def inputs(self) -> dict[str, Array]:
        """What `Model.apply` takes."""
        named = {"tokens": self.tokens, "positions": self.positions, "segment_ids": self.segment_ids}
        return named if self.branches is None else {**named, "branches": self.branches}

    @property
    def targets(self) -> Int[Array, "*MN S"]:
        """The token after each column, for those that `predicts` names."""
        return jnp.roll(self.tokens, -1, axis=-1)

    @property
    def predicts(self) -> Bool[Array, "*MN S"]:
        """The columns before response tokens, whose log-probs are asked for."""
        return (self.row < self.num_rows) & ~self.ends

    @property
    def rows(self) -> Bool[Array, " R"]:
        """The rows that a view holds."""
        return jnp.zeros(self.num_rows, bool).at[self.row].set(True, mode="drop")

    def from_rows(self, x: Int[Array, "R T K"]) -> Int[Array, "M S K"]:
        """What rows hold for the token that each column of a view predicts; -1 where it predicts none."""
        return x.at[self.row, self.place].get(mode="fill", fill_value=-1)

    def of_tokens(self, x: Int[Array, "R T L k"]) -> Int[Array, "M S L k"]:
        """What rows hold for the response token that each column of a view is; -1 where it is none."""
        return x.at[self.row, jnp.where(self.place > 0, self.place - 1, x.shape[1])].get(mode="fill", fill_value=-1)

    def to_rows(self, x: Float[Array, "M S"], num_tokens: int) -> Float[Array, "R T"]:
        """What a view's columns say, at (row, place); 0 elsewhere. A place beyond num_tokens = T is left out."""
        empty = jnp.zeros((self.num_rows, num_tokens), x.dtype)
        return empty.at[self.row, self.place].add(x, mode="drop")

    def at_ends(self, x: Float[Array, "M S ..."]) -> Float[Array, "R ..."]:
        """What a view's columns say at the last token of each row; 0 for rows elsewhere."""
        rows = jnp.zeros((self.num_rows, *x.shape[2:]), x.dtype)
        return rows.at[jnp.where(self.ends, self.row, self.num_rows)].add(x, mode="drop")
