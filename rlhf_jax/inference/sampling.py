"""Sampling: the law that tokens are drawn from, and `sample`. Token ids in, `Rollout` out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Bool, Float, Int, Shaped

from rlhf_jax.config import SamplingConfig
from rlhf_jax.config.checks import COLDEST
from rlhf_jax.inference import drawing
from rlhf_jax.inference.engine import Engine
from rlhf_jax.inference.slots import Begun, choose_slots, queue_of, split
from rlhf_jax.models.attention import LANES
from rlhf_jax.models.model import Model, of_length
from rlhf_jax.sharding import data_ways, on_own_rows
from rlhf_jax.tokens import map_microbatches
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

    In two levels of about sqrt(V): first the block, then the entry. Never an entry of probability 0. The numbers are
    multiples of 2**-23, so that 0, and the border of a block, stand for half a step behind: else what comes first
    there would be drawn so often, were its chance 1e-20.
    """
    return _drawn(probs, uniform, lambda entries: entries, 0.0)[0]


def _drawn(
    entries: Float[Array, "B V"], uniform: Float[Array, " B"], probs: Callable[[Array], Array], impossible: float
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """`draw` from probs(entries), which is written nowhere, 0 of what is `impossible`. Returns the entries as well."""
    rows, size = entries.shape
    width = _block_width(size)
    entries = jnp.pad(entries, ((0, 0), (0, -size % width)), constant_values=impossible)

    def choose(weights: Array, target: Array) -> tuple[Array, Array]:
        cdf = jnp.cumsum(weights, axis=-1)
        hit = (cdf > target[:, None]) & (weights > 0)
        # Rounding may leave no hit at the very end of the CDF: take the last possible entry then.
        last = weights.shape[-1] - 1 - jnp.argmax((weights > 0)[:, ::-1], axis=-1)
        index = jnp.where(hit.any(-1), jnp.argmax(hit, axis=-1), last)
        return index, target - _at(cdf - weights, index)

    # Eight rows of a shard at a time, as a TPU's memory has them: row by row all would be copied into another order.
    tall = math.gcd(rows // math.gcd(rows, data_ways()), 8)
    tiles = probs(entries).reshape(rows // tall, tall, -1, width).swapaxes(1, 2)
    sums = tiles.sum(-1).swapaxes(1, 2).reshape(rows, -1)
    total = sums.sum(-1)
    block, rest = choose(sums, jnp.maximum(uniform, 2.0**-24) * total)
    inside = jax.vmap(lambda row, i: jax.lax.dynamic_slice(row, (i * width,), (width,)))(entries, block)
    place, _ = choose(probs(inside), jnp.maximum(rest, 2.0**-24 * total))
    return (block * width + place).astype(jnp.int32), _at(inside, place)


def _at(x: Shaped[Array, "B X"], index: Int[Array, " B"]) -> Shaped[Array, " B"]:
    """The entry of every row at its index."""
    return jnp.take_along_axis(x, index[:, None], axis=-1)[:, 0]


def _block_width(size: int) -> int:
    """Entries of a block: sqrt(V), of a large vocabulary whole LANES of a TPU near it, which divide V if any do.

    Every other number has the whole array [B, V] padded and copied into another order for each token.
    """
    root = int(size**0.5)
    if root < LANES:
        return max(1, root)
    divisors = [width for width in range(LANES, 4 * root, LANES) if size % width == 0]
    return min(divisors or [root // LANES * LANES], key=lambda width: abs(math.log(width / root)))


def draw_from_logits(
    logits: Float[Array, "B V"],
    uniform: Float[Array, " B"] | Int[Array, " B"],
    law: SamplingLaw,
    *,
    candidates: int,
    filtered: bool,
    carry: bool = False,
) -> tuple[Int[Array, " B"], tuple[Float[Array, " B"], Int[Array, "B K"] | None]]:
    """Tokens, and their log-probs under the law: logits / temperature, then top-k, then top-p, renormalised.

    `uniform` is the noise, one number in [0, 1) per row, or the tokens themselves, integers that the filters keep.

    `filtered` (static) says that top-k or top-p may be on; `candidates` > 0 (static) sorts that many top entries out
    first, which is faster than searching the whole vocabulary and exact while law.top_k is positive and the ties at
    the k-th entry fit in. With `carry` (static) the ids that a token was drawn from come with it, those of the K =
    `candidates` that the filters keep, and -1 for the others; without it None.
    """
    greedy = law.temperature == 0
    # Over a small temperature logits are so large that a bit of them is many nats; what they are below the largest is
    # exact. Over another one they stay as they are, as those of `token_logprobs` do.
    largest = logits.max(axis=-1, keepdims=True)
    origin = jnp.where(law.temperature < COLDEST, largest, 0.0)
    scale = lambda x: (x - origin) / jnp.where(greedy, 1.0, law.temperature)  # noqa: E731
    top, ids = scale(largest), None  # the largest of what is scaled, since rounding keeps the order
    if filtered:
        scaled, scale, largest = scale(logits), lambda x: x, top
        if candidates:
            scaled, ids = on_own_rows(partial(jax.lax.top_k, k=min(candidates, scaled.shape[1])), scaled)
        likely = jnp.where(keep_top_k(scaled, law.top_k), jnp.exp(scaled - top), 0.0)
        logits = jnp.where(keep_top_p(likely, law.top_p) & (likely > 0), scaled, -jnp.inf)
    # Of logits that are not filtered nothing but sums is made: they are read. Greedy is the first of the largest.
    probs = lambda x: jnp.where(greedy, x == largest, jnp.exp(scale(x) - top))  # noqa: E731
    if jnp.issubdtype(uniform.dtype, jnp.integer):
        index = uniform if ids is None else jnp.argmax(ids == uniform[:, None], axis=-1)
        chosen = _at(scaled if filtered else logits, index)
    else:
        index, chosen = _drawn(logits, jnp.where(greedy, 0.0, uniform), probs, -jnp.inf)
    # In the order of `token_logprobs`, so that the same logits have the same log-probs.
    logprob = scale(chosen[:, None])[:, 0] - (jnp.log(probs(logits).sum(-1)) + top[:, 0])
    token = index if ids is None else _at(ids, index)
    kept = None if ids is None or not carry else jnp.where(logits > -jnp.inf, ids, -1)
    return token, (jnp.where(greedy, 0.0, logprob), kept)


def sample(
    model: Model,
    params: Params,
    prompt: Int[Array, "N P"],
    prompt_mask: Bool[Array, "N P"],
    key: Array,
    law: SamplingLaw,
    active: Bool[Array, " N"] | None = None,
    given: Int[Array, "B T"] | Float[Array, "B T"] | None = None,
    earlier: Rollout | None = None,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    chunk: int,
    samples: int = 1,
    slots: int | None = None,
    candidates: int = 0,
    filtered: bool = True,
    carry: bool = False,
    routing: bool = False,
    microbatch: int = 0,
    budget: int = 0,
) -> Rollout:
    """Draw `samples` responses to each left-padded prompt; call it inside jit, with the arguments after * static.

    The responses to prompt n are rows n * samples and following. A row ends with the first stop id, which is part of
    the response; with no `stop_ids` every row runs the full length. `slots` rows are decoded at once (None: all, 0:
    `choose_slots`); every `chunk` tokens those that have ended make room for others. Prompts off `active` are not
    drawn: the masks of their rows are empty. Rows that are `given` are followed, and given floats are the noise.
    Rows go on behind what they have of an `earlier` rollout to the same prompts, which stays as it is, and are cut
    after `budget` more tokens, in whole chunks. Log-probs are of the law sampled from (greedy: 0, a certain event). A
    rotary law that depends on length is that of model.length, or else of P + max_new_tokens. The noise of a row
    depends on the key and its place only. `carry` (`draw_from_logits`) fills `kept`, `routing` fills `experts`.
    """
    chunk = min(chunk, max_new_tokens)
    steps = -(-max_new_tokens // chunk) * chunk  # whole chunks
    uniforms = jax.random.uniform(key, (prompt.shape[0] * samples, max_new_tokens)) if given is None else given
    uniforms = jnp.pad(uniforms, ((0, 0), (0, steps - max_new_tokens))).reshape(-1, samples, steps)
    model = of_length(model, prompt.shape[1] + max_new_tokens)
    is_stop = _set_of(stop_ids, model.arch.vocab_size) if stop_ids else None
    of_prompts = partial(
        _of_prompts,
        slots=slots,
        model=model,
        params=model.decoding_params(params),
        draw=partial(draw_from_logits, law=law, candidates=candidates, filtered=filtered, carry=carry),
        is_stop=is_stop,
        min_new_tokens=law.min_new_tokens,
        samples=samples,
        chunk=chunk,
        max_new_tokens=max_new_tokens,
        routing=routing,
    )
    active = jnp.ones(prompt.shape[0], bool) if active is None else active
    inputs = (prompt, prompt_mask, uniforms, active, _begun(earlier, budget, steps, samples))
    drawn = map_microbatches(lambda xs: of_prompts(*xs), inputs, _at_once(len(prompt), samples, microbatch))
    drawn = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:, :max_new_tokens], drawn)
    prompt, prompt_mask = (jnp.repeat(x, samples, axis=0) for x in (prompt, prompt_mask))
    return _rollout(prompt, prompt_mask, _behind(earlier, drawn), is_stop)


def _at_once(prompts: int, samples: int, microbatch: int) -> int:
    """Prompts of a microbatch, whose samples stay together: as many as divide all; 0 without one."""
    most = min(max(microbatch // samples, 1), prompts)
    return next(n for n in range(most, 0, -1) if prompts % n == 0) if microbatch else 0


def _of_prompts(
    prompt: Array,
    mask: Array,
    uniforms: Array,
    active: Array,
    begun: Begun | None,
    *,
    slots: int | None,
    **engine: Any,
) -> Any:
    """Tokens, whether they count, and what is kept of each, [prompts, samples, S, ...]; the rest is of `Engine`."""
    count, samples = uniforms.shape[:2]
    ways = math.gcd(data_ways(), count)
    at_once = max(slots // ways, 1) if slots else 0
    if slots == 0 and engine["is_stop"] is not None:
        sizes = count // ways, samples, prompt.shape[1], uniforms.shape[2]
        at_once = choose_slots(engine["model"], engine["params"], *sizes)
    prompts, masks, active = (split(x, ways) for x in (prompt, mask, active))
    uniforms, begun = jax.tree.map(lambda x: x.reshape(ways, -1, *x.shape[2:]), (uniforms, begun))
    queue, number = queue_of(masks, active)
    asked = Engine(
        prompts=prompts,
        masks=masks,
        queue=queue,
        count=number,
        uniforms=uniforms,
        slots=at_once,
        begun=begun,
        **engine,
    )
    return jax.tree.map(lambda x: x.reshape(count, samples, *x.shape[2:]), drawing.run(asked))


def _begun(earlier: Rollout | None, budget: int, steps: int, samples: int) -> Begun | None:
    """[prompts, samples, ...] each, of tokens in `steps` columns."""
    if earlier is None:
        return None
    longest = earlier.mask.shape[1]
    number = earlier.mask.sum(1, dtype=jnp.int32)
    limit = jnp.where(earlier.finished, number, jnp.minimum(number + budget, longest))
    tokens = jnp.pad(earlier.tokens, ((0, 0), (0, steps - longest)))
    tokens, number, limit = (x.reshape(-1, samples, *x.shape[1:]) for x in (tokens, number, limit))
    return Begun(tokens, number, limit, budget)


def _behind(earlier: Rollout | None, drawn: Any) -> Any:
    """What an engine drew, where there was nothing before."""
    if earlier is None:
        return drawn
    had = (earlier.tokens, earlier.mask, (earlier.logprobs, earlier.kept), earlier.experts)
    there = lambda x: earlier.mask.reshape(*earlier.mask.shape, *[1] * (x.ndim - 2))  # noqa: E731
    return jax.tree.map(lambda old, new: jnp.where(there(new), old, new), had, drawn)


def _set_of(ids: tuple[int, ...], size: int) -> Bool[Array, " V"]:
    return jnp.zeros(size, bool).at[jnp.asarray(ids, jnp.int32)].set(True)


def _rollout(prompt: Array, prompt_mask: Array, drawn: Any, is_stop: Bool[Array, " V"] | None) -> Rollout:
    """Of rows: prompts [B, P]; tokens, whether they count, their log-probs and kept ids, and experts [B, T, ...]."""
    tokens, mask, (logprobs, kept), experts = drawn
    if kept is not None:
        kept = jnp.where(mask[:, :, None], kept, -1)
    if experts is not None:
        experts = jnp.where(mask[:, :, None, None], experts, jnp.full((), -1, experts.dtype))
    finished = jnp.zeros(len(tokens), bool)  # the last token of a row is a stop id
    if is_stop is not None:
        last = _at(tokens, jnp.maximum(mask.sum(1) - 1, 0))
        finished = is_stop[last] & mask.any(1)
    return Rollout(prompt, prompt_mask, tokens, mask, logprobs, finished, kept, experts)
