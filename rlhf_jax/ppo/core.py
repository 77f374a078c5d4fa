"""PPO for language models: score, shape rewards, GAE, epochs of minibatches, as pure functions.

    rollout  (one jit)  prompts -> Rollout
    score    (one jit)  Rollout -> Experience: rewards, values, reference log-probs, KL, advantages
    update   (one jit)  Experience -> new state, over epochs and minibatches, old state donated

Every implementation detail is a field of `config.PPOConfig`; docs/algorithms.md has the formulae.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import advantages as adv
from rlhf_jax.config import PPOConfig, PPORun, bind
from rlhf_jax.errors import UserError
from rlhf_jax.losses import clipped_value_loss
from rlhf_jax.models import Model
from rlhf_jax.sft import objective as sft_objective
from rlhf_jax.sharding import ROWS, constrain
from rlhf_jax.state import Schedule, TrainState, make_optimizer, make_schedule
from rlhf_jax.step import Step, make_update
from rlhf_jax.tokens import map_microbatches, positions_from_mask, token_weights
from rlhf_jax.types import LossFn, Metrics, Params, PolicyLoss, Rollout


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Experience:
    """A scored rollout, what the update reads. S = P + T.

    Attributes:
        tokens: int32[B, S], prompt and response.
        positions: int32[B, S].
        segment_ids: int32[B, S], 1 on real tokens, 0 on padding.
        mask: bool[B, T], response tokens, the stop token included.
        value_mask: bool[B, T], slots whose value is trained; the slot after the response too if the score is there.
        old_logprobs: float32[B, T].
        old_values: float32[B, T], the value before each token.
        advantages: float32[B, T].
        returns: float32[B, T].
    """

    tokens: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    mask: Bool[Array, "B T"]
    value_mask: Bool[Array, "B T"]
    old_logprobs: Float[Array, "B T"]
    old_values: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    returns: Float[Array, "B T"]


@dataclass(frozen=True)
class Models:
    """The networks of PPO. Parameters are {"policy": ..., "value": ...}; "value" is only a head on a shared trunk."""

    policy: Model
    value: Model
    reward: Model | None = None
    shared_trunk: bool = False


def before_tokens(hidden: Float[Array, "B S D"], num_tokens: int) -> Float[Array, "B T D"]:
    """Hidden states of the states before each of the last T tokens.

    Prompt [p, q], response [a, b], T = 2: the hidden states of q and a, which predict a and b.
    """
    return hidden[:, -num_tokens - 1 : -1]


def forward(
    models: Models, params: Params, sequence: dict[str, Array], temperature: Array, num_tokens: int, **kwargs: Any
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probs, entropies and values of the last T tokens; `sequence` has tokens, positions, segment_ids [B, S]."""
    hidden = models.policy.apply(params["policy"], **sequence)
    logprobs, entropy = models.policy.logprobs(
        params["policy"],
        before_tokens(hidden, num_tokens),
        sequence["tokens"][:, -num_tokens:],
        temperature,
        **kwargs,
    )
    return logprobs, entropy, values_of(models, params, sequence, num_tokens, hidden)


def values_of(
    models: Models, params: Params, sequence: dict[str, Array], num_tokens: int, policy_hidden: Array | None = None
) -> Float[Array, "B T"]:
    """Values of the states before each of the last T tokens, from the critic or from a head on the policy's trunk."""
    if not models.shared_trunk:
        hidden = models.value.apply(params["value"], **sequence)
    else:
        hidden = models.policy.apply(params["policy"], **sequence) if policy_hidden is None else policy_hidden
    return models.value.scores(params["value"]["score"], before_tokens(hidden, num_tokens))


