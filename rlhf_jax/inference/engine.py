"""Decoding in slots that are refilled: one jitted loop over any number of sequences, whatever their lengths.

Shapes. The rows of a rollout, G for each prompt, lie in W blocks, one for each shard of rows of the mesh; a shard
draws its own block and all shards run in lockstep. Its slots lie in groups: X groups over all shards, each of M slots
with C contexts. A context holds a prompt, its cache and the logits after it, a slot one sequence of a context of its
group. P is the length of a prompt, S that of a sequence in whole chunks, V the vocabulary.

With as many slots as rows every sequence starts at once and nothing is refilled: the rectangle of a plain sampler.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.inference.slots import Begun, Contexts, Slots, State, flat, layout, split, take, widened
from rlhf_jax.models.decoder import Cache
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


@dataclass(frozen=True)
class Engine:
    """`run` draws all rows of a rollout. See the module for the shapes.

    Attributes:
        model: with `prefill`, `decode` and `pinned` of a `Model`; its rotary law is that of prompt and response.
        params: `Model.decoding_params`.
        draw: one token of every slot.
        is_stop: bool[V], the tokens that end a sequence; None if none does.
        min_new_tokens: int32[], no stop id is drawn before so many tokens.
        prompts, masks: int32 and bool[W, N, P], left-padded.
        queue: int32[W, N], the order in which a shard draws its prompts, of which the first `count`, int32[W], are
            drawn at all.
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

    def run(self) -> Any:
        """`State.out`, [W, rows, S, ...] each, when all is drawn."""
        state, done = self.start(), 0
        begin = (lambda state: self.assign(self.admit(state))) if self.refills else lambda state: state
        for columns in self.widths() if self.in_step else self.widths()[-1:]:
            last = columns == self.uniforms.shape[2]
            cache = jax.tree.map(partial(widened, columns=columns), state.slots.cache)
            state = dataclasses.replace(state, slots=dataclasses.replace(state.slots, cache=cache))
            go_on = lambda state, n=columns, last=last: self.pending(state) & (last | (state.step < n))  # noqa: E731
            most = columns - done if self.begun is None else self.begun.budget
            with self.trips(most / self.chunk * self.uniforms.shape[1] / self.at_once):
                state = jax.lax.while_loop(go_on, lambda state: self.decode_chunk(begin(state)), state)
            done = columns
        return jax.tree.map(lambda x: x.reshape(*x.shape[:2], -1, *x.shape[4:]), state.out)

    def trips(self, number: float) -> Any:
        """A name for `plan`: so often a loop runs at most; where slots are refilled, if all rows are full."""
        return jax.named_scope(f"{'filled' if self.refills else 'trips'}_{number:g}")

    @property
    def in_step(self) -> bool:
        """Whether all sequences have one age: as long as they are young, the first columns of their cache are all."""
        return not self.refills and self.begun is None

    def widths(self) -> list[int]:
        """Columns of slots that may be read: those of the oldest sequence, rounded up to one of these."""
        length = self.uniforms.shape[2]
        chunks = length // self.chunk
        parts = [part for part in (4, 2) if chunks % part == 0 and length // part >= LEAST]
        return [*(length // part for part in parts), length]

    # --- contexts

    def start(self) -> State:
        """No sequence yet where slots are refilled; else all of them, at their first token."""
        ways, groups, width, contexts, length = self.shape
        total, columns = ways * groups, self.widths()[0 if self.in_step else -1]
        if self.refills:
            shapes = jax.eval_shape(self.prefill, jnp.zeros((ways, groups * contexts), jnp.int32))
            mask, logits, cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            number, queued = jnp.zeros((total, contexts), jnp.int32), jnp.zeros(ways, jnp.int32)
            started = jnp.full((total, contexts), self.samples, jnp.int32)
        else:
            mask, logits, cache = self.prefill(self.queue)
            numbers = jnp.broadcast_to(jnp.arange(groups, dtype=jnp.int32)[None], (ways, groups))
            number, queued = flat(numbers)[:, None], self.count
            started = flat(jnp.where(numbers < queued[:, None], 0, self.samples))[:, None]
        # Masks and logits [W, groups * C, ...] by group; caches [W * groups * C, K, P, N] as [X, K, C * P, N].
        mask, logits = (x.reshape(total, contexts, -1) for x in (mask, logits))
        side_by_side = lambda x: jnp.moveaxis(split(x, total), 1, 2).reshape(total, x.shape[1], -1, x.shape[3])  # noqa: E731
        cache = self.model.pinned(jax.tree.map(side_by_side, cache))
        own = jax.tree.map(lambda x: jnp.zeros((total * width, x.shape[1], columns, x.shape[3]), x.dtype), cache)
        none = jnp.zeros((total, width), jnp.int32)
        first = jnp.zeros((total, width, logits.shape[-1]), logits.dtype)
        slots = Slots(none, none, none, none > 0, first, self.model.pinned(own))
        # What `draw` makes of all slots, for every row instead.
        token, kept = jax.eval_shape(self.draw, first.reshape(total * width, -1), jnp.zeros(total * width))
        arch = self.model.arch
        of_token = (len(token), arch.num_layers, arch.experts_per_token)
        experts = jax.ShapeDtypeStruct(of_token, EXPERT) if self.routing else None
        chunks = (*self.uniforms.shape[:2], self.uniforms.shape[2] // self.chunk, self.chunk)
        out = jax.tree.map(
            lambda x: jnp.zeros((*chunks, *x.shape[1:]), x.dtype),
            (token, jax.ShapeDtypeStruct(token.shape, bool), kept, experts),
        )
        held = Contexts(number, started, mask.reshape(total, contexts, length), logits, cache)
        state = State(held, slots, queued, jnp.zeros((), jnp.int32), out)
        return state if self.refills else self.assign(state)

    def prefill(self, index: Int[Array, "W A"]) -> tuple[Array, Array, list[Cache]]:
        """Of these prompts of every shard: masks [W, A, P], logits [W, A, V], caches [W * A, K, P, N]."""
        tokens, mask = take(self.prompts, index), take(self.masks, index)
        rows = flat(mask)
        logits, cache = self.model.prefill(self.params, flat(tokens), rows, positions_from_mask(rows))
        return mask, split(logits, index.shape[0]), cache

    def free(self, state: State) -> Bool[Array, "W groups C"]:
        """Contexts without a prompt, or all of whose sequences have ended."""
        used = state.slots.alive[:, :, None] & self.of_contexts(state.slots.context)
        return split((state.contexts.started == self.samples) & ~used.any(1), self.prompts.shape[0])

    def of_contexts(self, context: Int[Array, "X M"]) -> Bool[Array, "X M C"]:
        """Which context a slot has, as one of all."""
        return context[:, :, None] == jnp.arange(self.shape[3])[None, None]

    def admit(self, state: State) -> State:
        """Prefill prompts of the queues, some at a time, until they are empty or no context is free."""
        _, groups, _, contexts, length = self.shape
        at_once = min(max(ADMITTED // length, 1), groups * contexts)

        def wanted(state: State) -> Array:
            return ((state.queued < self.count) & self.free(state).any((1, 2))).any()

        # For `plan`: on average in each of the chunks.
        rounds = -(-self.prompts.shape[1] // at_once)
        with jax.named_scope(f"unfilled_{rounds * self.chunk * self.at_once / self.uniforms[0].size:g}"):
            return jax.lax.while_loop(wanted, partial(self.admit_some, at_once=at_once), state)

    def admit_some(self, state: State, at_once: int) -> State:
        """`at_once` prompts of every shard into free contexts, as far as there are any."""
        ways, groups, _, contexts, length = self.shape
        # Free contexts [W, C * groups], first of the groups with the least left to draw: `at_once` of them.
        held, free = state.contexts, self.free(state)
        left = split(self.samples - held.started, ways).sum(2, keepdims=True)
        order = jnp.moveaxis(jnp.where(free, left, jnp.iinfo(jnp.int32).max), 2, 1).reshape(ways, -1)
        order = jnp.argsort(order, axis=1, stable=True)[:, :at_once]
        context, group = order // groups, order % groups
        number = state.queued[:, None] + jnp.arange(at_once)[None]
        good = (number < self.count[:, None]) & jax.vmap(lambda x, g, c: x[g, c])(free, group, context)
        group = jnp.where(good, group, groups)  # out of range, and so dropped
        mask, logits, cache = self.prefill(take(self.queue, jnp.minimum(number, self.queue.shape[1] - 1)))

        def put(old: Array, new: Array) -> Array:
            """[X, C, ...] with [W, A, ...] at their places."""
            place = jax.vmap(lambda old, new, g, c: old.at[g, c].set(new, mode="drop"))
            return place(split(old, ways), new, group, context).reshape(old.shape)

        def put_cache(old: Array, new: Array) -> Array:
            """[X, K, C * P, N] with [W * A, K, P, N]."""
            place = jax.vmap(lambda old, new, g, c: old.at[g, :, c].set(new, mode="drop"))
            apart = old.reshape(ways, groups, old.shape[1], contexts, length, old.shape[3])
            return place(apart, split(new, ways), group, context).reshape(old.shape)

        held = Contexts(
            put(held.number, number),
            put(held.started, jnp.zeros_like(number)),
            put(held.mask, mask),
            put(held.logits, logits),
            self.model.pinned(jax.tree.map(put_cache, held.cache, cache)),
        )
        return dataclasses.replace(state, contexts=held, queued=state.queued + good.sum(1, dtype=jnp.int32))

    # --- slots

    def assign(self, state: State) -> State:
        """Give free slots sequences of their group's contexts that have not started, of the older prompt first."""
        slots, contexts, ways = state.slots, state.contexts, self.prompts.shape[0]
        left = self.samples - contexts.started
        order = jnp.argsort(contexts.number, axis=1, stable=True)
        ordered = jnp.take_along_axis(left, order, axis=1)
        ends = jnp.cumsum(ordered, axis=1)  # of the sequences that are left, one context after another
        # The i-th free slot [X, M] takes the i-th sequence: which context, and which of its sequences.
        free = ~slots.alive
        rank = jnp.cumsum(free, axis=1) - 1
        nth = (ends[:, None] <= rank[:, :, None]).sum(2)
        new, nth = free & (nth < left.shape[1]), jnp.minimum(nth, left.shape[1] - 1)
        context = jnp.take_along_axis(order, nth, axis=1)
        of_context = partial(jnp.take_along_axis, indices=context, axis=1)
        before = rank - jnp.take_along_axis(ends - ordered, nth, axis=1)
        number = of_context(contexts.started) + before
        prompt = take(self.queue, split(of_context(contexts.number), ways)).reshape(context.shape)
        taken = (new[:, :, None] & self.of_contexts(context)).sum(1, dtype=jnp.int32)
        first = jnp.take_along_axis(contexts.logits, context[:, :, None], axis=1)
        slots = Slots(
            jnp.where(new, prompt * self.samples + number, slots.row),
            jnp.where(new, context, slots.context),
            jnp.where(new, 0, slots.place),
            slots.alive | new,
            jnp.where(new[:, :, None], first, slots.logits),
            slots.cache,
        )
        contexts = dataclasses.replace(contexts, started=contexts.started + taken)
        state = dataclasses.replace(state, slots=slots, contexts=contexts)
        return state if self.begun is None else self.go_on(state, self.begun)

    def go_on(self, state: State, begun: Begun) -> State:
        """The same with what the rows of slots have already; those that have ended leave theirs at once."""
        rows = self.by_shard(state.slots.row)
        goes_on = (take(begun.number, rows) < take(begun.limit, rows)).reshape(state.slots.row.shape)
        slots = dataclasses.replace(state.slots, alive=state.slots.alive & goes_on)
        state = dataclasses.replace(state, slots=slots)
        # For `plan`, where all rows go on: in all, or on average in each of the chunks.
        rounds = -(-self.uniforms.shape[1] // self.filled_at_once)
        chunks = begun.budget / self.chunk * self.uniforms.shape[1] / self.at_once
        with jax.named_scope(f"unfilled_{rounds / chunks:g}" if self.refills else f"trips_{rounds}"):
            return jax.lax.while_loop(lambda x: self.without(x, begun).any(), partial(self.fill, begun), state)

    @property
    def filled_at_once(self) -> int:
        """Rows of a shard whose earlier tokens are prefilled at once."""
        return min(max(ADMITTED // (self.prompts.shape[2] + self.uniforms.shape[2]), 1), self.at_once)

    def without(self, state: State, begun: Begun) -> Bool[Array, "W slots"]:
        """Slots that lack what their rows have."""
        row, place, alive = map(self.by_shard, (state.slots.row, state.slots.place, state.slots.alive))
        return alive & (place < take(begun.number, row))

    def fill(self, begun: Begun, state: State) -> State:
        """Prefill prompts and tokens of some rows of every shard, as far as there are slots without them."""
        (ways, _, _, _, length), columns = self.shape, begun.tokens.shape[2]
        empty = self.without(state, begun)
        slot = jnp.argsort(~empty, axis=1, stable=True)[:, : self.filled_at_once]
        row = take(self.by_shard(state.slots.row), slot)
        number, prompt = take(begun.number, row), row // self.samples
        # Prompt and tokens [W * A, P + S] moved to the right, so that the tokens end where the columns do.
        tokens = jnp.concatenate([take(self.prompts, prompt), take(begun.tokens, row)], axis=2)
        real = jnp.arange(columns)[None, None] < number[:, :, None]
        mask = jnp.concatenate([take(self.masks, prompt), real], axis=2)
        tokens, mask = (jax.vmap(jnp.roll)(flat(x), flat(columns - number)) for x in (tokens, mask))
        logits, cache = self.model.prefill(self.params, tokens, mask, positions_from_mask(mask))
        slot = jnp.where(take(empty, slot), slot, self.at_once)  # out of range, and so dropped

        def put(old: Array, new: Array) -> Array:
            """[X, M, ...] or [X * M, ...] with [W * A, ...] at their places."""
            place = jax.vmap(lambda old, new, slot: old.at[slot].set(new, mode="drop"))
            by_slot = old.reshape(ways, self.at_once, *new.shape[1:])
            return place(by_slot, split(new, ways), slot).reshape(old.shape)

        # The last token lies in the column before that of the next step.
        own = jax.tree.map(lambda new: jnp.roll(new[:, :, length:], state.step, axis=2), cache)
        slots = dataclasses.replace(
            state.slots,
            place=put(state.slots.place, flat(number)),
            logits=put(state.slots.logits, logits),
            cache=self.model.pinned(jax.tree.map(put, state.slots.cache, own)),
        )
        return dataclasses.replace(state, slots=slots)

    def by_shard(self, x: Array) -> Array:
        """Of slots, [X, M] as [W, slots of a shard]."""
        return split(flat(x), self.prompts.shape[0])

    def pending(self, state: State) -> Bool[Array, ""]:
        """Whether anything is left to draw."""
        waiting = (state.queued < self.count).any() | (state.contexts.started < self.samples).any()
        return state.slots.alive.any() | waiting

    def decode_chunk(self, state: State) -> State:
        """One chunk of tokens of every slot, written to the places of their rows."""
        if self.in_step:
            return self.draw_within(state, jax.tree.leaves(state.slots.cache)[0].shape[2])
        # What the oldest sequence needs with this chunk. A loop of at most one round changes the cache where it lies;
        # the branches of a conditional would copy it.
        oldest, widths = jnp.where(state.slots.alive, state.slots.place, 0).max(), self.widths()
        needed = (oldest + self.chunk > jnp.asarray(widths[:-1], jnp.int32)).sum()
        for i, width in enumerate(widths):
            once = lambda carry, width=width: (self.draw_within(carry[0], width), jnp.array(False))  # noqa: E731
            with jax.named_scope(f"trips_{int(width == widths[-1])}"):  # for `plan`: as if some row were always old
                state = jax.lax.while_loop(lambda carry: carry[1], once, (state, needed == i))[0]
        return state

    def draw_within(self, state: State, width: int) -> State:
        """A chunk where no sequence sees more than the last `width` columns, those of this chunk included."""
        slots, ways = state.slots, self.prompts.shape[0]
        if width == jax.tree.leaves(slots.cache)[0].shape[2]:
            after, cache, new = self.draw_chunk(state, slots.cache, state.step)
        else:
            cache = self.model.pinned(slots.latest(state.step + self.chunk, width, self.chunk))
            after, cache, new = self.draw_chunk(state, cache, jnp.int32(width - self.chunk))
            cache = self.model.pinned(slots.renewed(cache, state.step, self.chunk))
        # [chunk, R, ...] -> [W, R / W, chunk, ...], to chunk `number` of row `row`; an idle slot has none.
        row, number = self.by_shard(slots.row), self.by_shard(slots.place // self.chunk)
        target = jnp.where(split(flat(slots.alive), ways), row, self.uniforms.shape[1])
        put = jax.vmap(lambda old, new, r, n: old.at[r, n].set(new, mode="drop"))
        out = jax.tree.map(lambda old, x: put(old, split(jnp.moveaxis(x, 0, 1), ways), target, number), state.out, new)
        logits, place, alive = (x.reshape(*slots.row.shape, *x.shape[1:]) for x in after)
        slots = Slots(slots.row, slots.context, place, alive, logits, cache)
        return dataclasses.replace(state, slots=slots, step=state.step + self.chunk, out=out)

    def draw_chunk(self, state: State, cache: list[Cache], first: Int[Array, ""]) -> tuple[Any, list[Cache], Any]:
        """One chunk of tokens of every slot, with a cache [R, K, columns, N] whose column for the first is `first`.

        Returns logits, places and who is alive after it, [R, ...] each, the cache, and the tokens, [chunk, R, ...].
        """
        slots, held, length = state.slots, state.contexts, self.shape[-1]
        columns = jax.tree.leaves(cache)[0].shape[2]
        # The prompts' columns [R, C * P], R = X * M: those of a slot's context, and how far before the first token.
        own = flat((self.of_contexts(slots.context)[..., None] & held.mask[:, None]).reshape(*slots.row.shape, -1))
        before = jnp.tile(length - jnp.arange(length), self.shape[3])[None]
        lengths = flat(jnp.take_along_axis(held.mask.sum(2, dtype=jnp.int32), slots.context, axis=1))

        def one_token(carry: Any, xs: Any) -> tuple[Any, Any]:
            logits, cache, place, alive = carry
            uniform, step = xs
            if self.is_stop is not None:
                early = (place < self.min_new_tokens)[:, None]
                logits = jnp.where(self.is_stop[None] & early, -jnp.inf, logits)
            token, kept = jax.tree.map(partial(_where, alive), self.draw(logits, uniform))
            age = ((step - jnp.arange(columns)) % columns)[None]
            sees = jnp.concatenate([own, age <= place[:, None]], axis=1)
            apart = jnp.concatenate([before + place[:, None], jnp.broadcast_to(age, (len(place), columns))], axis=1)
            at = lengths + place
            read = self.params, token, at, sees, apart, held.cache, cache, step % columns
            logits, cache, experts = self.model.decode(*read)
            experts = experts.astype(EXPERT) if self.routing and experts is not None else None
            out = (token, alive, kept, experts)
            place = place + alive
            alive = alive & (place < limit)
            if self.is_stop is not None:
                alive = alive & ~self.is_stop[token]
            return (logits, cache, place, alive), out

        # Uniforms of the slots' rows, chunk of the row: [W, rows, chunk] -> [chunk, R].
        row, number = self.by_shard(slots.row), self.by_shard(slots.place // self.chunk)
        limit = self.max_new_tokens if self.begun is None else take(self.begun.limit, row).reshape(-1)
        cut = lambda x: x.reshape(*x.shape[:2], -1, self.chunk)  # noqa: E731
        uniforms = flat(jax.vmap(lambda u, r, n: u[r, n])(cut(self.uniforms), row, number)).T
        start = (flat(slots.logits), cache, flat(slots.place), flat(slots.alive))
        (logits, cache, place, alive), new = jax.lax.scan(one_token, start, (uniforms, first + jnp.arange(self.chunk)))
        return (logits, place, alive), cache, new


def _where(alive: Bool[Array, " R"], x: Array) -> Array:
    """[R, ...], 0 where no sequence is drawn."""
    return jnp.where(alive.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros((), x.dtype))
