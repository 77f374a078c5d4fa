"""Policy gradients with a baseline from the other responses to a prompt, as pure functions.

A group must be whole in `score` alone, which sees the whole rollout: once a response has its advantage, its row may go
into any minibatch. Minibatches keep groups together where they can, so that a prompt is computed once for its rows.
Every detail is a field of `config.GroupConfig`; docs/algorithms.md has the formulae.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax import advantages as adv
from rlhf_jax.config import GroupConfig, OptimConfig, bind
from rlhf_jax.losses import reference_kl_loss
from rlhf_jax.models import Model
from rlhf_jax.models.kernels import joined
from rlhf_jax.online.core import (
    Score,
    Scored,
    ScoredRows,
    Training,
    corrected,
    judged,
    of_rollout,
    policy_objective,
    response_logprobs,
    rewards_of,
    rollout_metrics,
    summed,
    token_means,
)
from rlhf_jax.online.epochs import make_epochs
from rlhf_jax.tokens import Packed
from rlhf_jax.training.packing import Sharing
from rlhf_jax.training.responses import Ensemble
from rlhf_jax.training.state import make_optimizer, make_schedule
from rlhf_jax.training.step import make_update
from rlhf_jax.types import GroupAdvantage, LossFn, Metrics, Params, PolicyLoss, Rollout


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Experience(ScoredRows):
    """What the update reads.

    Attributes:
        ref_logprobs: None if the loss has no KL.
    """

    ref_logprobs: Float[Array, "B T"] | None


@dataclass(frozen=True)
class Models:
    """The networks; the trained parameters are {"policy": ...}, with `adapted` adapters on the frozen reference."""

    policy: Model
    reward: Model | Ensemble | None = None
    adapted: bool = False
    teacher: Model | None = None

    def whole(self, frozen: Params, params: Params) -> Params:
        """All parameters, of which `params` are trained."""
        return {"policy": joined(frozen, params["policy"])} if self.adapted else params


def sharing(models: Models, config: GroupConfig) -> Sharing:
    """The rows of a group answer one prompt, which is computed once where that pays."""
    return Sharing(config.group_size, models.policy.arch.width)


def objective(models: Models, config: GroupConfig, policy_loss: PolicyLoss | None = None) -> LossFn:
    """The loss of a view of a minibatch, {"experience", "packed", "weights", "temperature"}.

    It is policy + kl_coef * KL - entropy. Views of one minibatch add up. Give `policy_loss` to replace the config's.
    """
    kl_loss = bind(reference_kl_loss, config)

    def leash(params: Params, batch: Any, logprobs: Array, weights: Array, hidden: Array) -> tuple[Array, Metrics]:
        if (ref_logprobs := batch["experience"].ref_logprobs) is None:
            return jnp.zeros(()), {}
        kl, metrics = kl_loss(logprobs, ref_logprobs, weights)
        return config.kl_coef * kl, token_means(metrics, batch["weights"], config)

    of_rows = policy_objective(models.policy, config, bind(policy_loss or config.policy_loss, config), leash)
    return lambda params, batch, key: of_rows(params, batch)


def run_networks(
    models: Models,
    policy: Params,
    ref: Params | None,
    reward: Params | None,
    teacher: Params | None,
    temperature: Array,
    rollout: Rollout,
    view: Packed,
    *,
    recompute: bool,
) -> dict[str, Array]:
    """Of a view's rows old_logprobs, recomputed, and of a reference ref_logprobs [B, T]; and what is `judged`.

    The view is of the rollout. What is not asked for or not there is left out.
    """
    asked = {"old_logprobs": policy if recompute else None, "ref_logprobs": ref}
    law = temperature, rollout.tokens.shape[1], rollout.kept, rollout.experts
    of = lambda params: response_logprobs(models.policy, params, view, *law)[0]  # noqa: E731
    out = {name: of(params) for name, params in asked.items() if params is not None}
    return out | judged(models, reward, teacher, view, law)


def advantages_of(
    scores: Float[Array, " B"],
    kl: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    kl_coef: Float[Array, ""] | float,
    config: GroupConfig,
    compare: GroupAdvantage,
    dense: Float[Array, "B T"] | float = 0.0,
) -> Float[Array, "B T"]:
    """Advantages, zero off the mask, of scores that `compare` sets beside one another, and of the KL (k1, 0 off the
    response) that the reward pays.

    The KL of a whole response, less what is paid `dense`, lowers its score before the baseline (RLOO); with
    reward_to_go that from a token on lowers the token's advantage after it (REINFORCE++: A_t = r - sum over i >= t of
    discount^(i - t) (kl_coef kl_i - dense_i)).
    """
    cost = kl_coef * kl - dense
    if config.reward_to_go:
        to_go = adv.gae(cost, jnp.zeros_like(cost), discount=config.discount, gae_lambda=1.0)  # sums from a token on
        advantages = compare(scores)[:, None] - to_go
    else:
        advantages = jnp.broadcast_to(compare(scores - cost.sum(axis=1))[:, None], mask.shape)
    if config.whiten_advantages:
        advantages = adv.whiten(advantages, mask, shift_mean=True, variance="biased")
    return jnp.where(mask, advantages, 0.0)


def make_score(
    models: Models,
    config: GroupConfig,
    *,
    recompute: bool,
    importance: str = "off",
    advantage: GroupAdvantage | None = None,
    **reward_settings: Any,
) -> Score:
    """The scoring program, not yet compiled; of rows it says "kl" of a reference, "alike" and what `rewards_of` says.

    Groups are `advantages.alike`. `advantage` replaces the config's; `reward_settings` are those of `rewards_of`.
    """
    compare: GroupAdvantage = bind(advantage or config.advantage, config)

    def score(
        params: Params,
        ref: Params,
        reward: Params,
        rollout: Rollout,
        host: Array,
        kl_coef: Array,
        temperature: Array,
        teacher: Params | None = None,
    ) -> Scored:
        # The networks, some rows at a time: log-probs [B, T], 0 off the mask, and raw scores [B].
        frozen = models.whole(ref, params)["policy"], ref, reward, teacher
        run = partial(run_networks, models, *frozen, temperature, rollout, recompute=recompute)
        nets = {"old_logprobs": rollout.logprobs, **summed(rollout, config, run, sharing(models, config))}
        old_logprobs = jnp.where(rollout.mask, nets["old_logprobs"], 0.0)
        ref_logprobs = old_logprobs if ref is None else jnp.where(rollout.mask, nets["ref_logprobs"], 0.0)

        # What is compared, scores [B] and the paid part of the KL [B, T], and the tokens [B, T] that are trained on.
        k1 = adv.kl_k1(old_logprobs, ref_logprobs)
        raw, scores, dense, earned, rows = rewards_of(nets, old_logprobs, host, rollout, config, **reward_settings)
        answered, paid = ~jnp.isnan(host), scores + dense.sum(axis=1)
        mask = rollout.mask & (answered & (rollout.finished | (not config.mask_truncated)))[:, None]
        kl = k1 if config.kl_in == "reward" else jnp.zeros_like(k1)
        advantages = advantages_of(scores, kl, mask, kl_coef, config, compare, dense)
        advantages, weighted = corrected(advantages, old_logprobs, rollout, config, importance)
        experience = Experience(
            **of_rollout(rollout, mask, old_logprobs, advantages),
            ref_logprobs=ref_logprobs if config.kl_coef and config.kl_in == "loss" else None,
        )

        # What is reported: scalars, and numbers [B] of each row.
        rows["alike"] = jnp.repeat(adv.alike(paid.reshape(-1, config.group_size)), config.group_size)
        metrics = rollout_metrics(rollout, old_logprobs, raw, paid - kl_coef * k1.sum(axis=1), answered)
        metrics |= {**weighted, **earned, **group_metrics(raw, answered, rows["alike"], config)}
        if ref is not None:
            rows["kl"], k3 = k1.sum(axis=1), adv.kl_k3(old_logprobs, ref_logprobs)
            metrics |= {"rollout/kl": rows["kl"].mean(), "rollout/kl_k3": k3.sum(axis=1).mean()}
        return experience, kl_coef, metrics, rows

    return score


def group_metrics(
    rewards: Float[Array, " B"], answered: Bool[Array, " B"], alike: Bool[Array, " B"], config: GroupConfig
) -> Metrics:
    """The mean spread of the rewards in a group and, if they are compared, how many are paid alike."""
    metrics: Metrics = {}
    if config.group_size > 1:
        groups, known = (x.reshape(-1, config.group_size) for x in (rewards, answered))
        metrics["group/reward_std"] = groups.std(axis=1, where=known).mean(where=known.any(axis=1))
    if config.baseline != "none":
        metrics["group/equal_fraction"] = alike.mean()
    return metrics


def make_group_step(
    models: Models, config: GroupConfig, optim: OptimConfig, policy_loss: PolicyLoss | None = None
) -> Training:
    """(update program, optimiser, learning rate by iteration) of a config."""
    per_iteration, schedule = config.epochs * config.minibatches, make_schedule(optim, config.iterations)
    tx = make_optimizer(optim, lambda step: schedule(step // per_iteration))
    step = make_update(objective(models, config, policy_loss), tx, config.accumulate, join=models.whole)
    return make_epochs(step, config, {"weights": "mask"}, sharing(models, config)), tx, schedule
