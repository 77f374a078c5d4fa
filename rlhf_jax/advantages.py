"""From scores to advantages: KL estimators, shaped rewards, GAE, group baselines, whitening, controllers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Real


def kl_k1(logprobs: Float[Array, "*B"], ref_logprobs: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """The unbiased estimator log p - log p_ref of KL(p, p_ref) at tokens drawn from p, in nats (Schulman 2020, k1)."""
    return logprobs - ref_logprobs


def kl_k3(logprobs: Float[Array, "*B"], ref_logprobs: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """exp(d) - 1 - d with d = log p_ref - log p: unbiased, never negative, lower variance (Schulman 2020, k3)."""
    d = ref_logprobs - logprobs
    return jnp.expm1(d) - d  # exp(d) - 1 - d would round below zero for small d


def divergence(
    log_ratio: Float[Array, "*B"], *, teacher_divergence: str, teacher_beta: float
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """(what a token is paid, its estimate of the divergence in nats) of log_ratio = log p_teacher - log p.

    Tokens are drawn from p. With r = p_teacher / p every divergence is E_p[f(r)], whose gradient is minus
    E_p[(r f'(r) - f(r)) grad log p] (Go et al. 2023, arXiv 2302.08215, theorem 1), so r f' - f is paid; both are 0 at
    r = 1. Agarwal et al. 2023 (arXiv 2306.13649), section 2: reverse_kl is KL(p, p_teacher), forward_kl
    KL(p_teacher, p), and jsd beta KL(p_teacher, m) + (1 - beta) KL(p, m) with m = beta p_teacher + (1 - beta) p.
    """
    if teacher_divergence == "reverse_kl":
        return log_ratio, -log_ratio
    ratio, less_one = jnp.exp(log_ratio), jnp.expm1(log_ratio)
    if teacher_divergence == "forward_kl":
        return less_one, ratio * log_ratio - less_one
    mixture = jnp.log1p(teacher_beta * less_one)
    paid = (1 - teacher_beta) * mixture
    return paid, teacher_beta * ratio * (log_ratio - mixture) - paid


def shaped_rewards(
    scores: Float[Array, " B"], kl: Float[Array, "B T"], slots: Int[Array, " B"], kl_coef: Float[Array, ""] | float
) -> Float[Array, "B T"]:
    """Per-token rewards -kl_coef * kl, plus the score at `slots[b]` (Ziegler et al. 2019, eq. 2). `kl` is 0 off mask.

    Scores are floats: created with the dtype of token ids, 0.7 would be 0.
    """
    at_slot = jnp.arange(kl.shape[1])[None, :] == slots[:, None]
    return -kl_coef * kl + jnp.where(at_slot, scores[:, None], 0.0)


def missing_eos_penalty(
    scores: Float[Array, " B"], finished: Bool[Array, " B"], *, missing_eos: str, missing_eos_value: float
) -> Float[Array, " B"]:
    """Scores of rows that never stopped: kept (off), replaced by the constant, or lowered by it (subtract)."""
    if missing_eos == "off":
        return scores
    penalised = jnp.full_like(scores, missing_eos_value) if missing_eos == "replace" else scores - missing_eos_value
    return jnp.where(finished, scores, penalised)


def combined(
    scores: Float[Array, "*B M"], *, combine: str, combine_coef: Float[Array, ""] | float
) -> Float[Array, "*B"]:
    """One score of the M members of an ensemble: their mean, the least (min), or mean - coef * std (lower_bound).

    Coste et al. 2023 (arXiv 2310.02743), eqs. 2 to 4, who take the variance for the standard deviation (over M).
    Members are sorted first and counted from the least of them: no order of members changes a bit, and equal members
    give their score itself.
    """
    ordered = jnp.sort(scores, axis=-1)
    least = ordered[..., 0]
    if combine == "min":
        return least
    mean = least + (ordered - ordered[..., :1]).mean(axis=-1)
    return mean - combine_coef * disagreement(scores) if combine == "lower_bound" else mean


def disagreement(scores: Float[Array, "*B M"]) -> Float[Array, "*B"]:
    """The standard deviation (over M) of the members of an ensemble; 0 where all are equal, in any order the same."""
    ordered = jnp.sort(scores, axis=-1)
    return (ordered - ordered[..., :1]).std(axis=-1)


def overlong_penalty(
    lengths: Int[Array, " B"], max_length: int, *, overlong_tokens: int, overlong_coef: float
) -> Float[Array, " B"]:
    """From 0 at max_length - overlong_tokens tokens linearly to -coef at max_length; 0 below.

    Soft overlong punishment, Yu et al. 2025 (DAPO, arXiv 2503.14476), eq. 13; 0 everywhere if overlong_tokens is 0.
    """
    if not overlong_tokens:
        return jnp.zeros(lengths.shape)
    beyond = lengths - (max_length - overlong_tokens)
    return -overlong_coef * jnp.clip(beyond / overlong_tokens, 0.0, 1.0)


def gae(
    rewards: Float[Array, "B T"], values: Float[Array, "B T"], *, discount: float, gae_lambda: float
) -> Float[Array, "B T"]:
    """Generalised advantage estimation: A_t = delta_t + gamma lambda A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t.

    Schulman et al. 2015 (arXiv 1506.02438), eq. 16. `values[:, t]` is of the state before token t; rewards and values
    are zero after the last valid slot, so the value that follows it is 0. Returns are advantages + values.
    """

    def of_one(rewards: Array, values: Array) -> Array:
        deltas = rewards + discount * jnp.append(values[1:], 0.0) - values

        def backward(advantage: Array, delta: Array) -> tuple[Array, Array]:
            advantage = delta + discount * gae_lambda * advantage
            return advantage, advantage

        return jax.lax.scan(backward, jnp.zeros((), deltas.dtype), deltas, reverse=True)[1]

    return jax.vmap(of_one)(rewards, values)


def _count_and_mean(x: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The valid entries and their mean, which of equal ones is that number: a second sum takes back the first's error.

    An error of a bit is all that equal entries have to be whitened, and would become a variance of 1.
    """
    count = jnp.maximum(mask.astype(jnp.float32).sum(), 1.0)
    mean = jnp.sum(x, where=mask) / count
    return count, mean + jnp.sum(x - mean, where=mask) / count


def whiten(
    x: Float[Array, "B T"], mask: Bool[Array, "B T"], *, shift_mean: bool, variance: str
) -> Float[Array, "B T"]:
    """(x - mean) * rsqrt(var + 1e-8) over the valid entries, 0 elsewhere; shift_mean=False adds the mean back.

    variance is "biased" (divide by n) or "bessel" (n - 1, as TRL does). Entries that are all `alike` are their mean.
    """
    count, mean = _count_and_mean(x, mask)
    var = jnp.sum((x - mean) ** 2, where=mask) / count
    if variance == "bessel":
        var = var * count / jnp.maximum(count - 1.0, 1.0)
    equal = alike(jnp.where(mask, x, jnp.nan).reshape(1, -1))
    white = jnp.where(equal, 0.0, (x - mean) * jax.lax.rsqrt(var + 1e-8))
    return jnp.where(mask, white if shift_mean else white + mean, 0.0)


def group_advantages(
    scores: Float[Array, " B"], *, group_size: int, baseline: str, scale_rewards: str
) -> Float[Array, " B"]:
    """Scores less a baseline from the other responses to the same prompt; G = group_size rows in a row share a prompt.

    baseline is the mean of the group (group: GRPO, Shao et al. 2024, arXiv 2402.03300, section 4.1.2), the mean of the
    G - 1 others (leave_one_out: RLOO, Ahmadian et al. 2024, arXiv 2402.14740, eq. 8), or nothing (none). scale_rewards
    divides by the standard deviation (n - 1) + 1e-4 of the group's scores or of the batch's, or by nothing (none: Dr.
    GRPO, Liu et al. 2025, arXiv 2503.20783).

    Rows whose score is NaN have NaN, and their group is one of so many rows less. With a baseline, scores that are
    `alike` in a group give exactly 0, and so does the only one of its group.
    """
    groups = scores.reshape(-1, group_size)
    known = ~jnp.isnan(groups)
    count = known.sum(axis=1, keepdims=True)
    # Counted from the least score of the group: the mean of equal floats may differ from them by rounding.
    above = jnp.where(alike(groups)[:, None] & known, 0.0, groups - jnp.nanmin(groups, axis=1, keepdims=True))
    advantages = groups if baseline == "none" else above - above.mean(axis=1, keepdims=True, where=known)
    if baseline == "leave_one_out":
        advantages = advantages * (count / jnp.maximum(count - 1, 1))
    if scale_rewards == "group":
        std = above.std(axis=1, ddof=1, keepdims=True, where=known)
    elif scale_rewards == "batch":
        std = (groups - jnp.nanmin(groups)).std(ddof=1, where=known)
    if scale_rewards != "none":
        advantages = advantages / (jnp.nan_to_num(std) + 1e-4)  # a single score has no deviation
    return advantages.reshape(-1)


def alike(groups: Float[Array, "N G"]) -> Bool[Array, " N"]:
    """Whether the scores of each group, those that are not NaN, differ by no more than float32 rounds sums of them."""
    low, high = jnp.nanmin(groups, axis=1), jnp.nanmax(groups, axis=1)
    size = jnp.maximum(jnp.abs(low), jnp.abs(high))
    return ~(high - low > 4 * jnp.finfo(jnp.float32).eps * size)


def adaptive_kl_coef(
    kl_coef: Float[Array, ""] | float,
    kl: Float[Array, ""] | float,
    num_rows: int,
    *,
    kl_target: float,
    kl_horizon: float,
) -> Float[Array, ""]:
    """coef * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon), kl the mean summed k1 of n rows, in nats.

    Ziegler et al. 2019 (arXiv 1909.08593), section 2.2.
    """
    error = jnp.clip(kl / kl_target - 1.0, -0.2, 0.2)
    return kl_coef * (1.0 + error * num_rows / kl_horizon)


def explained_variance(
    values: Float[Array, "B T"], returns: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """1 - var(returns - values) / var(returns) over the valid entries; 0 where returns vary by rounding alone."""

    def var(x: Array) -> Array:
        count, mean = _count_and_mean(x, mask)
        return jnp.sum((x - mean) ** 2, where=mask) / count

    total, size = var(returns), jnp.max(jnp.abs(returns), where=mask, initial=0.0)
    varies = total > (4 * jnp.finfo(jnp.float32).eps * size) ** 2
    return jnp.where(varies, 1 - var(returns - values) / jnp.where(varies, total, 1.0), 0.0)


def best_of_n_kl(n: Real[Array, "*N"] | int) -> Float[Array, "*N"]:
    """KL in nats of the best-of-n policy to the one it samples from, ln n - (n - 1) / n (Stiennon et al. 2020)."""
    n = jnp.asarray(n, jnp.float32)
    return jnp.log(n) - (n - 1) / n
