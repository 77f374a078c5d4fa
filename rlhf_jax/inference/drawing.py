"""The loop of a rollout, and one chunk of tokens of every slot. `engine` has the shapes."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from rlhf_jax.inference.admission import admit, assign, start
from rlhf_jax.inference.engine import EXPERT, Engine
from rlhf_jax.inference.slots import Slots, State, flat, split, take, widened, width_of
from rlhf_jax.models.cache import Columns, apart, together
from rlhf_jax.models.delta import Recurrent


def run(engine: Engine) -> Any:
    """`State.out`, [W, rows, S, ...] each, when all is drawn."""
    state, done = start(engine), 0
    begin = (lambda state: assign(engine, admit(engine, state))) if engine.refills else lambda state: state
    for columns in engine.widths() if engine.in_step else engine.widths()[-1:]:
        last = columns == engine.uniforms.shape[2]
        cache = jax.tree.map(partial(widened, columns=columns), state.slots.cache)
        state = dataclasses.replace(state, slots=dataclasses.replace(state.slots, cache=cache))
        go_on = lambda state, n=columns, last=last: pending(engine, state) & (last | (state.step < n))  # noqa: E731
        most = columns - done if engine.begun is None else engine.begun.budget
        with engine.trips(most / engine.chunk * engine.uniforms.shape[1] / engine.at_once):
            state = jax.lax.while_loop(go_on, lambda state: decode_chunk(engine, begin(state)), state)
        done = columns
    return jax.tree.map(lambda x: x.reshape(*x.shape[:2], -1, *x.shape[4:]), state.out)


def pending(engine: Engine, state: State) -> Bool[Array, ""]:
    """Whether anything is left to draw."""
    waiting = (state.queued < engine.count).any() | (state.contexts.started < engine.samples).any()
    return state.slots.alive.any() | waiting


def decode_chunk(engine: Engine, state: State) -> State:
    """One chunk of tokens of every slot, written to the places of their rows."""
    if engine.in_step:
        return draw_within(engine, state, width_of(state.slots.cache))
    # What the oldest sequence needs with this chunk. A loop of at most one round changes the cache where it lies;
    # the branches of a conditional would copy it.
    oldest, widths = jnp.where(state.slots.alive, state.slots.place, 0).max(), engine.widths()
    needed = (oldest + engine.chunk > jnp.asarray(widths[:-1], jnp.int32)).sum()
    for i, width in enumerate(widths):
        once = lambda carry, width=width: (draw_within(engine, carry[0], width), jnp.array(False))  # noqa: E731
        with jax.named_scope(f"trips_{int(width == widths[-1])}"):  # for `plan`: as if some row were always old
            state = jax.lax.while_loop(lambda carry: carry[1], once, (state, needed == i))[0]
    return state


def draw_within(engine: Engine, state: State, width: int) -> State:
    """A chunk where no sequence sees more than the last `width` columns, those of this chunk included."""
    slots, ways = state.slots, engine.prompts.shape[0]
    if width == width_of(slots.cache):
        after, cache, states, new = draw_chunk(engine, state, slots.cache, state.step)
    else:
        cache = engine.model.pinned(slots.latest(state.step + engine.chunk, width, engine.chunk))
        after, cache, states, new = draw_chunk(engine, state, cache, jnp.int32(width - engine.chunk))
        cache = engine.model.pinned(slots.renewed(cache, state.step, engine.chunk))
    # [chunk, R, ...] -> [W, R / W, chunk, ...], to chunk `number` of row `row`; an idle slot has none.
    row, number = engine.by_shard(slots.row), engine.by_shard(slots.place // engine.chunk)
    target = jnp.where(split(flat(slots.alive), ways), row, engine.uniforms.shape[1])
    put = jax.vmap(lambda old, new, r, n: old.at[r, n].set(new, mode="drop"))
    out = jax.tree.map(lambda old, x: put(old, split(jnp.moveaxis(x, 0, 1), ways), target, number), state.out, new)
    logits, place, alive = (x.reshape(*slots.row.shape, *x.shape[1:]) for x in after)
    slots = Slots(slots.row, slots.context, place, alive, logits, cache, states)
    return dataclasses.replace(state, slots=slots, step=state.step + engine.chunk, out=out)


def draw_chunk(
    engine: Engine, state: State, cache: list[Columns | None], first: Int[Array, ""]
) -> tuple[Any, list[Columns | None], list[Recurrent | None], Any]:
    """One chunk of tokens of every slot, with a cache [R, K, columns, N] whose column for the first is `first`.

    Returns logits, places and who is alive after it, [R, ...] each, cache, states, and the tokens, [chunk, R, ...].
    """
    slots, held, length = state.slots, state.contexts, engine.shape[-1]
    columns = width_of(cache)
    # The prompts' columns [R, C * P], R = X * M: those of a slot's context, and how far before the first token.
    own = flat((engine.of_contexts(slots.context)[..., None] & held.mask[:, None]).reshape(*slots.row.shape, -1))
    before = jnp.tile(length - jnp.arange(length), engine.shape[3])[None]
    lengths = flat(jnp.take_along_axis(held.mask.sum(2, dtype=jnp.int32), slots.context, axis=1))

    def unended(logits: Array, place: Array) -> Array:
        """Without stop ids before `min_new_tokens`; as logits are made, so that they are not read once more for it."""
        if engine.is_stop is None:
            return logits
        return jnp.where(engine.is_stop[None] & (place < engine.min_new_tokens)[:, None], -jnp.inf, logits)

    def one_token(carry: Any, xs: Any) -> tuple[Any, Any]:
        logits, cache, place, alive = carry
        uniform, step = xs
        token, kept = jax.tree.map(partial(_where, alive), engine.draw(logits, uniform))
        age = ((step - jnp.arange(columns)) % columns)[None]
        sees = jnp.concatenate([own, age <= place[:, None]], axis=1)
        apart = jnp.concatenate([before + place[:, None], jnp.broadcast_to(age, (len(place), columns))], axis=1)
        at = lengths + place
        read = engine.params, token, at, sees, apart, held.cache, cache, step % columns
        logits, cache, experts = engine.model.decode(*read)
        experts = experts.astype(EXPERT) if engine.routing and experts is not None else None
        out = (token, alive, kept, experts)
        place = place + alive
        alive = alive & (place < limit)
        if engine.is_stop is not None:
            alive = alive & ~engine.is_stop[token]
        return (unended(logits, place), cache, place, alive), out

    # Uniforms of the slots' rows, chunk of the row: [W, rows, chunk] -> [chunk, R].
    row, number = engine.by_shard(slots.row), engine.by_shard(slots.place // engine.chunk)
    limit = engine.max_new_tokens if engine.begun is None else take(engine.begun.limit, row).reshape(-1)
    cut = lambda x: x.reshape(*x.shape[:2], -1, engine.chunk)  # noqa: E731
    uniforms = flat(jax.vmap(lambda u, r, n: u[r, n])(cut(engine.uniforms), row, number)).T
    logits, place, alive = flat(slots.logits), flat(slots.place), flat(slots.alive)
    start = (unended(logits, place), together(cache, slots.states), place, alive)
    (logits, after, place, alive), new = jax.lax.scan(one_token, start, (uniforms, first + jnp.arange(engine.chunk)))
    return (logits, place, alive), *apart(after), new


def _where(alive: Bool[Array, " R"], x: Array) -> Array:
    """[R, ...], 0 where no sequence is drawn."""
    return jnp.where(alive.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros((), x.dtype))
