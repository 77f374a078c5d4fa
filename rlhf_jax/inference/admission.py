"""Which prompt has a context and which sequence a slot, between the chunks of a rollout. `engine` has the shapes."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from rlhf_jax.inference.engine import ADMITTED, EXPERT, Engine
from rlhf_jax.inference.slots import Begun, Contexts, Slots, State, flat, split, take
from rlhf_jax.models.cache import apart
from rlhf_jax.tokens import positions_from_mask


def start(engine: Engine) -> State:
    """No sequence yet where slots are refilled; else all of them, at their first token."""
    ways, groups, width, contexts, length = engine.shape
    total, columns = ways * groups, engine.widths()[0 if engine.in_step else -1]
    whole = partial(engine.prefill, width=length)
    if engine.refills:
        shapes = jax.eval_shape(whole, jnp.zeros((ways, groups * contexts), jnp.int32))
        mask, logits, cache, states = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        number, queued = jnp.zeros((total, contexts), jnp.int32), jnp.zeros(ways, jnp.int32)
        started = jnp.full((total, contexts), engine.samples, jnp.int32)
    else:
        mask, logits, cache, states = whole(engine.queue)
        numbers = jnp.broadcast_to(jnp.arange(groups, dtype=jnp.int32)[None], (ways, groups))
        number, queued = flat(numbers)[:, None], engine.count
        started = flat(jnp.where(numbers < queued[:, None], 0, engine.samples))[:, None]
    # Masks and logits [W, groups * C, ...] by group; caches [W * groups * C, K, P, N] as [X, K, C * P, N].
    mask, logits = (x.reshape(total, contexts, -1) for x in (mask, logits))
    side_by_side = lambda x: jnp.moveaxis(split(x, total), 1, 2).reshape(total, x.shape[1], -1, x.shape[3])  # noqa: E731
    cache = engine.model.pinned(jax.tree.map(side_by_side, cache))
    own = jax.tree.map(lambda x: jnp.zeros((total * width, x.shape[1], columns, x.shape[3]), x.dtype), cache)
    none = jnp.zeros((total, width), jnp.int32)
    first = jnp.zeros((total, width, logits.shape[-1]), logits.dtype)
    stateless = jax.tree.map(lambda x: jnp.zeros((total * width, *x.shape[1:]), x.dtype), states)
    slots = Slots(none, none, none, none > 0, first, *map(engine.model.pinned, (own, stateless)))
    # What `draw` makes of all slots, for every row instead.
    token, kept = jax.eval_shape(engine.draw, first.reshape(total * width, -1), jnp.zeros(total * width))
    arch = engine.model.arch
    of_token = (len(token), arch.expert_layers, arch.experts_per_token)
    experts = jax.ShapeDtypeStruct(of_token, EXPERT) if engine.routing else None
    chunks = (*engine.uniforms.shape[:2], engine.uniforms.shape[2] // engine.chunk, engine.chunk)
    out = jax.tree.map(
        lambda x: jnp.zeros((*chunks, *x.shape[1:]), x.dtype),
        (token, jax.ShapeDtypeStruct(token.shape, bool), kept, experts),
    )
    held = Contexts(number, started, mask.reshape(total, contexts, length), logits, cache, states)
    state = State(held, slots, queued, jnp.zeros((), jnp.int32), out)
    return state if engine.refills else assign(engine, state)


def admit(engine: Engine, state: State) -> State:
    """Prefill prompts of the queues, some at a time, until they are empty or no context is free.

    Many at a time where there are more than half as many, else few, so that an early end does not cost many prompts.
    The longest come first; where these fit in fewer columns, few are prefilled in as many (`Engine.prompt_widths`).
    """
    _, groups, _, contexts, length = engine.shape
    at_once = lambda tokens, width: min(max(tokens // width, 1), groups * contexts)  # noqa: E731
    many, widths = at_once(ADMITTED, length), engine.prompt_widths()

    def wanted(state: State) -> Array:
        """How many prompts of the shard that has most to admit."""
        free = free_contexts(engine, state).sum((1, 2))
        return jnp.minimum(free, engine.count - state.queued).max()

    def longest(state: State) -> Array:
        """Tokens of the next prompt of any shard."""
        number = jnp.minimum(state.queued, engine.queue.shape[1] - 1)[:, None]
        tokens = take(engine.masks, take(engine.queue, number)).sum((1, 2))
        return jnp.where(state.queued < engine.count, tokens, 0).max()

    # (how many at once, in how many columns; while more than these are wanted, and the longest has more tokens)
    loops = [(at_once(ADMITTED // 4, w), w, 0, least) for w, least in zip(widths, [-1, *widths], strict=False)][::-1]
    if many > loops[0][0]:
        loops = [(many, length, many // 2, loops[0][3]), *loops]
    # For `plan`: the first on average in each of the chunks, many at a time.
    chunks = engine.uniforms[0].size / engine.chunk / engine.at_once
    rounds = -(-engine.prompts.shape[1] // many) / chunks
    for i, (count, width, enough, narrower) in enumerate(loops):
        some = partial(admit_some, engine, at_once=count, width=width)
        left = lambda x, n=enough, least=narrower: (wanted(x) > n) & (longest(x) > least)  # noqa: E731
        with jax.named_scope("trips_0" if i else f"unfilled_{rounds:g}"):
            state = jax.lax.while_loop(left, some, state)
    return state


def admit_some(engine: Engine, state: State, at_once: int, width: int) -> State:
    """`at_once` prompts of every shard, of at most `width` tokens, into free contexts, as far as there are any."""
    ways, groups, _, contexts, length = engine.shape
    # Free contexts [W, C * groups], first of the groups with the least left to draw: `at_once` of them.
    held, free = state.contexts, free_contexts(engine, state)
    left = split(engine.samples - held.started, ways).sum(2, keepdims=True)
    order = jnp.moveaxis(jnp.where(free, left, jnp.iinfo(jnp.int32).max), 2, 1).reshape(ways, -1)
    order = jnp.argsort(order, axis=1, stable=True)[:, :at_once]
    context, group = order // groups, order % groups
    number = state.queued[:, None] + jnp.arange(at_once)[None]
    good = (number < engine.count[:, None]) & jax.vmap(lambda x, g, c: x[g, c])(free, group, context)
    group = jnp.where(good, group, groups)  # out of range, and so dropped
    index = take(engine.queue, jnp.minimum(number, engine.queue.shape[1] - 1))
    mask, logits, cache, states = engine.prefill(index, width)

    def put(old: Array, new: Array) -> Array:
        """[X, C, ...] or [X * C, ...] with [W, A, ...] at their places."""
        place = jax.vmap(lambda old, new, g, c: old.at[g, c].set(new, mode="drop"))
        return place(old.reshape(ways, groups, contexts, *new.shape[2:]), new, group, context).reshape(old.shape)

    def put_columns(old: Array, new: Array) -> Array:
        """[X, K, C * P, N] with [W, A, K, width, N], the last columns of a context."""
        place = jax.vmap(lambda old, new, g, c: old.at[g, :, c, length - width :].set(new, mode="drop"))
        by_context = old.reshape(ways, groups, old.shape[1], contexts, length, old.shape[3])
        return place(by_context, new, group, context).reshape(old.shape)

    cache, states = jax.tree.map(lambda x: split(x, ways), (cache, states))
    held = Contexts(
        put(held.number, number),
        put(held.started, jnp.zeros_like(number)),
        put(held.mask, mask),
        put(held.logits, logits),
        engine.model.pinned(jax.tree.map(put_columns, held.cache, cache)),
        engine.model.pinned(jax.tree.map(put, held.states, states)),
    )
    return dataclasses.replace(state, contexts=held, queued=state.queued + good.sum(1, dtype=jnp.int32))


def free_contexts(engine: Engine, state: State) -> Bool[Array, "W groups C"]:
    """Contexts without a prompt, or all of whose sequences have ended."""
    used = state.slots.alive[:, :, None] & engine.of_contexts(state.slots.context)
    return split((state.contexts.started == engine.samples) & ~used.any(1), engine.prompts.shape[0])


def assign(engine: Engine, state: State) -> State:
    """Give free slots sequences of their group's contexts that have not started, of the older prompt first."""
    slots, contexts, ways = state.slots, state.contexts, engine.prompts.shape[0]
    left = engine.samples - contexts.started
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
    prompt = take(engine.queue, split(of_context(contexts.number), ways)).reshape(context.shape)
    taken = (new[:, :, None] & engine.of_contexts(context)).sum(1, dtype=jnp.int32)
    first = jnp.take_along_axis(contexts.logits, context[:, :, None], axis=1)

    def begun(old: Array, held: Array) -> Array:
        """The states of slots [X * M, ...] with those of the contexts [X * C, ...] that new sequences have."""
        after_prompt = take(split(held, len(context)), context).reshape(old.shape)
        return jnp.where(new.reshape(-1, *[1] * (old.ndim - 1)), after_prompt, old)

    slots = Slots(
        jnp.where(new, prompt * engine.samples + number, slots.row),
        jnp.where(new, context, slots.context),
        jnp.where(new, 0, slots.place),
        slots.alive | new,
        jnp.where(new[:, :, None], first, slots.logits),
        slots.cache,
        engine.model.pinned(jax.tree.map(begun, slots.states, contexts.states)),
    )
    contexts = dataclasses.replace(contexts, started=contexts.started + taken)
    state = dataclasses.replace(state, slots=slots, contexts=contexts)
    return state if engine.begun is None else go_on(engine, state, engine.begun)


