"""A layer of experts, of which every token uses a few (Shazeer et al. 2017, arXiv 1701.06538); none is dropped.

Shapes: B batch, T positions, D width, F width of an expert, M = 2 if gated else 1, E experts, k experts of a token, n
tokens of a device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.config import ArchConfig
from rlhf_jax.models.exchange import over_devices
from rlhf_jax.models.grouped import Places, collect, grouped, spread
from rlhf_jax.models.kernels import ExpertKernel, einsum
from rlhf_jax.models.norms import Norm
from rlhf_jax.sharding import on_own_rows
from rlhf_jax.types import Metrics

TINY = 1e-20
"""Added to sums that divide, as in DeepSeek-V3: those of sigmoids may be 0."""


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


def _best(scores: Float[Array, "*X E"], k: int) -> Int[Array, "*X k"]:
    """Indices of the k largest, the first of equals; without a gradient."""
    return jax.lax.top_k(jax.lax.stop_gradient(scores), k)[1].astype(jnp.int32)


class Experts(nnx.Module):
    """A router, and the gated MLPs among which it chooses.

    Args:
        activation: the nonlinearity of the MLPs.
    """

    def __init__(self, arch: ArchConfig, activation: Callable[[Array], Array], *, rngs: nnx.Rngs):
        d, f, e, m = arch.width, arch.expert_width or arch.ffn_width, arch.num_experts, 2 if arch.gated_mlp else 1
        self.num, self.top, self.normalised, self.activation = e, arch.experts_per_token, arch.norm_topk, activation
        self.limit, self.alpha = arch.glu_limit, arch.glu_alpha
        self.groups, self.top_groups, self.scale = arch.router_groups, arch.router_top_groups, arch.routed_scale
        draw = lambda std, *shape: nnx.Param(std * jax.random.normal(rngs.params(), shape))  # noqa: E731
        self.router = draw(arch.init_std, d, e)
        if arch.router_scaled:
            self.router_norm, self.router_gain = Norm(arch, (d,), centered=False), nnx.Param(jnp.ones(e))
        if arch.router == "sigmoid":
            self.router_choice_bias = nnx.Param(jnp.zeros(e))
        if arch.router_bias:
            self.router_bias = nnx.Param(jnp.zeros(e))
        if arch.mlp_bias:
            self.up_bias, self.down_bias = nnx.Param(jnp.zeros((e, m, f))), nnx.Param(jnp.zeros((e, d)))
        self.up = draw(arch.init_std, e, d, m, f)
        self.down = draw(arch.init_std / (2 * arch.num_layers) ** 0.5, e, f, d)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        real: Bool[Array, "B T"],
        given: Int[Array, "B T k"] | None = None,
        seen: Float[Array, "B T D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """What the experts add, 0 on padding (off `real`); tokens with experts `given`, not -1, go to these.

        The router looks at `seen`, or at what experts do.
        """
        gates, routing = self.route(x if seen is None else seen, real, given)
        biased = hasattr(self, "up_bias")
        y = over_devices(
            self.apart, x, routing.chosen, self.up[...], self.down[...], self.up_bias[...] if biased else None
        )
        # What padding got was never cleared: neither it nor its gradient, that of its gates, is read.
        real = real[..., None]
        gates = jnp.where(real, gates, 0.0)
        y = jnp.where(real, einsum("btkd,btk->btd", y, gates), 0.0)
        if biased:  # that of down as one product with the weights of all experts [B, T, E], 0 where not chosen
            one_hot = routing.chosen[..., None] == jnp.arange(self.num)[None, None, None]
            weights = jnp.sum(one_hot * gates[..., None], axis=2).astype(x.dtype)
            y = y + einsum("bte,ed->btd", weights, self.down_bias[...])
        return y, routing

    def route(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"], given: Int[Array, "B T k"] | None
    ) -> tuple[Float[Array, "B T k"], Routing]:
        """The weight of each expert of every token, in float32, and which they are."""
        x = x.astype(jnp.float32)
        x = self.router_norm(x) * x.shape[-1] ** -0.5 if hasattr(self, "router_norm") else x
        logits = einsum("btd,de->bte", x, self.router[...])
        if hasattr(self, "router_bias"):
            logits = logits + self.router_bias[None, None].astype(jnp.float32)
        biased = hasattr(self, "router_choice_bias")
        scores = jax.nn.sigmoid(logits) if biased else jax.nn.softmax(logits, axis=-1)
        own = on_own_rows(partial(_best, k=self.top), self.choice(scores) if biased else scores)
        chosen = own if given is None else jnp.where(given >= 0, given, own)
        gates = jnp.take_along_axis(scores, chosen, axis=-1)
        if self.normalised:
            gates = gates / (gates.sum(-1, keepdims=True) + TINY)
        if hasattr(self, "router_gain"):
            gates = gates * self.router_gain[...].astype(jnp.float32)[chosen]
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
        best_two = lambda groups: jax.lax.top_k(groups, 2)[0].sum(-1)  # noqa: E731
        best = on_own_rows(lambda groups: _best(best_two(groups), self.top_groups), grouped)  # [B, T, top groups]
        open_ = (best[..., None] == jnp.arange(self.groups)[None, None, None]).any(-2)
        return jnp.where(open_[..., None], grouped, -jnp.inf).reshape(scores.shape)

    def apart(
        self,
        x: Float[Array, "n D"],
        chosen: Int[Array, "n k"],
        up: ExpertKernel,
        down: ExpertKernel,
        up_bias: Array | None,
    ) -> Float[Array, "n k D"]:
        """What each of its experts makes of a token, those of one device; without the bias of down."""
        places = Places.of(chosen, down.shape[0])
        parts = grouped(spread(x, places), up, places)
        if up_bias is not None:  # that of a block's expert, on all its rows
            of_block = places.of_blocks(up_bias.astype(x.dtype))[:, :, None]  # [blocks, M, 1, F]
            by_block = (y.reshape(len(of_block), -1, y.shape[-1]) for y in parts)
            parts = [(y + of_block[:, m]).reshape(-1, y.shape[-1]) for m, y in enumerate(by_block)]
        return collect(*grouped(self.between(*parts), down, places), places)

    def between(self, gate: Float[Array, "R F"], *rest: Float[Array, "R F"]) -> Float[Array, "R F"]:
        """What goes into down: act(gate) * up, act(up) of experts without a gate, or the clamped form."""
        if not self.limit:
            act = self.activation(gate)
            return act * rest[0] if rest else act
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(rest[0], -self.limit, self.limit)
        return gate * jax.nn.sigmoid(gate * self.alpha) * (up + 1)
