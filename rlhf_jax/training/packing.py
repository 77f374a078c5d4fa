"""Rows into sequences of one length on the devices, so that a step costs what its tokens cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from rlhf_jax.sharding import ROWS, constrain, data_ways
from rlhf_jax.tokens import Packed


@dataclass(frozen=True)
class Layout:
    """The shape of packed rows; static.

    Attributes:
        sequences: M, of a microbatch over all devices.
        microbatches: N, as many as hold every row in a sequence of its own.
        together: rows share sequences; else each has its own.
    """

    sequences: int
    microbatches: int
    together: bool

    @classmethod
    def of(cls, rows: int, length: int, *, tokens: int, most: int) -> Layout:
        """For `rows` rows of at most `length` tokens each; call it inside `jax.set_mesh`.

        A microbatch has about `tokens` tokens on each device, at least one sequence, and at most `most` sequences in
        all. With tokens = 0 every row has a sequence of its own, and a microbatch `most` of them.
        """
        ways = data_ways()
        most = -(-min(most or rows, rows) // ways) * ways
        sequences = min(ways * max(tokens // length, 1), most) if tokens else most
        return cls(sequences, -(-rows // sequences), tokens > 0)


def first_fit(claims: Int[Array, " R"], size: int) -> tuple[Int[Array, " R"], Int[Array, " R"]]:
    """(sequence, first column) of every row, int32[R]: longest row first, each into the first sequence with room.

    `claims` are the columns that each row needs of the `size` of a sequence; a row of 0 takes none. First fit
    decreasing needs at most 11/9 of the fewest sequences (Johnson 1973). Equal rows keep their order.
    """
    num = claims.shape[0]

    def place(filled: Array, claim: Array) -> tuple[Array, tuple[Array, Array]]:
        to = jnp.argmax(filled + claim <= size).astype(jnp.int32)
        return filled.at[to].add(claim), (to, filled[to])

    order = jnp.argsort(-claims, stable=True)
    _, placed = jax.lax.scan(place, jnp.zeros(num, jnp.int32), claims[order])
    sequence, first = (jnp.zeros(num, jnp.int32).at[order].set(x) for x in placed)
    return sequence, first


@partial(jax.jit, static_argnames=("num_tokens", "layout"))
def pack(
    tokens: Int[Array, "R S"],
    real: Bool[Array, "R S"],
    num_tokens: int,
    layout: Layout,
    wanted: Bool[Array, " R"] | None = None,
) -> Packed:
    """Rows of a left-padded prompt and a right-padded response of `num_tokens` columns, packed.

    `real` is true on tokens. Rows that are not wanted, or have no response, are left out.
    """
    rows, size = tokens.shape
    prompt = real[:, :-num_tokens].sum(axis=1, dtype=jnp.int32)
    response = real[:, -num_tokens:].sum(axis=1, dtype=jnp.int32)
    kept = response > 0 if wanted is None else wanted & (response > 0)
    length = jnp.where(kept, prompt + response, 0)
    sequence, first = first_fit(length if layout.together else jnp.where(kept, size, 0), size)

    # The row of each column [M N, S] is that of the last start at or before it, and `index` its token of that row.
    total, columns = layout.sequences * layout.microbatches, jnp.arange(size, dtype=jnp.int32)[None, :]
    starts = jnp.full((total, size), rows, jnp.int32)
    starts = starts.at[jnp.where(kept, sequence, total), first].set(jnp.arange(rows, dtype=jnp.int32), mode="drop")
    started = jax.lax.cummax(jnp.where(starts < rows, columns, 0), axis=1)
    row, index = jnp.take_along_axis(starts, started, axis=1), columns - started
    here = jnp.minimum(row, rows - 1)
    within = (row < rows) & (index < length[here])
    place, ends = index - prompt[here] + 1, index == length[here] - 1
    of_row = size - num_tokens - prompt[here] + index  # the column of the row that was given
    speaks = within & (place >= 0)

    def cut(x: Array) -> Array:
        """[M N, S] in order of sequences as [M, N, S], rows over the data axes."""
        return constrain(x.reshape(layout.microbatches, layout.sequences, size).swapaxes(0, 1), *ROWS, None, None)

    return Packed(
        tokens=cut(jnp.where(within, tokens[here, jnp.where(within, of_row, 0)], 0)),
        positions=cut(jnp.where(within, index, 0)),
        segment_ids=cut(jnp.where(within, jnp.cumsum(starts < rows, axis=1, dtype=jnp.int32), 0)),
        row=cut(jnp.where(speaks, row, rows)),
        place=cut(jnp.where(speaks, place, 0)),
        ends=cut(speaks & ends),
        num_rows=rows,
    )


def over_views(
    packed: Packed, fn: Callable[[Packed, Int[Array, ""] | int], Any], nothing: Callable[[Any], Any], add: Callable
) -> Any:
    """fn(view, i) of every microbatch that is used, added up; one program for any number of them.

    `nothing` makes the sum's start of the shapes of what fn returns.
    """
    if packed.tokens.shape[1] == 1:
        return fn(packed.at(0), 0)
    start = nothing(jax.eval_shape(fn, packed.at(0), 0))
    with jax.named_scope(f"filled_{packed.tokens.shape[1]}"):  # for `plan`: so many rounds where every row is full
        return jax.lax.fori_loop(0, packed.used, lambda i, total: add(total, fn(packed.at(i), i)), start)