def go_on(engine: Engine, state: State, begun: Begun) -> State:
    """The same with what the rows of slots have already; those that have ended leave theirs at once."""
    rows = engine.by_shard(state.slots.row)
    goes_on = (take(begun.number, rows) < take(begun.limit, rows)).reshape(state.slots.row.shape)
    slots = dataclasses.replace(state.slots, alive=state.slots.alive & goes_on)
    state = dataclasses.replace(state, slots=slots)
    # For `plan`, where all rows go on: in all, or on average in each of the chunks.
    rounds = -(-engine.uniforms.shape[1] // engine.filled_at_once)
    chunks = begun.budget / engine.chunk * engine.uniforms.shape[1] / engine.at_once
    with jax.named_scope(f"unfilled_{rounds / chunks:g}" if engine.refills else f"trips_{rounds}"):
        return jax.lax.while_loop(lambda x: without(engine, x, begun).any(), partial(fill, engine, begun), state)


def without(engine: Engine, state: State, begun: Begun) -> Bool[Array, "W slots"]:
    """Slots that lack what their rows have."""
    row, place, alive = map(engine.by_shard, (state.slots.row, state.slots.place, state.slots.alive))
    return alive & (place < take(begun.number, row))


def fill(engine: Engine, begun: Begun, state: State) -> State:
    """Prefill prompts and tokens of some rows of every shard, as far as there are slots without them."""
    (ways, _, _, _, length), columns = engine.shape, begun.tokens.shape[2]
    empty = without(engine, state, begun)
    slot = jnp.argsort(~empty, axis=1, stable=True)[:, : engine.filled_at_once]
    row = take(engine.by_shard(state.slots.row), slot)
    number, prompt = take(begun.number, row), row // engine.samples
    # Prompt and tokens [W * A, P + S] moved to the right, so that the tokens end where the columns do.
    tokens = jnp.concatenate([take(engine.prompts, prompt), take(begun.tokens, row)], axis=2)
    real = jnp.arange(columns)[None, None] < number[:, :, None]
    mask = jnp.concatenate([take(engine.masks, prompt), real], axis=2)
    tokens, mask = (jax.vmap(jnp.roll)(flat(x), flat(columns - number)) for x in (tokens, mask))
    logits, read = engine.model.prefill(engine.params, tokens, mask, positions_from_mask(mask))
    slot = jnp.where(take(empty, slot), slot, engine.at_once)  # out of range, and so dropped

    def put(old: Array, new: Array) -> Array:
        """[X, M, ...] or [X * M, ...] with [W * A, ...] at their places."""
        place = jax.vmap(lambda old, new, slot: old.at[slot].set(new, mode="drop"))
        by_slot = old.reshape(ways, engine.at_once, *new.shape[1:])
        return place(by_slot, split(new, ways), slot).reshape(old.shape)

    # The last token lies in the column before that of the next step.
    cache, states = apart(read)
    own = jax.tree.map(lambda new: jnp.roll(new[:, :, length:], state.step, axis=2), cache)
    slots = dataclasses.replace(
        state.slots,
        place=put(state.slots.place, flat(number)),
        logits=put(state.slots.logits, logits),
        cache=engine.model.pinned(jax.tree.map(put, state.slots.cache, own)),
        states=engine.model.pinned(jax.tree.map(put, state.slots.states, states)),
    )
    return dataclasses.replace(state, slots=slots)
