"""Rows into sequences of one length on the devices, so that a step costs what its tokens cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from rlhf_jax.models.attention import LANES
from rlhf_jax.sharding import constrain_rows, data_ways
from rlhf_jax.tokens import Packed

LONG = 1024
"""Longer sequences have whole LANES of a TPU, else every array of their columns is copied to become flat."""


@dataclass(frozen=True)
class Sharing:
    """How many rows of a rollout answer one prompt, one after another, in networks of a width; static."""

    rows: int = 1
    width: int = 1

    def columns(self, rows: int, prompt: int, new: int) -> int:
        """Columns of so many full rows side by side, those of one prompt behind it: its last token begins each."""
        whole, rest = divmod(rows, self.rows)
        return (whole + (rest > 0)) * (prompt - 1) + rows * (1 + new)

    def together(self, rows: int, prompt: int, new: int, tokens: int, most: int) -> int:
        """Full rows, at most `most`, that a sequence of at most `tokens` is made for; 1 where more don't pay.

        It has the fewest operations for a real token of `rows` rows. A column costs its matrix products, and attention
        over the S columns of a sequence about S / (6 width) times as much. First fit leaves no room for one more row,
        so that of a sequence for k rows k / (k + 1) is filled or more: it is taken as half way from that to what full
        rows fill of the microbatches that hold them.
        """

        def cost(k: int) -> float:
            size = self.columns(k, prompt, new)
            microbatch = k * min(max(tokens // size, 1), -(-most // k))
            full = rows / (microbatch * -(-rows // microbatch))
            return size / k * (1 + size / (6 * self.width)) / ((k / (k + 1) + full) / 2)

        return min([1, *(k for k in range(2, most + 1) if self.columns(k, prompt, new) <= tokens)], key=cost)


@dataclass(frozen=True)
class Layout:
    """The shape of packed rows; static.

    Attributes:
        sequences: M, of a microbatch over all devices.
        microbatches: N, as many as hold every row wherever it may stand.
        full: microbatches that hold the rows if all are full and those of a prompt are together.
        length: S, columns of a sequence.
        together: rows share sequences; else each has its own.
        shared: rows of one prompt, one after another, stand behind one copy of it.
    """

    sequences: int
    microbatches: int
    full: int
    length: int
    together: bool
    shared: bool

    @classmethod
    def of(cls, rows: int, prompt: int, new: int, *, tokens: int, most: int, sharing: Sharing | None = None) -> Layout:
        """For rows of at most `prompt` and `new` tokens each; call it inside `jax.set_mesh`.

        A microbatch has about `tokens` tokens on each device, at least one sequence, and room for at most `most` full
        rows in all. With tokens = 0 every row has a sequence of its own, and a microbatch `most` of them.
        """
        ways, sharing, most = data_ways(), sharing or Sharing(), min(most or rows, rows)
        together = sharing.together(max(rows // ways, 1), prompt, new, tokens, max(most // ways, 1))
        length, shared = sharing.columns(together, prompt, new), sharing.rows > 1 and together > 1
        if length > LONG:
            length = -(-length // LANES) * LANES
        most = -(-most // (ways * together)) * ways
        sequences = min(ways * max(tokens // length, 1), most) if tokens else most
        full = -(-rows // (together * sequences))
        return cls(sequences, -(-rows // sequences) if shared else full, full, length, tokens > 0, shared)


def behind_prompts(
    prompts: Int[Array, "R P"], length: Int[Array, " R"], size: int
) -> tuple[Int[Array, " R"], Int[Array, " R"], Int[Array, " R"]]:
    """Segments of rows with equal prompts, one after another: (first row, columns before it in the segment, number).

    Each int32[R]; numbers count from 1. `prompts` are -1 off tokens, `length` those of whole rows, 0 for rows that are
    left out. A row joins the segment before it where that has room in `size` columns.
    """
    rows = prompts.shape[0]
    same = jnp.all(prompts[1:] == prompts[:-1], axis=1)
    own = length - (prompts >= 0).sum(axis=1, dtype=jnp.int32) + 1  # the response and the prompt's last token

    def join(carry: tuple[Array, Array, Array], x: tuple[Array, ...]) -> tuple[Any, Any]:
        first, filled, number = carry
        row, same, length, own = x
        filled = jnp.where(same, filled, 0)
        joins, kept = (filled > 0) & (filled + own <= size), length > 0
        new = (jnp.where(joins, first, row), jnp.where(joins, filled, 0), jnp.where(joins, number + 1, 1))
        after = (new[0], new[1] + jnp.where(joins, own, length), new[2])
        return jax.tree.map(lambda a, b: jnp.where(kept, a, b), after, (first, filled, number)), new

    zero = jnp.zeros((), jnp.int32)
    xs = (jnp.arange(rows, dtype=jnp.int32), jnp.append(False, same), length, own)
    return jax.lax.scan(join, (zero, zero, zero), xs)[1]


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
    rows, given = tokens.shape
    prompt = real[:, :-num_tokens].sum(axis=1, dtype=jnp.int32)
    response = real[:, -num_tokens:].sum(axis=1, dtype=jnp.int32)
    kept = response > 0 if wanted is None else wanted & (response > 0)
    length = jnp.where(kept, prompt + response, 0)

    # Segments [R] of a row or of several, each into a sequence: where a row begins, and with which of its tokens.
    leader, before, number = jnp.arange(rows, dtype=jnp.int32), jnp.zeros_like(length), jnp.ones_like(length)
    if layout.shared:
        prompts = jnp.where(real, tokens, -1)[:, :-num_tokens]
        leader, before, number = behind_prompts(prompts, length, layout.length)
    skipped = jnp.where(before > 0, prompt - 1, 0)
    needed = jnp.zeros(rows, jnp.int32).at[leader].max(jnp.where(kept, before + length - skipped, 0))
    needed = needed if layout.together else jnp.where(kept, layout.length, 0)
    sequence, first = (x[leader] for x in first_fit(needed, layout.length))

    # The row of each column [M N, S] is that of the last start at or before it, and `index` its token of that row.
    total, places = layout.sequences * layout.microbatches, jnp.arange(layout.length, dtype=jnp.int32)[None, :]
    starts = jnp.full((total, layout.length), rows, jnp.int32)
    at = jnp.where(kept, sequence, total), first + before
    starts = starts.at[at].set(jnp.arange(rows, dtype=jnp.int32), mode="drop")
    started = jax.lax.cummax(jnp.where(starts < rows, places, 0), axis=1)
    row = jnp.take_along_axis(starts, started, axis=1)
    here = jnp.minimum(row, rows - 1)
    index = places - started + skipped[here]
    within = (row < rows) & (index < length[here])
    place, ends = index - prompt[here] + 1, index == length[here] - 1
    of_row = given - num_tokens - prompt[here] + index  # the column of the row that was given
    speaks = within & (place >= 0)
    leads = (starts < rows) & (before[jnp.minimum(starts, rows - 1)] == 0)

    def cut(x: Array) -> Array:
        """[M N, S] in order of sequences as [M, N, S], rows over the data axes."""
        x = x.reshape(layout.microbatches, layout.sequences, layout.length).swapaxes(0, 1)
        return constrain_rows(x)

    return Packed(
        tokens=cut(jnp.where(within, tokens[here, jnp.where(within, of_row, 0)], 0)),
        positions=cut(jnp.where(within, index, 0)),
        segment_ids=cut(jnp.where(within, jnp.cumsum(leads, axis=1, dtype=jnp.int32), 0)),
        row=cut(jnp.where(speaks, row, rows)),
        place=cut(jnp.where(speaks, place, 0)),
        ends=cut(speaks & ends),
        branches=cut(jnp.where(speaks, number[here], 0)) if layout.shared else None,
        num_rows=rows,
        full=layout.full,
    )


def zeros_of(shapes: Any) -> Any:
    """A tree of zeros with the shapes of another."""
    return jax.tree.map(jnp.zeros_like, shapes)


def tree_sum(a: Any, b: Any) -> Any:
    """Two trees, leaf by leaf."""
    return jax.tree.map(jnp.add, a, b)


def over_views(
    packed: Packed,
    fn: Callable[[Packed, Int[Array, ""] | int], Any],
    nothing: Callable[[Any], Any] = zeros_of,
    add: Callable[[Any, Any], Any] = tree_sum,
) -> Any:
    """fn(view, i) of every microbatch that is used, added up; one program for any number of them.

    `nothing` makes the sum's start of the shapes of what fn returns: zeros, for sums of trees.
    """
    if packed.tokens.shape[1] == 1:
        return fn(packed.at(0), 0)
    start = nothing(jax.eval_shape(fn, packed.at(0), 0))
    with jax.named_scope(f"filled_{packed.full or packed.tokens.shape[1]}"):  # for `plan`: where every row is full
        return jax.lax.fori_loop(0, packed.used, lambda i, total: add(total, fn(packed.at(i), i)), start)