def objective(models: Models, config: PPOConfig, policy_loss: PolicyLoss | None = None) -> LossFn:
    """The loss of one minibatch {"experience", "temperature", "ptx"?}: policy + value - entropy (+ gamma * LM).

    Give `policy_loss` to replace the clipped surrogate. "temperature" is float32[B], constant, to travel with rows.
    """
    policy_loss = bind(policy_loss or config.policy_loss, config)
    value_loss = bind(clipped_value_loss, config)
    lm_loss = sft_objective(models.policy, lambda logprobs, weights: (-jnp.sum(weights * logprobs), {}))

    def loss_fn(params: Params, batch: Any, key: Array) -> tuple[Array, Metrics]:
        x: Experience = batch["experience"]
        sequence = {"tokens": x.tokens, "positions": x.positions, "segment_ids": x.segment_ids}
        logprobs, entropy, values = forward(
            models, params, sequence, batch["temperature"][0], x.mask.shape[1], with_entropy=True
        )
        # Off the mask the ratio is set to 1, so that no padding token can produce an infinity.
        logprobs = jnp.where(x.mask, logprobs, x.old_logprobs)
        loss, metrics = policy_loss(logprobs, x.old_logprobs, x.advantages, batch["weights"])
        v_loss, v_metrics = value_loss(values, x.old_values, x.returns, batch["value_weights"])
        entropy = jnp.sum(batch["weights"] * entropy)
        metrics = {"policy/loss": loss, **metrics, **v_metrics, "policy/entropy": entropy}
        loss = loss + config.value_coef * v_loss
        if config.entropy_coef:  # 0 * entropy would still be differentiated, a whole pass over the logits
            loss = loss - config.entropy_coef * entropy
        if "ptx" in batch:
            lm, _ = lm_loss(params["policy"], batch["ptx"], key)
            loss, metrics["ptx/nll"] = loss + config.ptx_coef * lm, lm
        return loss, metrics

    return loss_fn


def truncated(rollout: Rollout, stop_ids: tuple[int, ...], truncate_after: int) -> Rollout:
    """A full-length rollout cut after the first stop id at index >= truncate_after (Ziegler et al. 2019, appendix)."""
    index = jnp.arange(rollout.tokens.shape[1])[None, :]
    stop = jnp.isin(rollout.tokens, jnp.asarray(stop_ids, jnp.int32)) & (index >= truncate_after)
    before = jnp.cumsum(stop, axis=1) - stop == 0  # true up to and including the first stop
    return Rollout(
        prompt=rollout.prompt,
        prompt_mask=rollout.prompt_mask,
        tokens=jnp.where(before, rollout.tokens, 0),
        mask=before,
        logprobs=jnp.where(before, rollout.logprobs, 0.0),
        finished=stop.any(axis=1),
    )


def full_sequence(rollout: Rollout) -> dict[str, Array]:
    """Prompt and response as tokens, positions and segment_ids, each [B, P + T]."""
    mask = jnp.concatenate([rollout.prompt_mask, rollout.mask], axis=1)
    return {
        "tokens": jnp.concatenate([rollout.prompt, rollout.tokens], axis=1),
        "positions": positions_from_mask(mask),
        "segment_ids": mask.astype(jnp.int32),
    }


def run_networks(
    models: Models,
    params: Params,
    ref: Params,
    reward: Params,
    temperature: Array,
    rollout: Rollout,
    *,
    recompute: bool,
) -> dict[str, Array]:
    """ref_logprobs, old_logprobs and values, each [B, T], and with a reward model score [B], of a rollout."""
    sequence, num = full_sequence(rollout), rollout.tokens.shape[1]
    ref_hidden = before_tokens(models.policy.apply(ref, **sequence), num)
    ref_logprobs, _ = models.policy.logprobs(ref, ref_hidden, rollout.tokens, temperature)
    if recompute:
        logprobs, _, values = forward(models, params, sequence, temperature, num)
    else:
        logprobs, values = rollout.logprobs, values_of(models, params, sequence, num)
    out = {"ref_logprobs": ref_logprobs, "old_logprobs": logprobs, "values": values}
    if models.reward is not None:
        # The last real token of [prompt; response]: prompts are left-padded, so it is at P + length - 1.
        last = rollout.prompt.shape[1] + rollout.mask.sum(axis=1, dtype=jnp.int32) - 1
        hidden = models.reward.apply(reward, **sequence)
        at_last = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
        out["score"] = models.reward.scores(reward["score"], at_last)[:, 0]
    return out


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


