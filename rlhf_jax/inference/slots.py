"""What decoding in slots carries, and how many slots there are. `engine` has the shapes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models.cache import Columns, column_bytes, state_bytes
from rlhf_jax.models.delta import Recurrent
from rlhf_jax.models.model import Model
from rlhf_jax.sharding import constrain_rows
from rlhf_jax.types import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Contexts:
    """Prompts with their caches.

    Attributes:
        number: int32[X, C], which prompt of the shard's queue.
        started: int32[X, C], how many of its G sequences have a slot or had one; G where there is no prompt.
        mask: bool[X, C, P].
        logits: float32[X, C, V], after the prompt.
        cache: per layer keys and values [X, K, C * P, N].
        states: those after the prompt, of layers that have a state instead (`cache.apart`), [X * C, ...].
    """

    number: Int[Array, "X C"]
    started: Int[Array, "X C"]
    mask: Bool[Array, "X C P"]
    logits: Float[Array, "X C V"]
    cache: list[Columns | None]
    states: list[Recurrent | None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """Sequences that are being drawn.

    Attributes:
        row: int32[X, M], of the shard's block.
        context: int32[X, M].
        place: int32[X, M], tokens so far.
        alive: bool[X, M], there is a sequence and it has not ended.
        logits: float32[X, M, V], of the next token.
        cache: per layer keys and values [X * M, K, S, N] of the tokens so far. All slots write the same column, step
            modulo S: a sequence sees the columns of its own age.
        states: those after the tokens so far, of layers that have a state instead, [X * M, ...].
    """

    row: Int[Array, "X M"]
    context: Int[Array, "X M"]
    place: Int[Array, "X M"]
    alive: Bool[Array, "X M"]
    logits: Float[Array, "X M V"]
    cache: list[Columns | None]
    states: list[Recurrent | None]

    def latest(self, step: Int[Array, ""], columns: int, chunk: int) -> list[Columns | None]:
        """The columns of the cache of the last steps before `step`, oldest first; all in whole chunks."""

        def read(x: Array) -> Array:
            by_chunk = x.reshape(*x.shape[:2], -1, chunk, x.shape[3])
            chunks = (step // chunk + jnp.arange(-(columns // chunk), 0)) % by_chunk.shape[2]
            return jnp.take(by_chunk, chunks, axis=2).reshape(*x.shape[:2], columns, x.shape[3])

        return jax.tree.map(read, self.cache)

    def renewed(self, new: list[Columns | None], step: Int[Array, ""], chunk: int) -> list[Columns | None]:
        """The cache with the last chunk of a new one as the columns of `step` and those after it."""

        def write(x: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(x, new[:, :, -chunk:], step % x.shape[2], axis=2)

        return jax.tree.map(write, self.cache, new)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What the loop carries.

    Attributes:
        queued: int32[W], the next prompt of every shard's queue.
        step: int32[], tokens that every slot has fed to the model.
        out: what is drawn, [W, rows, chunks, chunk, ...] each: tokens, whether they count, and what `Draw` keeps.
    """

    contexts: Contexts
    slots: Slots
    queued: Int[Array, " W"]
    step: Int[Array, ""]
    out: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Begun:
    """What rows have already, where they go on; B rows of every shard.

    Attributes:
        tokens: int32[W, B, S].
        number: int32[W, B], how many tokens; whole chunks, unless the row has ended.
        limit: int32[W, B], with how many a row waits or ends; that is `number` of a row that has ended.
        budget: limit - number at most, static.
    """

    tokens: Int[Array, "W B S"]
    number: Int[Array, "W B"]
    limit: Int[Array, "W B"]
    budget: int = field(metadata={"static": True})


def choose_slots(
    model: Model, params: Params, prompts: int, samples: int, prompt_length: int, max_new_tokens: int
) -> int:
    """Slots of a shard where rows may end early: as many as have a cache no larger than what decoding reads, `params`.

    They are whole groups of `samples` and 16 at least; all rows, unless these are twice as many, or three times where
    several share a prompt and more at once cost less: beside the last rows of a queue slots stand empty.
    """
    arch, size = model.arch, model.compute_dtype.itemsize
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    columns = samples * max_new_tokens + (1 if samples == 1 else 2) * prompt_length  # of a group
    group = column_bytes(arch, size) * columns + state_bytes(arch, size) * samples
    slots = max(weights // group, -(-16 // samples)) * samples
    return slots if (2 if samples == 1 else 3) * slots <= prompts * samples else prompts * samples


def layout(prompts: int, samples: int, slots: int) -> tuple[int, int, int]:
    """(groups, slots of each, contexts of each) of a shard with so many prompts, samples of each, and slots (0: all).

    Where slots are refilled a group of several has two contexts: a slot that is done early begins the next prompt.
    """
    if slots == 0 or slots >= prompts * samples:
        return prompts, samples, 1
    groups = max(slots // samples, 1)
    return groups, slots // groups, 1 if samples == 1 else 2


def queue_of(masks: Bool[Array, "W N P"], active: Bool[Array, "W N"]) -> tuple[Int[Array, "W N"], Int[Array, " W"]]:
    """(the prompts of every shard, longest first, those behind that are not to be drawn, and how many are drawn)."""
    shortness = jnp.where(active, -masks.sum(2, dtype=jnp.int32), 1)
    return jnp.argsort(shortness, axis=1, stable=True).astype(jnp.int32), active.sum(1, dtype=jnp.int32)


def take(x: Array, index: Array) -> Array:
    """x[w, index[w]] of [W, n, ...] and [W, ...], each shard from its own."""
    return jax.vmap(lambda x, i: x[i])(x, index)


def split(x: Array, parts: int) -> Array:
    """[parts * n, ...] as [parts, n, ...]."""
    return x.reshape(parts, -1, *x.shape[1:])


def flat(x: Array) -> Array:
    """[W, n, ...] as [W * n, ...], with rows over the mesh."""
    return constrain_rows(x.reshape(-1, *x.shape[2:]))


def width_of(cache: list[Columns | None]) -> int:
    """Columns of a cache; 1 where no layer has any."""
    return next((x.shape[2] for x in jax.tree.leaves(cache)), 1)


def widened(x: Array, columns: int) -> Array:
    """A cache [R, K, S, N] with more columns."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, columns - x.shape[2]), (0, 0)))
