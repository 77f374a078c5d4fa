"""Masks, positions, weights, packed rows, and log-probs of chosen tokens without the whole of the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Tree = TypeVar("Tree")


def positions_from_mask(mask: Bool[Array, "*B S"]) -> Int[Array, "*B S"]:
    """Position ids: the exclusive cumulative sum of the mask, 0 on padding.

    A left-padded row with mask [0, 0, 1, 1, 1] gets [0, 0, 0, 1, 2].
    """
    counts = jnp.cumsum(mask, axis=-1, dtype=jnp.int32)
    return jnp.where(mask, counts - 1, 0)


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


def token_logprobs(
    project: Callable[[Float[Array, "B C D"]], Float[Array, "B C V"]],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    temperature: Float[Array, ""] | float,
    *,
    chunk: int,
    with_entropy: bool = False,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probs (nats) of `targets` under softmax(project(hidden) / temperature), and the entropy if asked (else 0).

    log p = z_target - logsumexp(z). Logits are float32 and at most `chunk` positions of a row are alive at once, in
    the backward pass too: longer sequences run in checkpointed chunks. `hidden[:, t]` predicts `targets[:, t]`.
    """

    def of_chunk(hidden: Array, targets: Array) -> tuple[Array, Array]:
        logits = project(hidden).astype(jnp.float32) / jnp.asarray(temperature, jnp.float32)
        log_normaliser = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        if not with_entropy:
            return chosen - log_normaliser, jnp.zeros_like(log_normaliser)
        probs = jnp.exp(logits - log_normaliser[..., None])
        return chosen - log_normaliser, log_normaliser - jnp.sum(probs * logits, axis=-1)

    length = hidden.shape[1]
    if length <= chunk:
        return of_chunk(hidden, targets)
    pad = -length % chunk
    hidden, targets = (jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2)) for x in (hidden, targets))

    def split(x: Array) -> Array:
        return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    outputs = jax.lax.map(lambda xs: jax.checkpoint(of_chunk)(*xs), (split(hidden), split(targets)))
    logprobs, entropy = (x.swapaxes(0, 1).reshape(x.shape[1], -1)[:, :length] for x in outputs)
    return logprobs, entropy


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
    """

    tokens: Int[Array, "*MN S"]
    positions: Int[Array, "*MN S"]
    segment_ids: Int[Array, "*MN S"]
    row: Int[Array, "*MN S"]
    place: Int[Array, "*MN S"]
    ends: Bool[Array, "*MN S"]
    branches: Int[Array, "*MN S"] | None = None
    num_rows: int = field(default=0, metadata={"static": True})

    @property
    def used(self) -> Int[Array, ""]:
        """Microbatches that hold a row."""
        return jnp.any(self.row < self.num_rows, axis=(0, 2)).sum(dtype=jnp.int32)

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

    def to_rows(self, x: Float[Array, "M S"], num_tokens: int) -> Float[Array, "R T"]:
        """What a view's columns say, at (row, place); 0 elsewhere. A place beyond num_tokens = T is left out."""
        empty = jnp.zeros((self.num_rows, num_tokens), x.dtype)
        return empty.at[self.row, self.place].add(x, mode="drop")

    def at_ends(self, x: Float[Array, "M S"]) -> Float[Array, " R"]:
        """What a view's columns say at the last token of each row; 0 for rows elsewhere."""
        return jnp.zeros(self.num_rows, x.dtype).at[jnp.where(self.ends, self.row, self.num_rows)].add(x, mode="drop")