def make_score(models: Models, config: PPOConfig, *, recompute: bool, model_weight: float = 1.0) -> Callable[..., Any]:
    """The scoring program, not yet compiled.

    score(params, ref_params, reward_params, rollout, host_scores f32[B], kl_coef, temperature)
        -> (Experience, kl_coef of the next iteration, metrics, {"reward", "kl"} per row)
    """

    def score(
        params: Params, ref: Params, reward: Params, rollout: Rollout, host: Array, kl_coef: Array, temperature: Array
    ) -> tuple[Experience, Array, Metrics, dict[str, Array]]:
        per_row = partial(run_networks, models, params, ref, reward, temperature, recompute=recompute)
        nets = map_microbatches(per_row, rollout, config.score_microbatch)
        raw = model_weight * nets["score"] + host if models.reward is not None else host
        mask = rollout.mask
        old_logprobs, ref_logprobs = (jnp.where(mask, nets[n], 0.0) for n in ("old_logprobs", "ref_logprobs"))
        k1, k3 = adv.kl_k1(old_logprobs, ref_logprobs), adv.kl_k3(old_logprobs, ref_logprobs)
        scores = adv.missing_eos_penalty(
            raw, rollout.finished, missing_eos=config.missing_eos, missing_eos_value=config.missing_eos_value
        )
        slots, value_mask = score_slots(mask, config.score_at)
        rewards = adv.shaped_rewards(scores, k1 if config.kl_estimator == "k1" else k3, slots, kl_coef)
        if config.whiten_rewards:
            rewards = adv.whiten(rewards, value_mask, shift_mean=False, variance=config.whiten_variance)
        values = jnp.where(value_mask, nets["values"], 0.0)
        advantages = adv.gae(rewards, values, discount=config.discount, gae_lambda=config.gae_lambda)
        returns = advantages + values
        if config.whiten_advantages:
            advantages = adv.whiten(advantages, mask, shift_mean=True, variance=config.whiten_variance)
        experience = Experience(
            **full_sequence(rollout),
            mask=mask,
            value_mask=value_mask,
            old_logprobs=old_logprobs,
            old_values=values,
            advantages=jnp.where(mask, advantages, 0.0),
            returns=jnp.where(value_mask, returns, 0.0),
        )
        kl = k1.sum(axis=1)
        metrics = {
            "rollout/reward": raw.mean(),
            "rollout/reward_std": raw.std(),
            "rollout/kl": kl.mean(),
            "rollout/kl_k3": k3.sum(axis=1).mean(),
            "rollout/objective": (scores - kl_coef * kl).mean(),
            "ppo/kl_coef": kl_coef,
            **experience_metrics(experience, rollout),
        }
        if config.kl_controller == "adaptive":
            kl_coef = adv.adaptive_kl_coef(
                kl_coef, kl.mean(), mask.shape[0], kl_target=config.kl_target, kl_horizon=config.kl_horizon
            )
        return experience, kl_coef, metrics, {"reward": raw, "kl": kl}

    return score


def experience_metrics(x: Experience, rollout: Rollout) -> Metrics:
    """How the rows ended, how far the sampler's log-probs are from the ones used, and how good the critic is."""
    finished = rollout.finished.mean()
    gap = jnp.abs(x.old_logprobs - rollout.logprobs)
    return {
        "rollout/eos_fraction": finished,
        "rollout/truncated_fraction": 1.0 - finished,
        "rollout/response_length": x.mask.sum(axis=1).mean(dtype=jnp.float32),
        "rollout/logprob_gap_max": gap.max(where=x.mask, initial=0.0),
        "value/mean": jnp.sum(x.old_values * token_weights(x.value_mask, "token")),
        "value/explained_variance": adv.explained_variance(x.old_values, x.returns, x.value_mask),
    }


