"""Every loss: arrays in, (scalar, metrics) out. Floor 0.

Log-probs are in nats. `weights` are zero off the response and sum to one over the optimiser batch (all microbatches,
all hosts), so that losses and metrics of microbatches add up. Keyword-only arguments are filled from the config
fields of the same name.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.types import Metrics


def next_token_loss(logprobs: Float[Array, "B T"], weights: Float[Array, "B T"]) -> tuple[Float[Array, ""], Metrics]:
    """Cross-entropy of the next token, -sum w log p; `weights[b, t]` weighs the token of `logprobs[b, t]`."""
    loss = -jnp.sum(weights * logprobs)
    return loss, {"loss/nll": loss}


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
    prefers_first = jnp.where(difference == 0, 0.5, (difference > 0).astype(jnp.float32))
    return loss, {
        "loss/pairwise": jnp.sum(weights * nll),
        "reward_model/accuracy": jnp.sum(weights * jnp.where(labels >= 0.5, prefers_first, 1 - prefers_first)),
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
    better, mean = _ordered_pairs(ranks, mask)
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
    better, mean = _ordered_pairs(ranks, mask)
    difference, total = scores[:, :, None] - scores[:, None, :], scores[:, :, None] + scores[:, None, :]
    # log(1 + sum exp(s_j - s_i)): a logsumexp over the worse and over i itself, whose difference is 0.
    among = jnp.where(better, -difference, -jnp.inf)
    each = jax.nn.logsumexp(jnp.concatenate([among, jnp.zeros_like(among[:, :, :1])], axis=2), axis=2)
    choices = jnp.maximum(better.any(2).astype(jnp.float32).sum(1), 1.0)
    nll = jnp.sum(weights * each.sum(1) / choices)
    loss = nll + center_coef * jnp.sum(weights * mean(total**2))
    return loss, {"loss/plackett_luce": nll, **_order_metrics(scores, better, mean, weights)}


def _ordered_pairs(ranks: Array, mask: Array) -> tuple[Array, Callable[[Array], Array]]:
    """(bool[B, K, K], whether i is better than j; the mean of an array [B, K, K] over those pairs, [B])."""
    better = (ranks[:, :, None] < ranks[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    pairs = jnp.maximum(better.astype(jnp.float32).sum((1, 2)), 1.0)
    return better, lambda x: jnp.sum(jnp.where(better, x, 0.0), (1, 2)) / pairs


def _order_metrics(scores: Array, better: Array, mean: Callable[[Array], Array], weights: Array) -> Metrics:
    """As those of `pairwise_reward_loss`, over the pairs of each prompt."""
    difference, total = scores[:, :, None] - scores[:, None, :], scores[:, :, None] + scores[:, None, :]
    right = jnp.where(difference == 0, 0.5, (difference > 0).astype(jnp.float32))
    return {
        "reward_model/accuracy": jnp.sum(weights * mean(right)),
        "reward_model/margin": jnp.sum(weights * mean(difference)),
        "reward_model/mean_score": jnp.sum(weights * mean(total / 2)),
    }


def rrhf_ranking_loss(
    logprobs: Float[Array, "B K"], rewards: Float[Array, "B K"], mask: Bool[Array, "B K"], weights: Float[Array, " B"]
) -> tuple[Float[Array, ""], Metrics]:
    """Sum over r_i < r_j of max(0, p_i - p_j), p the length-normalised log-prob of a response.

    Yuan et al. 2023 (arXiv 2304.05302), eq. 2.
    """
    worse = (rewards[:, :, None] < rewards[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    hinge = jnp.maximum(logprobs[:, :, None] - logprobs[:, None, :], 0.0)
    loss = jnp.sum(weights * jnp.sum(jnp.where(worse, hinge, 0.0), (1, 2)))
    return loss, {"loss/rrhf_ranking": loss}


def clipped_policy_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    clip_ratio: float,
    dual_clip: float,
    max_log_ratio: float,
) -> tuple[Float[Array, ""], Metrics]:
    """PPO's clipped surrogate, -sum w min(r A, clip(r, 1-eps, 1+eps) A) with r = exp(logprobs - old_logprobs).

    Schulman et al. 2017 (arXiv 1707.06347), eq. 7. The log-ratio is clamped to +- max_log_ratio, so that one stale
    token cannot overflow. dual_clip c > 1 bounds the loss of negative advantages by -c A (Ye et al. 2020, arXiv
    1912.09729, eq. 5); 0 is off.
    """
    log_ratio = jnp.clip(logprobs - old_logprobs, -max_log_ratio, max_log_ratio)
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - clip_ratio, 1 + clip_ratio)
    loss = -jnp.minimum(ratio * advantages, clipped * advantages)
    if dual_clip:
        loss = jnp.where(advantages < 0, jnp.minimum(loss, -dual_clip * advantages), loss)
    valid = weights > 0
    return jnp.sum(weights * loss), {
        "policy/approx_kl": jnp.sum(weights * (jnp.expm1(log_ratio) - log_ratio)),  # the k3 estimator
        "policy/clip_fraction": jnp.sum(weights, where=ratio != clipped),
        "policy/ratio": jnp.sum(weights * ratio),
        "policy/ratio_max": jnp.max(ratio, where=valid, initial=0.0),
    }


def clipped_value_loss(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    value_clip: float,
) -> tuple[Float[Array, ""], Metrics]:
    """0.5 sum w max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2); c = 0 means no clip.

    The value clip of OpenAI's PPO (Ziegler et al. 2019, arXiv 1909.08593; Engstrom et al. 2020, arXiv 2005.12729).
    """
    error = (values - returns) ** 2
    if value_clip:
        clipped = old_values + jnp.clip(values - old_values, -value_clip, value_clip)
        clipped_error = (clipped - returns) ** 2
        clip_fraction = jnp.sum(weights, where=clipped_error > error)
        error = jnp.maximum(error, clipped_error)
    else:
        clip_fraction = jnp.zeros(())
    loss = 0.5 * jnp.sum(weights * error)
    return loss, {"value/loss": loss, "value/clip_fraction": clip_fraction}
