"""Losses of a language model and of its critic: next token, PPO."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.types import Metrics


def next_token_loss(logprobs: Float[Array, "B T"], weights: Float[Array, "B T"]) -> tuple[Float[Array, ""], Metrics]:
    """Cross-entropy of the next token, -sum w log p; `weights[b, t]` weighs the token of `logprobs[b, t]`."""
    loss = -jnp.sum(weights * logprobs)
    return loss, {"loss/nll": loss}


def clipped_policy_loss(
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
    """PPO's clipped surrogate, -sum w min(r A, clip(r, 1-eps, 1+eps) A) with r = exp(logprobs - old_logprobs).

    Schulman et al. 2017 (arXiv 1707.06347), eq. 7; GRPO's as well (Shao et al. 2024, arXiv 2402.03300, eq. 3). The
    bound above is 1 + clip_ratio_high (DAPO, arXiv 2503.14476, eq. 10) unless that is 0. The log-ratio is clamped to
    +- max_log_ratio, so that one stale token cannot overflow. dual_clip c > 1 bounds the loss of negative advantages
    by -c A (Ye et al. 2020, arXiv 1912.09729, eq. 5; TRL calls it delta); 0 is off.
    """
    log_ratio = jnp.clip(logprobs - old_logprobs, -max_log_ratio, max_log_ratio)
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - clip_ratio, 1 + (clip_ratio_high or clip_ratio))
    loss = -jnp.minimum(ratio * advantages, clipped * advantages)
    if dual_clip:
        loss = jnp.where(advantages < 0, jnp.minimum(loss, -dual_clip * advantages), loss)
    return jnp.sum(weights * loss), ratio_metrics(log_ratio, ratio != clipped, weights)


def ratio_metrics(
    log_ratio: Float[Array, "B T"], clipped: Bool[Array, "B T"], weights: Float[Array, "B T"]
) -> Metrics:
    """How far the policy is from the one that sampled: what every policy loss reports."""
    ratio = jnp.exp(log_ratio)
    return {
        "policy/approx_kl": jnp.sum(weights * (jnp.expm1(log_ratio) - log_ratio)),  # the k3 estimator
        "policy/clip_fraction": jnp.sum(weights, where=clipped),
        "policy/ratio": jnp.sum(weights * ratio),
        "policy/ratio_max": jnp.max(ratio, where=weights > 0, initial=-jnp.inf),
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
        # Exactly v where it is inside, also where float32 has no number between v_old and a bound.
        bounded = jnp.clip(values, old_values - value_clip, old_values + value_clip)
        clipped = jnp.where(jnp.abs(values - old_values) <= value_clip, values, bounded)
        clipped_error = (clipped - returns) ** 2
        clip_fraction = jnp.sum(weights, where=clipped_error > error)
        error = jnp.maximum(error, clipped_error)
    else:
        clip_fraction = jnp.zeros(())
    loss = 0.5 * jnp.sum(weights * error)
    return loss, {"value/loss": loss, "value/clip_fraction": clip_fraction}
