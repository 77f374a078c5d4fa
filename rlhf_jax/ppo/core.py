"""PPO for language models: score, shape rewards, GAE, epochs of minibatches, as pure functions.

Every implementation detail is a field of `config.PPOConfig`; docs/algorithms.md has the formulae, docs/design.md the
three programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import advantages as adv
from rlhf_jax.config import PPOArgs, PPOConfig, bind
from rlhf_jax.models import Model
from rlhf_jax.models.experts import Routing, balanced
from rlhf_jax.models.kernels import joined
from rlhf_jax.models.model import by_width
from rlhf_jax.online.core import (
    Score,
    Scored,
    ScoredRows,
    Training,
    Update,
    corrected,
    hidden_of,
    judged,
    of_rollout,
    of_view,
    policy_objective,
    response_logprobs,
    rewards_of,
    rollout_metrics,
    summed,
    token_means,
)
from rlhf_jax.online.epochs import make_epochs
from rlhf_jax.sft import objective as sft_objective
from rlhf_jax.tokens import Packed, token_weights
from rlhf_jax.training.packing import Sharing
from rlhf_jax.training.responses import Ensemble, first_of
from rlhf_jax.training.state import Schedule, held_at_zero, make_optimizer, make_schedule
from rlhf_jax.training.step import Step, make_update
from rlhf_jax.types import Advantage, LossFn, Metrics, Params, PolicyLoss, Rollout, ValueLoss


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Experience(ScoredRows):
    """What the update reads.

    Attributes:
        value_mask: slots whose value is trained; the slot after the response too if the score is there.
        old_values: the value before each token.
    """

    value_mask: Bool[Array, "B T"]
    old_values: Float[Array, "B T"]
    returns: Float[Array, "B T"]


@dataclass(frozen=True)
class Models:
    """The networks of PPO. Parameters are {"policy": ..., "value": ...}; "value" is only a head on a shared trunk.

    Attributes:
        bases: "policy" and "value" -> what they stand on where only adapters and heads are trained: "ref" or "reward".
    """

    policy: Model
    value: Model
    reward: Model | Ensemble | None = None
    shared_trunk: bool = False
    teacher: Model | None = None
    bases: Mapping[str, str] = field(default_factory=dict, hash=False)

    def whole(self, frozen: Mapping[str, Params] | None, params: Params) -> Params:
        """All parameters of policy and critic, of which `params` are trained; frozen has "ref" and "reward"."""
        frozen = {name: first_of((frozen or {})[base]) for name, base in self.bases.items()}
        return {name: joined(frozen.get(name), tree) for name, tree in params.items()}


def values_of(
    models: Models,
    params: Params,
    view: Packed,
    num_tokens: int,
    experts: Int[Array, "B T L k"] | None = None,
    policy_hidden: Array | None = None,
) -> tuple[Float[Array, "B T"], Routing | None]:
    """Values of the states before each response token, and of the one after the last where T holds it.

    They are the critic's, and what its routers did, if it has any; or of a head on the policy's trunk, whose response
    tokens go to `experts` if these are given.
    """
    routing, hidden = None, policy_hidden
    if not models.shared_trunk:
        hidden, routing = hidden_of(models.value, params["value"], view)
    elif hidden is None:
        hidden, _ = hidden_of(models.policy, params["policy"], view, experts)
    return view.to_rows(models.value.scores(params["value"]["score"], hidden), num_tokens), routing


def sharing(models: Models) -> Sharing:
    """Every row has a prompt of its own."""
    return Sharing(width=models.policy.arch.width)


def objective(
    models: Models, config: PPOConfig, policy_loss: PolicyLoss | None = None, value_loss: ValueLoss | None = None
) -> LossFn:
    """The loss of a view of a minibatch, {"experience", "packed", "weights", "value_weights", "temperature"}.

    It is policy + value - entropy; of {"ptx"}, gamma * LM; of a batch with both, their sum. Views of one minibatch add
    up. Give `policy_loss` or `value_loss` to replace the config's.
    """
    value_loss = bind(value_loss or config.value_loss, config)
    lm_loss = sft_objective(by_width(models.policy), lambda logprobs, weights: (-jnp.sum(weights * logprobs), {}))

    def critic(params: Params, batch: Any, logprobs: Array, weights: Array, hidden: Array) -> tuple[Array, Metrics]:
        x, view = batch["experience"], batch["packed"]
        values, routing = values_of(models, params, view, x.mask.shape[1], policy_hidden=hidden)
        weights = of_view(view, batch["value_weights"])
        loss, metrics = value_loss(values, x.old_values, x.returns, weights)
        loss, metrics = config.value_coef * loss, token_means(metrics, batch["value_weights"], config)
        return balanced(models.value.balance_coef, loss, metrics, routing, weights.sum(), group="value_experts")

    of_rows = policy_objective(models.policy, config, bind(policy_loss or config.policy_loss, config), critic)

    def loss_fn(params: Params, batch: Any, key: Array) -> tuple[Array, Metrics]:
        loss, metrics = of_rows(params, batch) if "packed" in batch else (jnp.zeros(()), {})
        if "ptx" in batch:
            lm, said = lm_loss(params["policy"], batch["ptx"], key)
            loss = loss + config.ptx_coef * lm
            metrics |= {f"ptx/{name}": said[f"loss/{name}"] for name in ("nll", "nll_weight")}
        return loss, metrics

    return loss_fn


def run_networks(
    models: Models,
    params: Params,
    ref: Params,
    reward: Params,
    teacher: Params | None,
    temperature: Array,
    rollout: Rollout,
    view: Packed,
    *,
    recompute: bool,
) -> dict[str, Array]:
    """Of a view's rows ref_logprobs, values and, recomputed, old_logprobs [B, T]; and what is `judged`.

    The view is of the rollout.
    """
    law = temperature, rollout.tokens.shape[1], rollout.kept, rollout.experts
    out, hidden = {"ref_logprobs": response_logprobs(models.policy, ref, view, *law)[0]}, None
    if recompute:
        out["old_logprobs"], _, hidden, _ = response_logprobs(models.policy, params["policy"], view, *law)
    out["values"], _ = values_of(models, params, view, rollout.tokens.shape[1], rollout.experts, hidden)
    return out | judged(models, reward, teacher, view, law)


def score_slots(mask: Bool[Array, "B T"], score_at: str) -> tuple[Int[Array, " B"], Bool[Array, "B T"]]:
    """Where each row's score is paid, and the slots whose value is trained.

    Response [a, b], T = 4: last pays at 1 (b) and trains 0, 1; after_eos pays at 2 and trains 0, 1, 2. A response that
    fills all of T is paid at its last token either way.
    """
    last = mask.sum(axis=1, dtype=jnp.int32) - 1
    if score_at == "last":
        return last, mask
    slots = jnp.minimum(last + 1, mask.shape[1] - 1)
    return slots, jnp.arange(mask.shape[1])[None, :] <= slots[:, None]


def make_score(
    models: Models,
    config: PPOConfig,
    *,
    recompute: bool,
    importance: str = "off",
    advantage: Advantage | None = None,
    **reward_settings: Any,
) -> Score:
    """The scoring program, not yet compiled; of rows it says "kl" and what `rewards_of` says.

    `advantage` replaces the config's; `reward_settings` are those of `rewards_of`.
    """
    estimate: Advantage = bind(advantage or config.advantage, config)

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
        whole, mask, answered = models.whole({"ref": ref, "reward": reward}, params), rollout.mask, ~jnp.isnan(host)
        run = partial(run_networks, models, whole, ref, reward, teacher, temperature, rollout, recompute=recompute)
        nets = {"old_logprobs": rollout.logprobs, **summed(rollout, config, run, sharing(models))}
        old_logprobs, ref_logprobs = (jnp.where(mask, nets[n], 0.0) for n in ("old_logprobs", "ref_logprobs"))

        # Rewards [B, T]: the price of each token's KL, what a teacher pays, and at a row's slot its score.
        k1, k3 = adv.kl_k1(old_logprobs, ref_logprobs), adv.kl_k3(old_logprobs, ref_logprobs)
        raw, scores, dense, earned, rows = rewards_of(nets, old_logprobs, host, rollout, config, **reward_settings)
        slots, value_mask = score_slots(mask, config.score_at)
        mask, value_mask = (which & answered[:, None] for which in (mask, value_mask))
        rewards = dense + adv.shaped_rewards(scores, k1 if config.kl_estimator == "k1" else k3, slots, kl_coef)

        # Advantages and returns [B, T].
        values = jnp.where(value_mask, nets["values"], 0.0)
        advantages, returns = estimated(estimate, rewards, values, mask, value_mask, config)
        advantages, weighted = corrected(advantages, old_logprobs, rollout, config, importance)
        experience = Experience(
            **of_rollout(rollout, mask, old_logprobs, jnp.where(mask, advantages, 0.0)),
            value_mask=value_mask,
            old_values=values,
            returns=jnp.where(value_mask, returns, 0.0),
        )

        # What is reported, and the price of the next iteration.
        kl = k1.sum(axis=1)
        objective = scores + dense.sum(axis=1) - kl_coef * kl
        metrics = rollout_metrics(rollout, old_logprobs, raw, objective, answered) | critic_metrics(experience)
        metrics |= {"rollout/kl": kl.mean(), "rollout/kl_k3": k3.sum(axis=1).mean(), "ppo/kl_coef": kl_coef}
        metrics |= {**weighted, **earned}
        return experience, next_kl_coef(kl_coef, kl, config), metrics, {**rows, "kl": kl}

    return score


def estimated(
    estimate: Advantage,
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    value_mask: Bool[Array, "B T"],
    config: PPOConfig,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(advantages, returns) of rewards, which count where a value is trained; each whitened if the config asks."""
    rewards = jnp.where(value_mask, rewards, 0.0)
    if config.whiten_rewards:
        rewards = adv.whiten(rewards, value_mask, shift_mean=False, variance=config.whiten_variance)
    advantages = estimate(rewards, values)
    returns = advantages + values
    if config.whiten_advantages:
        advantages = adv.whiten(advantages, mask, shift_mean=True, variance=config.whiten_variance)
    return advantages, returns


