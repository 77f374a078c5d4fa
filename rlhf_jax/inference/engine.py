"""What a rollout asks for: sequences decoded in slots that are refilled, in one jitted loop, whatever their lengths.

`admission` gives prompts contexts and sequences slots, `drawing` is the loop.

Shapes. The rows of a rollout, G for each prompt, lie in W blocks, one for each shard of rows of the mesh; a shard
draws its own block and all shards run in lockstep. Its slots lie in groups: X groups over all shards, each of M slots
with C contexts. A context holds a prompt, its cache and the logits after it, a slot one sequence of a context of its
group. P is the length of a prompt, S that of a sequence in whole chunks, V the vocabulary.

With as many slots as rows every sequence starts at once and nothing is refilled: the rectangle of a plain sampler.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.inference.slots import Begun, flat, layout, split, take
from rlhf_jax.models.cache import Columns, apart
from rlhf_jax.models.delta import Recurrent
from rlhf_jax.models.model import Model
from rlhf_jax.tokens import positions_from_mask
from rlhf_jax.types import Params

EXPERT = jnp.int16
"""What the number of an expert is kept as."""

ADMITTED = 512
"""Prompt tokens that a shard prefills at once between two chunks."""

LEAST = 32
"""Columns of the narrowest part of a cache that is read apart."""

Draw = Callable[[Float[Array, "R V"], Float[Array, " R"]], tuple[Int[Array, " R"], Any]]
"""(logits, uniforms in [0, 1)) -> (tokens, a tree of what else is kept of each, [R, ...], as their log-probs)."""


def parts_of(length: int, unit: int = 1) -> list[int]:
    """A quarter, half and all of so many columns, as far as these are whole units and no less than LEAST."""
    parts = [part for part in (4, 2) if length // unit % part == 0 and length // part >= LEAST]
    return [*(length // part for part in parts), length]


@dataclass(frozen=True)
class Engine:
    """What stays as it is while all rows of a rollout are drawn. See the module for the shapes.

    Attributes:
        model: with `prefill`, `decode` and `pinned` of a `Model`; its rotary law is that of prompt and response.
        params: `Model.decoding_params`.
        draw: one token of every slot.
        is_stop: bool[V], the tokens that end a sequence; None if none does.
        min_new_tokens: int32[], no stop id is drawn before so many tokens.
        prompts, masks: int32 and bool[W, N, P], left-padded.
        queue: int32[W, N], the order in which a shard draws its prompts, longest first, of which the first `count`,
            int32[W], are drawn at all.
        uniforms: float32[W, N * G, S].
        samples, slots: G, and the slots of a shard, at most (0: a slot for every row).
        chunk, max_new_tokens: tokens between looks at who is done, and of the longest sequence.
        begun: what rows have already; None where all begin with their first token.
        routing: keep the experts of every token drawn, [R, L, k], which the model chooses as it reads it.
    """

    model: Model
    params: Params
    draw: Draw
    is_stop: Bool[Array, " V"] | None
    min_new_tokens: Int[Array, ""]
    prompts: Int[Array, "W N P"]
    masks: Bool[Array, "W N P"]
    queue: Int[Array, "W N"]
    count: Int[Array, " W"]
    uniforms: Float[Array, "W B S"]
    samples: int
    slots: int
    chunk: int
    max_new_tokens: int
    begun: Begun | None = None
    routing: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(W, groups of a shard, M, C, P)."""
        ways, prompts, length = self.prompts.shape
        return ways, *layout(prompts, self.samples, self.slots), length

    @property
    def at_once(self) -> int:
        """Slots of a shard."""
        return math.prod(self.shape[1:3])

    @property
    def refills(self) -> bool:
        """Whether there are more rows than slots."""
        return self.at_once < self.uniforms.shape[1]

    @property
    def in_step(self) -> bool:
        """Whether all sequences have one age: as long as they are young, the first columns of their cache are all."""
        return not self.refills and self.begun is None

    def trips(self, number: float) -> Any:
        """A name for `plan`: so often a loop runs at most; where slots are refilled, if all rows are full."""
        return jax.named_scope(f"{'filled' if self.refills else 'trips'}_{number:g}")

    def widths(self) -> list[int]:
        """Columns of slots that may be read: those of the oldest sequence, rounded up to one of these."""
        return parts_of(self.uniforms.shape[2], self.chunk)

    def prompt_widths(self) -> list[int]:
        """Columns of prompts that may be prefilled: those of the longest, rounded up to one of these."""
        return parts_of(self.prompts.shape[2])

    @property
    def filled_at_once(self) -> int:
        """Rows of a shard whose earlier tokens are prefilled at once."""
        return min(max(ADMITTED // (self.prompts.shape[2] + self.uniforms.shape[2]), 1), self.at_once)

    def prefill(
        self, index: Int[Array, "W A"], width: int
    ) -> tuple[Array, Array, list[Columns | None], list[Recurrent | None]]:
        """Of these prompts of every shard: masks [W, A, P], logits [W, A, V], caches and states [W * A, ...].

        Caches have the last `width` columns, where all tokens are.
        """
        tokens, mask = take(self.prompts, index), take(self.masks, index)
        rows = flat(mask[:, :, -width:])
        logits, cache = self.model.prefill(self.params, flat(tokens[:, :, -width:]), rows, positions_from_mask(rows))
        return mask, split(logits, index.shape[0]), *apart(cache)

    def of_contexts(self, context: Int[Array, "X M"]) -> Bool[Array, "X M C"]:
        """Which context a slot has, as one of all."""
        return context[:, :, None] == jnp.arange(self.shape[3])[None, None]

    def by_shard(self, x: Array) -> Array:
        """Of slots, [X, M] as [W, slots of a shard]."""
        return split(flat(x), self.prompts.shape[0])
