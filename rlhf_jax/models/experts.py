"""A layer of experts, of which every token uses a few (Shazeer et al. 2017, arXiv 1701.06538); none is dropped.

Shapes: B batch, T positions, D width, F width of an expert, M = 2 if gated else 1, E experts, k experts of a token, n
tokens of a device. Rows are (token, expert) pairs. They lie sorted by expert, each expert's in whole blocks of b rows,
so that a product costs what its rows cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.config import ArchConfig
from rlhf_jax.models.kernels import Adapted, Kernel, dense, einsum
from rlhf_jax.sharding import data_ways, row_axes
from rlhf_jax.types import Metrics

LARGEST_BLOCK = 512
SPARE = 5
"""Quarters of an even share that a device can take at once of what another sends."""
TINY = 1e-20
"""Added to sums that divide, as in DeepSeek-V3: those of sigmoids may be 0."""
PADDING = 8
"""Blocks are so small that those that are not full add at most an eighth to the rows."""


class Routing(NamedTuple):
    """What the router of a layer did; with a leading L, those of all layers.

    Attributes:
        chosen: the experts of every token, E on padding.
        counts: real tokens of each expert.
        probs: sum over real tokens of the probability of each expert (of sigmoids: its share of their sum).
        tokens: real tokens.
        replayed: tokens whose experts were given; None where none could be.
        differs: of these, tokens for which the router would have chosen others.
    """

    chosen: Int[Array, "B T k"]
    counts: Float[Array, " E"]
    probs: Float[Array, " E"]
    tokens: Float[Array, ""]
    replayed: Float[Array, ""] | None = None
    differs: Float[Array, ""] | None = None


def balance_loss(routing: Routing) -> Float[Array, ""]:
    """E sum over experts of the share of tokens that it has, times k, and its mean probability, over all layers.

    Fedus et al. 2021 (arXiv 2101.03961), eq. 4 to 6, as transformers' `load_balancing_loss_func`: k where all is even.
    """
    tokens = jnp.maximum(routing.tokens.sum(), 1.0)
    shares, probs = routing.counts.sum(0) / tokens, routing.probs.sum(0) / tokens
    return routing.counts.shape[-1] * jnp.sum(shares * probs)


def load_metrics(routing: Routing) -> Metrics:
    """How even the loads of a view are: means over its tokens, so that views add up; see docs/algorithms.md."""
    tokens, mean = routing.tokens.sum(), routing.counts.mean(-1, keepdims=True)
    idle = (routing.counts == 0).mean(dtype=jnp.float32)
    metrics = {
        "load_max": (routing.counts / jnp.maximum(mean, 1e-9)).max(),
        **{"balance_loss": balance_loss(routing) * tokens, "balance_loss_weight": tokens},
        **{"idle": idle * tokens, "idle_weight": tokens},
    }
    if routing.replayed is not None and routing.differs is not None:
        metrics |= {"replay_differs": routing.differs.sum(), "replay_differs_weight": routing.replayed.sum()}
    return metrics


def balanced(
    coef: float, loss: Array, metrics: Metrics, routing: Routing | None, share: Array, group: str = "experts"
) -> tuple[Float[Array, ""], Metrics]:
    """A loss with coef times the balance loss of what it read, and metrics group/name with the loads, if any.

    `share` is that of the weights of the optimiser batch which the loss is of, so that microbatches add up.
    """
    if routing is None:
        return loss, metrics
    if coef:
        loss = loss + coef * share * balance_loss(routing)
    return loss, {**metrics, **{f"{group}/{name}": value for name, value in load_metrics(routing).items()}}


class Places(NamedTuple):
    """Where rows lie: in `blocks` of `size` rows, each of one expert.

    Attributes:
        source: the (token, choice) pair of every place, n * k where there is none.
        place: the place of every pair, that of no row where its expert is E.
        owner: the expert of every block.
        counts: places of every expert, whole blocks.
    """

    source: Int[Array, " R"]
    place: Int[Array, "n k"]
    owner: Int[Array, " blocks"]
    counts: Int[Array, " E"]

    @classmethod
    def of(cls, chosen: Int[Array, "n k"], experts: int) -> Places:
        """Of the experts of every token; a pair with expert E = `experts` has no place."""
        ids, pairs = chosen.reshape(-1), chosen.size
        size = block_size(pairs, experts)
        blocks = (pairs + experts * (size - 1)) // size
        # Pairs in order of their experts; the first pair and the first place of each expert.
        order = jnp.argsort(ids, stable=True).astype(jnp.int32)
        real = (ids[:, None] == jnp.arange(experts)[None]).sum(0, dtype=jnp.int32)
        counts = -(-real // size) * size
        first, start = jnp.cumsum(real) - real, jnp.cumsum(counts) - counts
        # Every place's pair, and every pair's place.
        ends_before = jnp.cumsum(counts)[None] <= size * jnp.arange(blocks)[:, None]  # [blocks, E]
        owner = jnp.minimum(ends_before.sum(1, dtype=jnp.int32), experts - 1)
        of_place = jnp.repeat(owner, size)
        within = jnp.arange(blocks * size, dtype=jnp.int32) - start[of_place]
        source = order[jnp.minimum(first[of_place] + within, pairs - 1)]
        source = jnp.where(within < real[of_place], source, pairs)
        rank, own = inverse(order), jnp.minimum(ids, experts - 1)
        place = jnp.where(ids < experts, start[own] + rank - first[own], blocks * size)
        return cls(source, place.reshape(chosen.shape), owner, counts)


def inverse(order: Int[Array, " n"]) -> Int[Array, " n"]:
    """Of a permutation."""
    return jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype), unique_indices=True)


def block_size(pairs: int, experts: int) -> int:
    """Rows of a block: the largest power of two of which `experts` blocks are at most an eighth of the pairs."""
    return min(1 << max((pairs // (PADDING * experts)).bit_length() - 1, 0), LARGEST_BLOCK)


@jax.custom_vjp
def spread(x: Float[Array, "n D"], places: Places) -> Float[Array, "R D"]:
    """Every place with its token, 0 where there is none; its gradient is a gather, too."""
    tokens = jnp.minimum(places.source // places.place.shape[1], len(x) - 1)
    return jnp.where((places.source < places.place.size)[:, None], x[tokens], jnp.zeros((), x.dtype))


@jax.custom_vjp
def collect(y: Float[Array, "R D"], places: Places) -> Float[Array, "n k D"]:
    """The rows of every token, 0 for pairs without a place: the transpose of `spread`, but for a sum over k."""
    return y.at[places.place].get(mode="fill", fill_value=0)


def _collected(places: Places, grad: Array) -> tuple[Array, None]:
    of_place = grad.reshape(-1, grad.shape[-1])[jnp.minimum(places.source, places.place.size - 1)]
    return jnp.where((places.source < places.place.size)[:, None], of_place, jnp.zeros((), grad.dtype)), None


spread.defvjp(lambda x, places: (spread(x, places), places), lambda places, g: (collect(g, places).sum(1), None))
collect.defvjp(lambda y, places: (collect(y, places), places), _collected)


def grouped(x: Float[Array, "R D"], kernel: Kernel, places: Places) -> Float[Array, "R F"]:
    """Every row times the kernel of its expert, [E, D, ...] with all but the first two axes as one.

    On TPU by `jax.lax.ragged_dot`, its own kernel for this, and elsewhere block by block: XLA lowers ragged_dot on CPU
    and GPU to products with all E experts.
    """
    if isinstance(kernel, Adapted):
        low = kernel.scale * grouped(x, kernel.a, places)
        return grouped(x, kernel.kernel, places) + grouped(low, kernel.b, places)
    weight = dense(kernel).astype(x.dtype)
    weight = weight.reshape(*weight.shape[:2], -1)
    if x.dtype == jnp.float32:  # in full precision, which TPU kernels do not have
        return by_blocks(x, weight, places)
    return jax.lax.platform_dependent(x, weight, places, tpu=by_ragged_dot, default=by_blocks)


def by_blocks(x: Float[Array, "R D"], weight: Float[Array, "E D F"], places: Places) -> Float[Array, "R F"]:
    """A batched product of blocks with the weights of their owners."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    blocks = x.reshape(len(places.owner), -1, x.shape[1])
    return jnp.einsum("rbd,rdf->rbf", blocks, weight[places.owner], precision=precision).reshape(len(x), -1)