def next_kl_coef(kl_coef: Float[Array, ""], kl: Float[Array, " B"], config: PPOConfig) -> Float[Array, ""]:
    """The price of the next iteration, of the KL of each row; the same where that is NaN, which would stay."""
    if config.kl_controller == "fixed":
        return kl_coef
    options = {"kl_target": config.kl_target, "kl_horizon": config.kl_horizon}
    new = adv.adaptive_kl_coef(kl_coef, kl.mean(), len(kl), **options)
    return jnp.where(jnp.isnan(new), kl_coef, new)


def critic_metrics(x: Experience) -> Metrics:
    """What the critic says, and how good it is."""
    return {
        "value/mean": jnp.sum(x.old_values * token_weights(x.value_mask, "token")),
        "value/explained_variance": adv.explained_variance(x.old_values, x.returns, x.value_mask),
    }


def make_ppo_update(step: Step, config: PPOConfig, sharing: Sharing | None = None) -> Update:
    """The update program, not yet compiled; `step` is `step.make_update` of the objective."""
    return make_epochs(step, config, {"weights": "mask", "value_weights": "value_mask"}, sharing)


def make_ppo_optimizer(run: PPOArgs) -> tuple[optax.GradientTransformationExtraArgs, Schedule]:
    """One optimiser for {"policy", "value"}, each with its own settings, clip and schedule over PPO iterations.

    Also returns the policy's learning rate by iteration. It is zero during the critic's warm-up.
    """
    config = run.ppo
    per_iteration = config.epochs * config.minibatches
    policy_rate, value_rate = (make_schedule(c, config.iterations) for c in (run.optim, run.value_optim))

    def policy_schedule(iteration: Any) -> Array:
        return jnp.where(iteration < config.critic_warmup, 0.0, policy_rate(iteration))

    parts = {
        "policy": make_optimizer(run.optim, lambda step: policy_schedule(step // per_iteration)),
        "value": make_optimizer(run.value_optim, lambda step: value_rate(step // per_iteration)),
    }
    parts = {name: held_at_zero(tx) for name, tx in parts.items()}
    return optax.partition(parts, {name: name for name in parts}), policy_schedule


def make_ppo_step(
    models: Models, run: PPOArgs, policy_loss: PolicyLoss | None = None, value_loss: ValueLoss | None = None
) -> Training:
    """(update program, optimiser, policy learning rate by iteration) of a config."""
    tx, schedule = make_ppo_optimizer(run)
    loss_fn = objective(models, run.ppo, policy_loss, value_loss)
    step = make_update(loss_fn, tx, run.ppo.accumulate, join=models.whole)
    return make_ppo_update(step, run.ppo, sharing(models)), tx, schedule
