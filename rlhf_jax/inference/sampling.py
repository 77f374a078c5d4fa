"""Sampling: prefill, then decoding in scanned chunks with an early stop between them. Token ids in, `Rollout` out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.config import SamplingConfig
from rlhf_jax.models.model import Model, of_length
from rlhf_jax.tokens import map_microbatches, positions_from_mask
from rlhf_jax.types import Params, Rollout


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingLaw:
    """What is drawn from; scalars on the device, so that changing them compiles nothing.

    Attributes:
        temperature: float32[]; 0 is greedy.
        top_k: int32[]; 0 keeps all.
        top_p: float32[]; 1 keeps all.
        min_new_tokens: int32[].
    """

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_new_tokens: Int[Array, ""]

    @classmethod
    def from_config(cls, config: SamplingConfig, sharding: Sharding | None = None) -> SamplingLaw:
        """Scalars, put where `sharding` says (on the first device) explicitly, so that a transfer guard is content."""
        values = (
            np.float32(config.temperature),
            np.int32(config.top_k),
            np.float32(config.top_p),
            np.int32(config.min_new_tokens),
        )
        return cls(*(jax.device_put(value, sharding) for value in values))


def _ordered(x: Float[Array, "B V"]) -> Int[Array, "B V"]:
    """Integers in the order of the floats, so that thresholds can be found bit by bit."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)  # -0.0 ties with 0.0
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _largest_threshold(keys: Int[Array, "B V"], enough: Callable[[Array], Array]) -> Int[Array, "B 1"]:
    """The largest int32 t with enough(keys >= t), by bisection: 32 passes, no sort, exact. `enough` falls with t."""
    low = jnp.full((keys.shape[0], 1), jnp.iinfo(jnp.int32).min, jnp.int32)
    high = jnp.full_like(low, jnp.iinfo(jnp.int32).max)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1) + ((low ^ high) & 1)  # the upper mean, without overflow
        good = enough(keys >= middle)
        return jnp.where(good, middle, low), jnp.where(good, high, middle - 1)

    return jax.lax.fori_loop(0, 32, halve, (low, high))[0]


def keep_top_k(logits: Float[Array, "B V"], k: Int[Array, ""]) -> Bool[Array, "B V"]:
    """The k largest entries of each row, and whatever ties with the k-th; k = 0 keeps all. (Fan et al. 2018)"""
    keys = _ordered(logits)
    threshold = _largest_threshold(keys, lambda above: above.sum(-1, keepdims=True) >= jnp.maximum(k, 1))
    return jnp.where(k > 0, keys >= threshold, True)


def keep_top_p(probs: Float[Array, "B V"], p: Float[Array, ""]) -> Bool[Array, "B V"]:
    """The most likely entries up to the one whose mass crosses p, which is kept; p = 1 keeps all.

    Holtzman et al. 2020, arXiv 1904.09751. The most likely entry is kept even at p = 0.
    """
    keys = _ordered(probs)

    def enough(above: Array) -> Array:
        mass = jnp.where(above, probs, 0.0).sum(-1, keepdims=True)
        return (mass > 0) & (mass >= p * probs.sum(-1, keepdims=True))

    return jnp.where(p < 1, keys >= _largest_threshold(keys, enough), True)


def draw(probs: Float[Array, "B V"], uniform: Float[Array, " B"]) -> Int[Array, " B"]:
    """One index per row by inverse CDF, from unnormalised `probs` and one uniform number in [0, 1) per row.

    In two levels of about sqrt(V): first the block, then the entry. Never an entry of probability 0.
    """
    rows, size = probs.shape
    width = max(1, int(size**0.5))
    blocks = jnp.pad(probs, ((0, 0), (0, -size % width))).reshape(rows, -1, width)

    def choose(weights: Array, target: Array) -> tuple[Array, Array]:
        cdf = jnp.cumsum(weights, axis=-1)
        hit = (cdf > target[:, None]) & (weights > 0)
        # Rounding may leave no hit at the very end of the CDF: take the last possible entry then.
        last = weights.shape[-1] - 1 - jnp.argmax((weights > 0)[:, ::-1], axis=-1)
        index = jnp.where(hit.any(-1), jnp.argmax(hit, axis=-1), last)
        before = jnp.take_along_axis(cdf - weights, index[:, None], axis=-1)[:, 0]
        return index, target - before

    sums = blocks.sum(-1)
    block, rest = choose(sums, uniform * sums.sum(-1))
    entry, _ = choose(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], rest)
    return (block * width + entry).astype(jnp.int32)


