"""Losses of a policy against preferences, without a reward model: DPO and kin, KTO, ORPO, SimPO, RRHF.

A loss names the columns of a batch that it reads. `logprobs` and `ref_logprobs` are sums over a response under policy
and reference (one that does not name `ref_logprobs` needs no reference), `lengths` their numbers of tokens; of pairs
they are [B, 2], first the chosen response. `labels` are the share of raters that prefer it: every loss of pairs is the
expectation over who is better, y l(first, second) + (1 - y) l(second, first). `weights` weigh pairs and sum to one;
`token_weights` weigh each token of a response in the mean over tokens, zero for what is not to be imitated.

Below, r = beta (logprobs - ref_logprobs) is the implied reward and d = r_w - r_l.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid
from jaxtyping import Array, Bool, Float

from rlhf_jax.errors import UserError
from rlhf_jax.losses.policy import next_token_loss
from rlhf_jax.losses.reward import accuracy, order_right, ordered_pairs, pairs_right
from rlhf_jax.types import Metrics

Loss = tuple[Float[Array, ""], Metrics]
Pairs = Float[Array, "B 2"]
Rows = Float[Array, " B"]


def _expected(
    each: Callable[[Array, Array], Array], compared: Pairs, rewards: Pairs, labels: Rows, weights: Rows
) -> Loss:
    """The mean of each(of the better, of the worse) over pairs and raters, and what to log of the implied rewards."""
    first, second = compared[:, 0], compared[:, 1]
    loss = jnp.sum(weights * (labels * each(first, second) + (1 - labels) * each(second, first)))
    margin = rewards[:, 0] - rewards[:, 1]
    return loss, {
        "loss/preference": loss,
        "rewards/chosen": jnp.sum(weights * rewards[:, 0]),
        "rewards/rejected": jnp.sum(weights * rewards[:, 1]),
        "rewards/margin": jnp.sum(weights * margin),
        **accuracy("rewards", *pairs_right(margin, labels), weights),
    }


def dpo_loss(
    logprobs: Pairs,
    ref_logprobs: Pairs,
    labels: Rows,
    margins: Rows,
    weights: Rows,
    *,
    beta: float,
    label_smoothing: float,
) -> Loss:
    """-log sigmoid(d - m). Rafailov et al. 2023 (arXiv 2305.18290), eq. 7.

    Margins m as in ODPO (arXiv 2402.10571); label_smoothing e makes labels y + e (1 - 2 y), conservative DPO.
    """
    rewards = beta * (logprobs - ref_logprobs)
    labels = labels + label_smoothing * (1 - 2 * labels)
    return _expected(lambda won, lost: -log_sigmoid(won - lost - margins), rewards, rewards, labels, weights)


def ipo_loss(
    logprobs: Pairs, ref_logprobs: Pairs, lengths: Pairs, labels: Rows, weights: Rows, *, beta: float
) -> Loss:
    """(h_w - h_l - 1 / (2 beta))^2, h the log-ratio per token. Azar et al. 2023 (arXiv 2310.12036), eq. 17.

    The paper's h is the sum over the response; per token is what its authors ran and TRL computes.
    """
    ratios = logprobs - ref_logprobs
    per_token = ratios / jnp.maximum(lengths, 1)
    return _expected(lambda won, lost: (won - lost - 1 / (2 * beta)) ** 2, per_token, beta * ratios, labels, weights)


def hinge_loss(logprobs: Pairs, ref_logprobs: Pairs, labels: Rows, weights: Rows, *, beta: float) -> Loss:
    """max(0, 1 - d). Zhao et al. 2023 (SLiC, arXiv 2305.10425) with a reference, as Liu et al. (arXiv 2309.06657)."""
    rewards = beta * (logprobs - ref_logprobs)
    return _expected(lambda won, lost: jax.nn.relu(1 - (won - lost)), rewards, rewards, labels, weights)


def robust_dpo_loss(
    logprobs: Pairs, ref_logprobs: Pairs, labels: Rows, weights: Rows, *, beta: float, label_smoothing: float
) -> Loss:
    """(-(1 - e) log sigmoid(d) + e log sigmoid(-d)) / (1 - 2 e): unbiased where labels are flipped with chance e.

    Chowdhury et al. 2024 (arXiv 2403.00409), eq. 3; e is label_smoothing, below 1/2.
    """
    rewards, e = beta * (logprobs - ref_logprobs), label_smoothing

    def each(won: Array, lost: Array) -> Array:
        return (-(1 - e) * log_sigmoid(won - lost) + e * log_sigmoid(lost - won)) / (1 - 2 * e)

    return _expected(each, rewards, rewards, labels, weights)


def exo_loss(
    logprobs: Pairs, ref_logprobs: Pairs, labels: Rows, weights: Rows, *, beta: float, label_smoothing: float
) -> Loss:
    """KL((sigmoid(d), sigmoid(-d)) || (1 - e, e)), the reverse of DPO's. Ji et al. 2024 (arXiv 2402.00856), eq. 16.

    e is label_smoothing.

    Raises:
        UserError: e is 0, at which the KL is infinite.
    """
    if label_smoothing <= 0:
        raise UserError(f"exo_loss needs dpo.label_smoothing above 0, not {label_smoothing}; the paper takes 0.001")
    rewards = beta * (logprobs - ref_logprobs)

    def each(won: Array, lost: Array) -> Array:
        target_w, target_l = jnp.log1p(-jnp.float32(label_smoothing)), jnp.log(jnp.float32(label_smoothing))
        log_w, log_l = log_sigmoid(won - lost), log_sigmoid(lost - won)
        return sigmoid(won - lost) * (log_w - target_w) + sigmoid(lost - won) * (log_l - target_l)

    return _expected(each, rewards, rewards, labels, weights)


def nca_loss(logprobs: Pairs, ref_logprobs: Pairs, labels: Rows, weights: Rows, *, beta: float) -> Loss:
    """-log sigmoid(r_w) - (log sigmoid(-r_w) + log sigmoid(-r_l)) / 2. Chen et al. 2024 (arXiv 2402.05369), eq. 8."""
    rewards = beta * (logprobs - ref_logprobs)

    def each(won: Array, lost: Array) -> Array:
        return -log_sigmoid(won) - 0.5 * log_sigmoid(-won) - 0.5 * log_sigmoid(-lost)

    return _expected(each, rewards, rewards, labels, weights)


def bco_loss(logprobs: Pairs, ref_logprobs: Pairs, labels: Rows, weights: Rows, *, beta: float) -> Loss:
    """-log sigmoid(r_w) - log sigmoid(-r_l). Jung et al. 2024 (arXiv 2404.04656), eq. 6, without its reward shift."""
    rewards = beta * (logprobs - ref_logprobs)
    return _expected(lambda won, lost: -log_sigmoid(won) - log_sigmoid(-lost), rewards, rewards, labels, weights)


def sppo_loss(logprobs: Pairs, ref_logprobs: Pairs, labels: Rows, weights: Rows, *, beta: float) -> Loss:
    """(h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2, h the log-ratio. Wu et al. 2024 (arXiv 2405.00675), eq. 4.7."""
    ratios, goal = logprobs - ref_logprobs, 0.5 / beta
    return _expected(lambda won, lost: (won - goal) ** 2 + (lost + goal) ** 2, ratios, beta * ratios, labels, weights)


def apo_zero_loss(logprobs: Pairs, ref_logprobs: Pairs, labels: Rows, weights: Rows, *, beta: float) -> Loss:
    """1 - sigmoid(r_w) + sigmoid(r_l), for chosen responses better than the policy's own.

    D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7.
    """
    rewards = beta * (logprobs - ref_logprobs)
    return _expected(lambda won, lost: sigmoid(-won) + sigmoid(lost), rewards, rewards, labels, weights)


def apo_down_loss(logprobs: Pairs, ref_logprobs: Pairs, labels: Rows, weights: Rows, *, beta: float) -> Loss:
    """sigmoid(r_w) + 1 - sigmoid(d), for chosen responses worse than the policy's own. arXiv 2408.06266, eq. 8."""
    rewards = beta * (logprobs - ref_logprobs)
    return _expected(lambda won, lost: sigmoid(won) + sigmoid(lost - won), rewards, rewards, labels, weights)


def discopop_loss(
    logprobs: Pairs, ref_logprobs: Pairs, labels: Rows, weights: Rows, *, beta: float, discopop_tau: float
) -> Loss:
    """-(1 - s) log sigmoid(d) + s exp(-d) with s = sigmoid(d / tau). Lu et al. 2024 (arXiv 2406.08414), eq. 5."""
    rewards, tau = beta * (logprobs - ref_logprobs), discopop_tau

    def each(won: Array, lost: Array) -> Array:
        d = won - lost
        # s exp(-d) as one exponent: exp(-d) alone overflows where s is all but zero.
        return -sigmoid(-d / tau) * log_sigmoid(d) + jnp.exp(log_sigmoid(d / tau) - d)

    return _expected(each, rewards, rewards, labels, weights)


def length_normalised_dpo_loss(
    logprobs: Pairs, ref_logprobs: Pairs, lengths: Pairs, labels: Rows, weights: Rows, *, beta: float
) -> Loss:
    """-log sigmoid(d) with the rewards per token, beta (logprobs - ref_logprobs) / length. TRL's sigmoid_norm."""
    rewards = beta * (logprobs - ref_logprobs) / jnp.maximum(lengths, 1)
    return _expected(lambda won, lost: -log_sigmoid(won - lost), rewards, rewards, labels, weights)


def simpo_loss(
    logprobs: Pairs, lengths: Pairs, labels: Rows, weights: Rows, *, beta: float, target_margin: float
) -> Loss:
    """-log sigmoid(d - gamma), r = beta logprobs / length, no reference. Meng et al. 2024 (arXiv 2405.14734), eq. 6.

    gamma is target_margin.
    """
    rewards = beta * logprobs / jnp.maximum(lengths, 1)
    return _expected(lambda won, lost: -log_sigmoid(won - lost - target_margin), rewards, rewards, labels, weights)


def cpo_loss(logprobs: Pairs, labels: Rows, weights: Rows, *, beta: float, label_smoothing: float) -> Loss:
    """-log sigmoid(beta (logprobs_w - logprobs_l)): DPO against a uniform reference. Xu et al. 2024.

    arXiv 2401.08417, which adds the NLL of the chosen response: `dpo.sft_coef` 1.
    """
    rewards = beta * logprobs
    labels = labels + label_smoothing * (1 - 2 * labels)
    return _expected(lambda won, lost: -log_sigmoid(won - lost), rewards, rewards, labels, weights)


def orpo_loss(
    logprobs: Pairs, lengths: Pairs, labels: Rows, weights: Rows, token_weights: Pairs, *, beta: float
) -> Loss:
    """NLL of the chosen response - beta log sigmoid(log odds_w - log odds_l), odds p / (1 - p), p per token.

    Hong et al. 2024 (arXiv 2403.07691), eqs. 6 and 7; no reference. log p is the mean over the response's tokens.
    """
    mean = jnp.minimum(logprobs / jnp.maximum(lengths, 1), -1e-7)  # the odds of p = 1 are infinite
    # log(1 - exp(x)) in the form that keeps its digits; each branch sees only arguments at which it is finite.
    near, far = jnp.maximum(mean, -0.6931472), jnp.minimum(mean, -0.6931472)
    log_odds = mean - jnp.where(mean > -0.6931472, jnp.log(-jnp.expm1(near)), jnp.log1p(-jnp.exp(far)))
    loss, metrics = _expected(
        lambda won, lost: -beta * log_sigmoid(won - lost), log_odds, beta * mean, labels, weights
    )
    return loss + next_token_loss(logprobs, token_weights)[0], metrics


def kto_loss(
    logprobs: Pairs,
    ref_logprobs: Pairs,
    labels: Rows,
    weights: Rows,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Loss:
    """lambda_y (1 - sigmoid(+-(r - beta KL))), + for desirable responses (label 1), - for others.

    Ethayarajh et al. 2024 (arXiv 2402.01306), eqs. 7 and 8. The places of a row are its response and one that belongs
    to another prompt, whose mean log-ratio over a microbatch, not below 0 and without gradient, estimates the KL.
    """
    ratios = logprobs - ref_logprobs
    total = jnp.sum(weights)
    kl = jnp.maximum(jnp.sum(weights * ratios[:, 1]) / jnp.maximum(total, 1e-30), 0.0)
    kl = jax.lax.stop_gradient(kl)
    loss, metrics = _unpaired(
        beta * ratios[:, 0], beta * kl, labels, weights * _sides(labels, desirable_weight, undesirable_weight), weights
    )
    return loss, {**metrics, "policy/kl_baseline": total * kl}


def apo_zero_unpaired_loss(
    logprobs: Pairs,
    ref_logprobs: Pairs,
    labels: Rows,
    weights: Rows,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Loss:
    """`kto_loss` with a KL of 0: `apo_zero_loss` for responses that come one by one. TRL's apo_zero_unpaired."""
    rewards = beta * (logprobs - ref_logprobs)[:, 0]
    weighed = weights * _sides(labels, desirable_weight, undesirable_weight)
    return _unpaired(rewards, jnp.zeros(()), labels, weighed, weights)


def _sides(labels: Array, desirable_weight: float, undesirable_weight: float) -> Array:
    return labels * desirable_weight + (1 - labels) * undesirable_weight


def _unpaired(rewards: Array, baseline: Array, labels: Array, weighed: Array, weights: Array) -> Loss:
    """Sum of weighed (1 - sigmoid(+-(r - baseline))), and how well the rewards tell the labels."""
    sign, above = 2 * labels - 1, rewards - baseline
    loss = jnp.sum(weighed * sigmoid(-sign * above))
    return loss, {
        "loss/preference": loss,
        **accuracy("rewards", *pairs_right(above, labels), weights),
        "rewards/signed": jnp.sum(weights * sign * rewards),
    }


def rrhf_ranking_loss(
    logprobs: Float[Array, "B K"],
    lengths: Float[Array, "B K"],
    ranks: Float[Array, "B K"],
    mask: Bool[Array, "B K"],
    weights: Rows,
    *,
    length_penalty: float,
) -> Loss:
    """Sum over pairs of which j is better than i of max(0, p_i - p_j), p = logprobs / length^length_penalty.

    Yuan et al. 2023 (arXiv 2304.05302), eqs. 1 and 2. Lower `ranks` are better; responses off the mask and ties make
    no pair. The SFT loss on the best response, eq. 3, is `rrhf.sft_coef`.
    """
    scores = logprobs / jnp.maximum(lengths, 1) ** length_penalty
    better, mean = ordered_pairs(ranks, mask)
    margin = scores[:, :, None] - scores[:, None, :]  # of i over j, to be positive where i is the better
    loss = jnp.sum(weights * jnp.sum(jnp.where(better, jax.nn.relu(-margin), 0.0), (1, 2)))
    return loss, {
        "loss/rrhf_ranking": loss,
        **accuracy("rewards", *order_right(margin, better, mean), weights),
        "rewards/margin": jnp.sum(weights * mean(margin)),
    }
