"""Masks, positions, weights, packed rows, and log-probs of chosen tokens without the whole of the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
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


def _in_chunks(fn: Callable[..., Any], inputs: list[Array], needed: Bool[Array, "W N"], num: int) -> list[Array]:
    """fn of the positions that are needed, the rest zeros [W, N]: `num` checkpointed chunks, empty ones skipped."""
    shards, count = needed.shape

    def if_needed(needed: Array, *inputs: Array) -> Any:
        shapes = jax.eval_shape(fn, *inputs)
        nothing = jax.tree.map(jnp.zeros_like, shapes)
        return jax.lax.cond(needed.any(), fn, lambda *_: nothing, *inputs)

    # Where each position goes: the needed ones keep their order at the front, the others theirs behind them.
    pad = -count % num
    needed, *inputs = (jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2)) for x in (needed, *inputs))
    before = jnp.cumsum(needed, axis=1, dtype=jnp.int32)
    place = jnp.where(needed, before, before[:, -1:] + jnp.cumsum(~needed, axis=1, dtype=jnp.int32)) - 1
    order = jnp.argsort(place, axis=1)

    # [W, N, ...] -> [num, W, N / num, ...] and back.
    ordered = [_permuted(x, order, place) for x in (needed, *inputs)]
    chunks = [x.reshape(shards, num, -1, *x.shape[2:]).swapaxes(0, 1) for x in ordered]
    outputs = jax.lax.map(lambda xs: jax.checkpoint(if_needed)(*xs), chunks)
    return [_permuted(x.swapaxes(0, 1).reshape(shards, -1), place, order)[:, :count] for x in outputs]


@dataclass(frozen=True)
class Blocks:
    """A vocabulary that is projected one block after another, so that the weights of a block alone are gathered.

    Attributes:
        weights: a tree of arrays [N, ...], those of block i at i.
        width: v. Block i has of every N v ids those from i v to (i + 1) v, one after another.
        project: (weights of a block) -> (hidden [W, C, D] -> logits [W, C, V / N]).
    """

    weights: Any
    width: int
    project: Callable[[Any], Callable[[Array], Array]]

    def find(self, block: Array, ids: Array) -> tuple[Array, Array]:
        """(the place of each id in a block, whether it is there)."""
        number = len(jax.tree.leaves(self.weights)[0])
        which, rest = ids // self.width, ids % self.width
        return which // number * self.width + rest, (ids >= 0) & (which % number == block)


def token_logprobs(
    project: Callable[[Float[Array, "W C D"]], Float[Array, "W C V"]],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    temperature: Float[Array, ""] | float,
    *,
    chunk: int,
    needed: Bool[Array, "B T"] | None = None,
    kept: Int[Array, "B T K"] | None = None,
    shards: int = 1,
    blocks: Blocks | None = None,
    with_entropy: bool = False,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probs (nats) of `targets` under softmax(project(hidden) / temperature), and the entropy if asked (else 0).

    log p = z_target - logsumexp(z), float32. `hidden[:, t]` predicts `targets[:, t]`; both results are 0 off `needed`
    (None: all are). Where ids are `kept`, of up to K tokens a position and -1 in the places of none, the law is that
    of these tokens alone, renormalised, and the target is one of them.

    The B T positions lie in W = `shards` blocks of whole rows, as rows lie on a mesh, and the logits of at most
    `chunk` positions of a block are alive at once, in the backward pass too. Where there are more, they run in
    checkpointed chunks, the needed ones first, and a chunk without any is skipped; with `blocks` in all chunks for
    one block of the vocabulary after another.
    """

    def of_chunk(
        project: Callable[[Array], Array], find: Callable[[Array], Any], hidden: Array, targets: Array, *kept: Array
    ) -> tuple[Array, Array, Array]:
        """Of the ids that `project` has: the target's logit (0: it has another), logsumexp, and the mean logit."""
        logits = project(hidden).astype(jnp.float32) / jnp.asarray(temperature, jnp.float32)

        def at(ids: Array, other: float) -> Array:
            place, there = find(ids)  # [W, C, V] -> [W, C, K]
            return jnp.where(there, jnp.take_along_axis(logits, jnp.maximum(place, 0), axis=-1), other)

        chosen = at(targets[..., None], 0.0)[..., 0]
        for ids in kept:
            logits = at(ids, OUT)
        log_normaliser = jax.nn.logsumexp(logits, axis=-1)
        if not with_entropy:
            return chosen, log_normaliser, jnp.zeros_like(chosen)
        probs = jnp.exp(logits - log_normaliser[..., None])
        return chosen, log_normaliser, jnp.sum(probs * logits, axis=-1)

    shape, num = targets.shape, -(-(targets.size // shards) // chunk)
    needed = jnp.ones(shape, bool) if needed is None else needed
    inputs = [hidden, targets] if kept is None else [hidden, targets, kept]
    whole = partial(of_chunk, project, lambda ids: (ids, ids >= 0))
    if num == 1:
        outputs: Sequence[Array] = whole(*inputs)
    else:  # [B, T, ...] -> [W, B T / W, ...]
        *inputs, flat = (x.reshape(shards, -1, *x.shape[2:]) for x in (*inputs, needed))
        in_blocks = None if blocks is None else partial(_in_blocks, of_chunk, blocks)
        outputs = (in_blocks or partial(_in_chunks, whole))(inputs, flat, num)
    chosen, log_normaliser, mean = (x.reshape(shape) for x in outputs)
    entropy = log_normaliser - mean if with_entropy else jnp.zeros_like(mean)
    return jnp.where(needed, chosen - log_normaliser, 0.0), jnp.where(needed, entropy, 0.0)


def _in_blocks(
    of_chunk: Callable[..., Any], blocks: Blocks, inputs: list[Array], needed: Bool[Array, "W N"], num: int
) -> list[Array]:
    """`of_chunk` of all chunks, put together from one block of the vocabulary after another."""
    first, *rest = inputs
    summed = first.astype(jnp.float32)  # gradients are, over the blocks

    def of_block(block: tuple[Array, Any]) -> list[Array]:
        number, weights = block
        fn = partial(of_chunk, blocks.project(weights), partial(blocks.find, number))
        return _in_chunks(fn, [summed.astype(first.dtype), *rest], needed, num)

    # Each [N, W, ...]; the logarithm of a sum of exponentials is that of the blocks' sums.
    numbers = jnp.arange(len(jax.tree.leaves(blocks.weights)[0]))
    chosen, log_sums, means = jax.lax.map(jax.checkpoint(of_block), (numbers, blocks.weights))
    log_normaliser = jax.nn.logsumexp(log_sums, axis=0)
    return [chosen.sum(0), log_normaliser, jnp.sum(jnp.exp(log_sums - log_normaliser[None]) * means, axis=0)]


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
