"""Weights that correct for tokens which another law drew than the one that is trained."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.types import Metrics


def importance_weights(
    old_logprobs: Float[Array, "B T"],
    sampler_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    importance: str,
    importance_cap: float,
    importance_beyond: str,
) -> tuple[Float[Array, "B ..."], Metrics]:
    """Weights exp(log p_old - log p_sampler) of tokens drawn by another law than the trained one, and metrics.

    Multiplied into the advantages, they make the policy gradient that of the trained law: of each token [B, T]
    (importance: token), or of each response [B, 1], the product over it (sequence). The first is biased, since the
    tokens before were drawn by the sampler, too; the second is not, and varies more. A weight above importance_cap is
    set to it (importance_beyond: clip; Ionides 2008, truncated importance sampling) or to 0 (mask); a cap of 0 is
    none. TRL 1.16 calls these token_truncate, sequence_truncate, token_mask and sequence_mask, its default.

    `mask` is true on response tokens; log-probs are in nats, and 0 off it. Both laws must have the same support: what
    top-k or top-p left out was never drawn, and no weight brings it back.
    """
    log_weights = jnp.where(mask, old_logprobs - sampler_logprobs, 0.0)
    if importance == "sequence":
        log_weights, mask = log_weights.sum(axis=1, keepdims=True), mask.any(axis=1, keepdims=True)
    raw = jnp.exp(log_weights)
    beyond = (raw > importance_cap) & mask if importance_cap else jnp.zeros_like(mask)
    weights = jnp.where(beyond, importance_cap if importance_beyond == "clip" else 0.0, raw)
    return weights, {
        "rollout/importance": weights.mean(where=mask),
        "rollout/importance_min": raw.min(where=mask, initial=jnp.inf),
        "rollout/importance_max": raw.max(where=mask, initial=0.0),
        "rollout/importance_beyond": beyond.mean(where=mask),
    }