def make_ppo_update(step: Step, config: PPOConfig) -> Callable[..., Any]:
    """The update program, not yet compiled: update(state, experience, key, temperature, ptx) -> (state, metrics).

    `step` is `step.make_update` of the objective. Every epoch goes over the rows in a fresh order; the metrics are
    means over the optimiser steps, and policy/first_* are those of the first step, whose ratio should be 1. `ptx` is
    None or a batch of `collate_sft` with a leading axis of epochs * minibatches.
    """
    num = config.epochs * config.minibatches

    def minibatch(experience: Experience, rows: Array, temperature: Array, ptx: Any) -> dict[str, Any]:
        x = jax.tree.map(lambda leaf: constrain(leaf[rows], *ROWS), experience)
        batch = {
            "experience": x,
            "weights": token_weights(x.mask, config.loss_reduction),
            "value_weights": token_weights(x.value_mask, config.loss_reduction),
            "temperature": jnp.broadcast_to(temperature, rows.shape),
        }
        return batch if ptx is None else {**batch, "ptx": ptx}

    def update(
        state: TrainState, experience: Experience, key: Array, temperature: Array, ptx: Any = None
    ) -> tuple[TrainState, Metrics]:
        num_rows = experience.mask.shape[0]
        keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(config.epochs))
        orders = jax.vmap(lambda k: jax.random.permutation(k, num_rows))(keys).reshape(num, -1)

        def take(state: TrainState, xs: Any) -> tuple[TrainState, Metrics]:
            rows, number, ptx = xs
            batch = minibatch(experience, rows, temperature, ptx)
            return step(state, batch, jax.random.fold_in(key, config.epochs + number))

        def maybe_take(carry: tuple[TrainState, Array], xs: Any) -> tuple[Any, tuple[Metrics, Array]]:
            state, stopped = carry
            shapes = jax.eval_shape(take, state, xs)[1]
            if "policy/approx_kl" not in shapes:
                raise UserError("ppo.target_kl needs the metric policy/approx_kl; let the policy loss return it")

            def skip(state: TrainState, xs: Any) -> tuple[TrainState, Metrics]:
                return state, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

            new, metrics = jax.lax.cond(stopped, skip, take, state, xs)
            measured = ~stopped
            # approx KL is that of the policy before this step: where it is too large the step is not taken.
            stopped = stopped | (metrics["policy/approx_kl"] > config.target_kl)
            state = jax.tree.map(lambda n, o: jnp.where(stopped, o, n), new, state)
            return (state, stopped), ({**metrics, "policy/epochs_taken": ~stopped / config.minibatches}, measured)

        xs = (orders, jnp.arange(num), ptx)
        start = state.step
        if config.target_kl:
            (state, _), (metrics, measured) = jax.lax.scan(maybe_take, (state, jnp.zeros((), bool)), xs)
        else:
            (state, metrics), measured = jax.lax.scan(take, state, xs), jnp.ones(num, bool)
        state = TrainState(start + num, state.params, state.opt_state)  # skipped steps count: the schedule goes on
        return state, summarise(metrics, measured)

    return update


def summarise(metrics: Metrics, measured: Bool[Array, " N"]) -> Metrics:
    """Metrics [N] of an update's steps: means, maxima of *_max, sums of counts, and the first step's invariants.

    Steps off `measured` did not happen.
    """
    out = {}
    for name, values in metrics.items():
        if name.endswith("_max"):
            out[name] = values.max(where=measured, initial=-jnp.inf)
        elif name in ("optim/skipped", "policy/epochs_taken"):
            out[name] = values.sum()
        else:
            out[name] = values.mean(where=measured)
    for name in ("ratio_max", "approx_kl", "clip_fraction"):
        if f"policy/{name}" in metrics:
            out[f"policy/first_{name}"] = metrics[f"policy/{name}"][0]
    return out


def make_ppo_optimizer(run: PPORun) -> tuple[optax.GradientTransformationExtraArgs, Schedule]:
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

    def labels(params: Params) -> Any:
        return {name: jax.tree.map(lambda _, name=name: name, tree) for name, tree in params.items()}

    return optax.partition(parts, labels), policy_schedule


def make_ppo_step(
    models: Models, run: PPORun, policy_loss: PolicyLoss | None = None
) -> tuple[Callable[..., Any], Any, Schedule]:
    """(update program, optimiser, policy learning rate by iteration) of a config."""
    tx, schedule = make_ppo_optimizer(run)
    step = make_update(objective(models, run.ppo, policy_loss), tx, run.ppo.accumulate)
    return make_ppo_update(step, run.ppo), tx, schedule


def ema(average: Params, params: Params, decay: float) -> Params:
    """decay * average + (1 - decay) * params (InstructGPT keeps one with decay 0.992)."""
    return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