@jax.custom_vjp
def by_ragged_dot(x: Float[Array, "R D"], weight: Float[Array, "E D F"], places: Places) -> Float[Array, "R F"]:
    """The same by one kernel; the gradient of the weights by megablox's, since ragged_dot's multiplies with all E."""
    return jax.lax.ragged_dot(x, weight, places.counts)


def _ragged_gradients(kept: tuple[Array, Array, Places], grad: Array) -> tuple[Array, Array, None]:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    x, weight, places = kept
    tile = 512 if len(x) >= 512 else -(-len(x) // 8) * 8
    padded = [jnp.pad(a, ((0, -len(x) % tile), (0, 0))) for a in (x, grad)]
    tiling = (tile, min(512, x.shape[1]), min(512, grad.shape[1]))
    of_weight = tgmm(padded[0].T, padded[1], places.counts, weight.dtype, tiling)
    return jax.lax.ragged_dot(grad, weight.swapaxes(1, 2), places.counts), of_weight, None


by_ragged_dot.defvjp(lambda *args: (by_ragged_dot(*args), args), _ragged_gradients)


class Experts(nnx.Module):
    """A router, and the gated MLPs among which it chooses.

    Args:
        activation: the nonlinearity of the MLPs.
    """

    def __init__(self, arch: ArchConfig, activation: Callable[[Array], Array], *, rngs: nnx.Rngs):
        d, f, e, m = arch.width, arch.ffn_width, arch.num_experts, 2 if arch.gated_mlp else 1
        self.num, self.top, self.normalised, self.activation = e, arch.experts_per_token, arch.norm_topk, activation
        self.groups, self.top_groups, self.scale = arch.router_groups, arch.router_top_groups, arch.routed_scale
        draw = lambda std, *shape: nnx.Param(std * jax.random.normal(rngs.params(), shape))  # noqa: E731
        self.router = draw(arch.init_std, d, e)
        if arch.router == "sigmoid":
            self.router_choice_bias = nnx.Param(jnp.zeros(e))
        self.up = draw(arch.init_std, e, d, m, f)
        self.down = draw(arch.init_std / (2 * arch.num_layers) ** 0.5, e, f, d)

    def __call__(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"], given: Int[Array, "B T k"] | None = None
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """What the experts add, 0 on padding (off `real`); tokens with experts `given`, not -1, go to these."""
        gates, routing = self.route(x, real, given)
        y = over_devices(self.apart, x, routing.chosen, self.up[...], self.down[...])
        return einsum("btkd,btk->btd", y, gates), routing

    def route(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"], given: Int[Array, "B T k"] | None
    ) -> tuple[Float[Array, "B T k"], Routing]:
        """The weight of each expert of every token, in float32, and which they are."""
        logits = einsum("btd,de->bte", x.astype(jnp.float32), self.router[...])
        biased = hasattr(self, "router_choice_bias")
        scores = jax.nn.sigmoid(logits) if biased else jax.nn.softmax(logits, axis=-1)
        own = jax.lax.top_k(self.choice(scores) if biased else scores, self.top)[1].astype(jnp.int32)
        chosen = own if given is None else jnp.where(given >= 0, given, own)
        gates = jnp.take_along_axis(scores, chosen, axis=-1)
        if self.normalised:
            gates = gates / (gates.sum(-1, keepdims=True) + TINY)
        gates, probs = gates * self.scale, scores / (scores.sum(-1, keepdims=True) + TINY) if biased else scores
        count, replayed, differs = partial(jnp.sum, dtype=jnp.float32), None, None
        if given is not None:
            replayed = real & (given >= 0).all(-1)
            differs = count(replayed & (jnp.sort(own, axis=-1) != jnp.sort(chosen, axis=-1)).any(-1))
            replayed = count(replayed)
        # Loads and probabilities are of real tokens alone; padding has no expert.
        chosen = jnp.where(real[..., None], chosen, self.num)
        counts = count(chosen[..., None] == jnp.arange(self.num)[None, None, None], axis=(0, 1, 2))
        weighed = jnp.sum(probs * real[..., None], axis=(0, 1))
        return gates, Routing(chosen, counts, weighed, count(real), replayed, differs)

    def choice(self, scores: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """By what a sigmoid router chooses: scores with their bias, -inf outside the groups with the best two."""
        scores = scores + self.router_choice_bias[None, None].astype(jnp.float32)
        if self.top_groups == self.groups:
            return scores
        grouped = scores.reshape(*scores.shape[:2], self.groups, -1)
        best = jax.lax.top_k(jax.lax.top_k(grouped, 2)[0].sum(-1), self.top_groups)[1]  # [B, T, top groups]
        open_ = (best[..., None] == jnp.arange(self.groups)[None, None, None]).any(-2)
        return jnp.where(open_[..., None], grouped, -jnp.inf).reshape(scores.shape)

    def apart(
        self, x: Float[Array, "n D"], chosen: Int[Array, "n k"], up: Kernel, down: Kernel
    ) -> Float[Array, "n k D"]:
        """What each of its experts makes of a token, those of one device."""
        places = Places.of(chosen, down.shape[0])
        y = grouped(spread(x, places), up, places)
        gate, *rest = jnp.split(y, up.shape[2], axis=-1)
        act = self.activation(gate)
        return collect(grouped(act * rest[0] if rest else act, down, places), places)


Apart = Callable[[Array, Array, Kernel, Kernel], Array]
"""(tokens [n, D], experts [n, k] of a device, E where there is none, up, down) -> [n, k, D]."""


def over_devices(
    apart: Apart, x: Float[Array, "B T D"], chosen: Int[Array, "B T k"], up: Kernel, down: Kernel
) -> Float[Array, "B T k D"]:
    """`apart` on every device: tokens where their rows lie, experts over the mesh axis expert, F over tensor.

    Rows that do not divide over their axes are computed by all devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else mesh.shape.get("expert", 1)
    run = apart if ways == 1 else partial(exchanged, apart, ways)

    def of_rows(x: Array, chosen: Array, up: Kernel, down: Kernel) -> Array:
        y = run(x.reshape(-1, x.shape[-1]), chosen.reshape(-1, chosen.shape[-1]), up, down)
        y = y if mesh.empty else jax.lax.psum(y, "tensor")  # each has made a part of the sum over F
        return y.reshape(*chosen.shape, -1)

    if mesh.empty:
        return of_rows(x, chosen, up, down)
    tokens = P(row_axes() if len(x) % data_ways() == 0 else None, None, None)
    expert = "expert" if ways > 1 else None
    specs = _specs(up, P(expert, None, None, "tensor"), 1), _specs(down, P(expert, "tensor", None), 1)
    up, down = (_dense_base(kernel) for kernel in (up, down))
    places = P(*tokens, None)
    return jax.shard_map(of_rows, in_specs=(tokens, tokens, *specs), out_specs=places, check_vma=False)(
        x, chosen, up, down
    )


def _dense_base(kernel: Kernel) -> Kernel:
    """An `Adapted` kernel on a dense one; any other dense."""
    return replace(kernel, kernel=dense(kernel.kernel)) if isinstance(kernel, Adapted) else dense(kernel)


def _specs(kernel: Any, spec: P, inputs: int) -> Any:
    """Where a kernel [E, inputs, outputs] lies, and of an `Adapted` one A [E, inputs, R] and B [E, R, outputs] too."""
    if not isinstance(kernel, Adapted):
        return spec
    return replace(
        cast(Any, kernel), kernel=spec, a=P(*spec[: 1 + inputs], None), b=P(spec[0], None, *spec[1 + inputs :])
    )


def exchanged(
    apart: Apart, ways: int, x: Float[Array, "n D"], chosen: Int[Array, "n k"], up: Kernel, down: Kernel
) -> Float[Array, "n k D"]:
    """`apart` where each of `ways` devices of the mesh axis expert has so many of the experts, one after another.

    Pairs go to the device of their expert and back, a quarter more to each in one round than if all had equally many.
    What is left goes in further rounds, which run only if some device has anything left.
    """
    own, pairs = down.shape[0], chosen.size
    capacity = min(-(-SPARE * pairs // (4 * ways)), pairs)
    # Pairs in order of their devices; how many each device gets, and the first of them.
    device = (chosen // own).reshape(-1)
    order = jnp.argsort(device, stable=True).astype(jnp.int32)
    rank = inverse(order)
    counts = (device[:, None] == jnp.arange(ways)[None]).sum(0, dtype=jnp.int32)
    first = jnp.cumsum(counts) - counts
    number = rank - first[jnp.minimum(device, ways - 1)]  # of a pair, among those of its device

    def one_round(i: Int[Array, ""] | int) -> Float[Array, "n k D"]:
        # Which pair goes to which place [ways, capacity] of the exchange, and where each pair finds its answer.
        nth = i * capacity + jnp.arange(capacity, dtype=jnp.int32)[None]
        source = jnp.where(nth < counts[:, None], order[jnp.minimum(first[:, None] + nth, pairs - 1)], pairs)
        here = (device < ways) & (number // capacity == i)
        place = jnp.where(here, device * capacity + number % capacity, ways * capacity)
        places = Places(source.reshape(-1), place.reshape(chosen.shape), counts, counts)
        ids = jnp.append(chosen.reshape(-1) % own, own)[source]  # of the experts of the device that it goes to
        swap = partial(jax.lax.all_to_all, axis_name="expert", split_axis=0, concat_axis=0)
        sent = swap(spread(x, places).reshape(ways, capacity, -1))
        y = apart(sent.reshape(ways * capacity, -1), swap(ids).reshape(-1, 1), up, down)
        return collect(swap(y.reshape(ways, capacity, -1)).reshape(ways * capacity, -1), places)

    @jax.checkpoint
    def further(y: Array, i: Array) -> tuple[Array, None]:
        left = jax.lax.pmax((counts > i * capacity).any().astype(jnp.int32), "expert") > 0
        return jax.lax.cond(left, lambda y: y + one_round(i), lambda y: y, y), None

    y = one_round(0)
    with jax.named_scope("rarely"):
        return jax.lax.scan(further, y, jnp.arange(1, -(-pairs // capacity)))[0]
