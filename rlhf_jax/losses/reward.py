"""Losses of a reward model: scores against comparisons, choices and ratings."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.types import Metrics


def pairwise_reward_loss(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    weights: Float[Array, " B"],
    margins: Float[Array, " B"],
    labels: Float[Array, " B"],
    *,
    center_coef: float,
) -> tuple[Float[Array, ""], Metrics]:
    """Bradley-Terry loss of pairs of scores, -[y log sigmoid(d - m) + (1 - y) log sigmoid(-d - m)], d = s_w - s_l.

    Stiennon et al. 2020 (arXiv 2009.01325), eq. 1; margin m of Llama 2 (arXiv 2307.09288), eq. 2; soft labels y, the
    share of raters who chose the first; plus c (s_w + s_l)^2, which keeps scores near zero (arXiv 2312.09244).
    """
    difference = chosen - rejected
    nll = -labels * jax.nn.log_sigmoid(difference - margins) - (1 - labels) * jax.nn.log_sigmoid(-difference - margins)
    loss = jnp.sum(weights * (nll + center_coef * (chosen + rejected) ** 2))
    return loss, {
        "loss/pairwise": jnp.sum(weights * nll),
        **accuracy("reward_model", *pairs_right(difference, labels), weights),
        "reward_model/margin": jnp.sum(weights * difference),
        "reward_model/mean_score": jnp.sum(weights * (chosen + rejected) / 2),
    }


def kwise_reward_loss(
    scores: Float[Array, "B K"],
    ranks: Float[Array, "B K"],
    mask: Bool[Array, "B K"],
    weights: Float[Array, " B"],
    *,
    center_coef: float,
) -> tuple[Float[Array, ""], Metrics]:
    """Mean over the ordered pairs of a prompt's K responses of -log sigmoid(s_better - s_worse); K = 2 is pairwise.

    Ouyang et al. 2022 (arXiv 2203.02155), eq. 1; plus c (s_better + s_worse)^2, as in `pairwise_reward_loss`. Lower
    `ranks` are better; ties and responses off the mask make no pair, and a prompt without a pair adds 0.
    """
    better, mean = ordered_pairs(ranks, mask)
    difference, total = scores[:, :, None] - scores[:, None, :], scores[:, :, None] + scores[:, None, :]
    nll = jnp.sum(weights * mean(-jax.nn.log_sigmoid(difference)))
    loss = nll + center_coef * jnp.sum(weights * mean(total**2))
    return loss, {"loss/kwise": nll, **_order_metrics(scores, better, mean, weights)}


def plackett_luce_reward_loss(
    scores: Float[Array, "B K"],
    ranks: Float[Array, "B K"],
    mask: Bool[Array, "B K"],
    weights: Float[Array, " B"],
    *,
    center_coef: float,
) -> tuple[Float[Array, ""], Metrics]:
    """Mean over a prompt's choices of -log(exp(s_i) / (exp(s_i) + sum of exp(s_j) over all j worse than i)).

    Plackett 1975, the list-wise loss ListMLE (Xia et al. 2008); K = 2 is pairwise; c as in `kwise_reward_loss`. Lower
    `ranks` are better. Tied responses are each chosen before what is worse than both and not compared; the worst ones
    and those off the mask choose nothing, and a prompt without a choice adds 0.
    """
    better, mean = ordered_pairs(ranks, mask)
    difference, total = scores[:, :, None] - scores[:, None, :], scores[:, :, None] + scores[:, None, :]
    # log(1 + sum exp(s_j - s_i)): a logsumexp over the worse and over i itself, whose difference is 0.
    among = jnp.where(better, -difference, -jnp.inf)
    each = jax.nn.logsumexp(jnp.concatenate([among, jnp.zeros_like(among[:, :, :1])], axis=2), axis=2)
    choices = jnp.maximum(better.any(2).astype(jnp.float32).sum(1), 1.0)
    nll = jnp.sum(weights * each.sum(1) / choices)
    loss = nll + center_coef * jnp.sum(weights * mean(total**2))
    return loss, {"loss/plackett_luce": nll, **_order_metrics(scores, better, mean, weights)}


def ordered_pairs(ranks: Array, mask: Array) -> tuple[Array, Callable[[Array], Array]]:
    """(bool[B, K, K], whether i is better than j; the mean of an array [B, K, K] over those pairs, [B])."""
    better = (ranks[:, :, None] < ranks[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    pairs = jnp.maximum(better.astype(jnp.float32).sum((1, 2)), 1.0)
    return better, lambda x: jnp.sum(jnp.where(better, x, 0.0), (1, 2)) / pairs


def pairs_right(margin: Float[Array, " B"], labels: Float[Array, " B"]) -> tuple[Array, Array]:
    """(how right each pair is: 1, 0, or 1/2 where its margin is 0; whether it counts: a tied label does not), [B]."""
    return (jnp.sign(margin) * jnp.sign(labels - 0.5) + 1) / 2, labels != 0.5


def order_right(
    margin: Float[Array, "B K K"], better: Bool[Array, "B K K"], mean: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """As `pairs_right`, of rankings: the mean over the pairs that are ordered; whether there is one. [B]."""
    return mean((jnp.sign(margin) + 1) / 2), better.any((1, 2))


def accuracy(group: str, right: Array, counts: Array, weights: Float[Array, " B"]) -> Metrics:
    """GROUP/accuracy, the mean of `right` [B] over the rows that count, bool[B], weighed as the loss weighs them."""
    counted = jnp.where(counts, weights, 0.0)
    return {f"{group}/accuracy": jnp.sum(counted * right), f"{group}/accuracy_weight": jnp.sum(counted)}


def _order_metrics(scores: Array, better: Array, mean: Callable[[Array], Array], weights: Array) -> Metrics:
    """As those of `pairwise_reward_loss`, over the pairs of each prompt."""
    difference, total = scores[:, :, None] - scores[:, None, :], scores[:, :, None] + scores[:, None, :]
    return {
        **accuracy("reward_model", *order_right(difference, better, mean), weights),
        "reward_model/margin": jnp.sum(weights * mean(difference)),
        "reward_model/mean_score": jnp.sum(weights * mean(total / 2)),
    }


def best_of_n_reward_loss(
    scores: Float[Array, "B K"],
    ranks: Float[Array, "B K"],
    mask: Bool[Array, "B K"],
    weights: Float[Array, " B"],
    *,
    center_coef: float,
) -> tuple[Float[Array, ""], Metrics]:
    """-log softmax(scores)[b], b the response that a rater chose of K; K = 2 is pairwise.

    Ziegler et al. 2019 (arXiv 1909.08593), eq. 1; c as in `kwise_reward_loss`. The chosen one has the lowest of the
    `ranks`; several that share it share the label. A prompt without a choice, or with all tied, adds 0.
    """
    better, mean = ordered_pairs(ranks, mask)
    total = scores[:, :, None] + scores[:, None, :]
    best = mask & ~better.any(1) & better.any((1, 2))[:, None]  # no response is better than it
    chosen = best.astype(jnp.float32)
    share = chosen / jnp.maximum(chosen.sum(1, keepdims=True), 1.0)
    logprobs = jax.nn.log_softmax(jnp.where(mask, scores, -jnp.inf), axis=1, where=mask)
    nll = jnp.sum(weights * jnp.sum(jnp.where(best, -share * logprobs, 0.0), 1))
    loss = nll + center_coef * jnp.sum(weights * mean(total**2))
    return loss, {"loss/best_of_n": nll, **_order_metrics(scores, better, mean, weights)}


def squared_rating_loss(
    scores: Float[Array, " B"], ratings: Float[Array, " B"], weights: Float[Array, " B"]
) -> tuple[Float[Array, ""], Metrics]:
    """(score - rating)^2: a reward model of scalar ratings."""
    error = scores - ratings
    loss = jnp.sum(weights * error**2)
    return loss, {"loss/rating": loss, "reward_model/error": jnp.sum(weights * jnp.abs(error))}


def ordinal_rating_loss(
    scores: Float[Array, " B"],
    ratings: Float[Array, " B"],
    weights: Float[Array, " B"],
    *,
    rating_low: float,
    rating_high: float,
) -> tuple[Float[Array, ""], Metrics]:
    """-log of the ordered logit P(rating) = sigmoid(rating + 1/2 - s) - sigmoid(rating - 1/2 - s).

    McCullagh 1980, with the borders of the bins halfway between whole ratings, so that the score is in their unit. The
    lowest bin has no lower border and the highest no upper one.
    """
    upper = jnp.where(ratings >= rating_high, jnp.inf, ratings + 0.5 - scores)
    lower = jnp.where(ratings <= rating_low, -jnp.inf, ratings - 0.5 - scores)
    # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), which keeps its digits far from the score.
    inside = (ratings < rating_high) & (ratings > rating_low)
    width = jnp.where(inside, jnp.log(-jnp.expm1(jnp.float32(-1.0))), 0.0)
    nll = -jax.nn.log_sigmoid(upper) - jax.nn.log_sigmoid(-lower) - width
    loss = jnp.sum(weights * nll)
    return loss, {"loss/rating": loss, "reward_model/error": jnp.sum(weights * jnp.abs(scores - ratings))}
