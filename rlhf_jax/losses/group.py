"""Losses of the methods without a critic (GRPO, GSPO, RLOO, CISPO) beside `clipped_policy_loss`, and their KL."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.losses.policy import clipped_policy_loss, ratio_metrics
from rlhf_jax.types import Metrics


def sequence_policy_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    clip_ratio: float,
    clip_ratio_high: float,
    dual_clip: float,
    max_log_ratio: float,
) -> tuple[Float[Array, ""], Metrics]:
    """`clipped_policy_loss` of whole responses, with the ratio of their probabilities, exp of the summed log-ratio.

    RLOO, where a response is one action (Ahmadian et al. 2024, arXiv 2402.14740, eq. 3; the clip is TRL's). A response
    weighs as much as its tokens together; its advantage is their weighted mean.
    """
    log_ratio, _, advantages, weights = _of_rows(logprobs - old_logprobs, advantages, weights)
    options = {"clip_ratio_high": clip_ratio_high, "dual_clip": dual_clip, "max_log_ratio": max_log_ratio}
    return clipped_policy_loss(
        log_ratio, jnp.zeros_like(log_ratio), advantages, weights, clip_ratio=clip_ratio, **options
    )


def sequence_mean_policy_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    clip_ratio: float,
    clip_ratio_high: float,
    dual_clip: float,
    max_log_ratio: float,
) -> tuple[Float[Array, ""], Metrics]:
    """`sequence_policy_loss` with exp of the mean log-ratio of a response's tokens instead of the sum.

    GSPO (Zheng et al. 2025, arXiv 2507.18071), eq. 5 and 7, which clips at 3e-4 below and 4e-4 above.
    """
    log_ratio, count, advantages, weights = _of_rows(logprobs - old_logprobs, advantages, weights)
    log_ratio = log_ratio / jnp.maximum(count, 1.0)
    options = {"clip_ratio_high": clip_ratio_high, "dual_clip": dual_clip, "max_log_ratio": max_log_ratio}
    return clipped_policy_loss(
        log_ratio, jnp.zeros_like(log_ratio), advantages, weights, clip_ratio=clip_ratio, **options
    )


def _of_rows(log_ratio: Array, advantages: Array, weights: Array) -> tuple[Array, Array, Array, Array]:
    """Of each row [B, 1]: the sum of the log-ratio, the number of tokens that weigh, their advantage and weight."""
    valid = weights > 0
    total = jnp.sum(log_ratio, axis=1, where=valid, keepdims=True)
    weight = weights.sum(axis=1, keepdims=True)
    advantage = jnp.sum(weights * advantages, axis=1, keepdims=True) / jnp.where(weight > 0, weight, 1.0)
    return total, valid.astype(jnp.float32).sum(axis=1, keepdims=True), advantage, weight


def cispo_policy_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    clip_ratio: float,
    clip_ratio_high: float,
    max_log_ratio: float,
) -> tuple[Float[Array, ""], Metrics]:
    """-sum w sg(min(r, 1 + eps)) A log p: the ratio weighs a token and never cuts its gradient.

    CISPO (MiniMax 2025, arXiv 2506.13585), eq. 4 and 5, without a bound below; eps is clip_ratio_high, or clip_ratio
    if that is 0. TRL's epsilon_high is our 1 + eps.
    """
    log_ratio = jnp.clip(logprobs - old_logprobs, -max_log_ratio, max_log_ratio)
    ratio, bound = jnp.exp(log_ratio), 1 + (clip_ratio_high or clip_ratio)
    importance = jax.lax.stop_gradient(jnp.minimum(ratio, bound))
    loss = -jnp.sum(weights * importance * advantages * logprobs)
    return loss, ratio_metrics(log_ratio, ratio > bound, weights)


def reference_kl_loss(
    logprobs: Float[Array, "B T"],
    ref_logprobs: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    max_log_ratio: float,
) -> tuple[Float[Array, ""], Metrics]:
    """sum w (exp(d) - 1 - d) with d = log p_ref - log p, the k3 estimate of KL(p, p_ref) in nats per token.

    GRPO's leash (Shao et al. 2024, arXiv 2402.03300, eq. 4). d is at most max_log_ratio, so that exp cannot overflow.
    """
    d = jnp.minimum(ref_logprobs - logprobs, max_log_ratio)
    loss = jnp.sum(weights * (jnp.expm1(d) - d))
    return loss, {"policy/ref_kl": loss}