def draw_from_logits(
    logits: Float[Array, "B V"], uniform: Float[Array, " B"], law: SamplingLaw, *, candidates: int, filtered: bool
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Tokens and their log-probs under the law: logits / temperature, then top-k, then top-p, renormalised.

    `filtered` (static) says that top-k or top-p may be on; `candidates` > 0 (static) sorts that many top entries out
    first, which is faster than searching the whole vocabulary and exact while law.top_k is positive and the ties at
    the k-th entry fit in.
    """
    greedy = law.temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, law.temperature)
    ids = None
    if candidates and filtered:
        scaled, ids = jax.lax.top_k(scaled, candidates)
    top = scaled.max(axis=-1, keepdims=True)
    probs = jnp.exp(scaled - top)
    if filtered:
        probs = jnp.where(keep_top_k(scaled, law.top_k), probs, 0.0)
        probs = jnp.where(keep_top_p(probs, law.top_p), probs, 0.0)
    index = jnp.where(greedy, jnp.argmax(scaled, axis=-1).astype(jnp.int32), draw(probs, uniform))
    # In the order of `token_logprobs`, so that the same logits have the same log-probs.
    logprob = jnp.take_along_axis(scaled, index[:, None], axis=-1)[:, 0] - (jnp.log(probs.sum(-1)) + top[:, 0])
    token = index if ids is None else jnp.take_along_axis(ids, index[:, None], axis=-1)[:, 0]
    return token, jnp.where(greedy, 0.0, logprob)


def sample(
    model: Model,
    params: Params,
    prompt: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    key: Array,
    law: SamplingLaw,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    chunk: int,
    candidates: int = 0,
    filtered: bool = True,
    microbatch: int = 0,
) -> Rollout:
    """Draw responses to left-padded prompts; call it inside jit, with the arguments after `law` static.

    A row ends with the first stop id, which is part of the response; with no `stop_ids` every row runs the full
    length. Every `chunk` tokens the loop looks whether all rows have ended. Log-probs are of the law sampled from
    (greedy: 0, a certain event). A rotary law that depends on length is that of model.length, or else of P +
    max_new_tokens. The noise of a row depends on the key and its place in the batch only, so a microbatch or a mesh
    changes nothing.
    """
    uniforms = jax.random.uniform(key, (prompt.shape[0], max_new_tokens))
    model = of_length(model, prompt.shape[1] + max_new_tokens)
    decode_params = model.decoding_params(params)
    rows = partial(
        _sample_rows,
        model,
        decode_params,
        law,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        chunk=min(chunk, max_new_tokens),
        candidates=min(candidates, model.arch.vocab_size),
        filtered=filtered,
    )
    return map_microbatches(lambda xs: rows(*xs), (prompt, prompt_mask, uniforms), microbatch)


def _sample_rows(
    model: Model,
    params: Params,
    law: SamplingLaw,
    prompt: Array,
    prompt_mask: Array,
    uniforms: Array,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    chunk: int,
    candidates: int,
    filtered: bool,
) -> Rollout:
    """`sample` of some rows: prompt and mask [B, P], uniforms [B, T]; `steps` >= T is whole chunks."""
    rows, prompt_len = prompt.shape
    num_chunks = -(-max_new_tokens // chunk)
    steps = num_chunks * chunk
    uniforms = jnp.pad(uniforms, ((0, 0), (0, steps - max_new_tokens)))
    logits, cache = model.prefill(params, prompt, prompt_mask, positions_from_mask(prompt_mask))
    # logits [B, V] of the first token, and per layer keys and values [B, K, P, N], which grow to S = P + steps.
    # The last token is never fed back, so the cache needs steps - 1 more columns; one more keeps the writes in range.
    cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, steps), (0, 0))), cache)
    # Columns of the cache: which hold the prompt, bool[B, S]; a row's next position is its length and the step.
    columns = jnp.arange(prompt_len + steps)
    prompt_columns = jnp.pad(prompt_mask, ((0, 0), (0, steps)))
    lengths = prompt_mask.sum(axis=-1, dtype=jnp.int32)
    stops = jnp.asarray(stop_ids, jnp.int32)
    is_stop_id = jnp.zeros(model.arch.vocab_size, bool).at[stops].set(True) if stop_ids else None

    # One token of every row: (logits, cache, done [B]) -> the same after it, and (token, log-prob, kept), [B] each.
    def one_token(carry: Any, step: Array) -> tuple[Any, Any]:
        logits, cache, done = carry
        if is_stop_id is not None:
            logits = jnp.where(is_stop_id & (step < law.min_new_tokens), -jnp.inf, logits)
        uniform = jax.lax.dynamic_index_in_dim(uniforms, step, axis=1, keepdims=False)
        token, logprob = draw_from_logits(logits, uniform, law, candidates=candidates, filtered=filtered)
        out = (jnp.where(done, 0, token), jnp.where(done, 0.0, logprob), ~done)
        if stop_ids:
            done = done | (token[:, None] == stops[None, :]).any(-1)
        index = prompt_len + step
        mask = prompt_columns | ((columns >= prompt_len) & (columns <= index))[None]
        logits, cache = model.decode(params, out[0], lengths + step, mask, cache, index)
        return (logits, cache, done), out

    # A chunk of tokens, written to out [steps, B] at its place.
    def one_chunk(state: Any) -> Any:
        number, carry, out = state
        carry, new = jax.lax.scan(one_token, carry, number * chunk + jnp.arange(chunk))
        out = jax.tree.map(lambda o, n: jax.lax.dynamic_update_slice_in_dim(o, n, number * chunk, axis=0), out, new)
        return number + 1, carry, out

    out = (jnp.zeros((steps, rows), jnp.int32), jnp.zeros((steps, rows)), jnp.zeros((steps, rows), bool))
    start = (jnp.zeros((), jnp.int32), (logits, cache, jnp.zeros(rows, bool)), out)
    unfinished = lambda state: (state[0] < num_chunks) & ~state[1][2].all()  # noqa: E731
    _, (_, _, done), out = jax.lax.while_loop(unfinished, one_chunk, start)
    tokens, logprobs, mask = (x.T[:, :max_new_tokens] for x in out)
    finished = done if steps == max_new_tokens else (mask & jnp.isin(tokens, stops)).any(-1)
    return Rollout(prompt, prompt_mask, tokens, mask, logprobs, finished)
