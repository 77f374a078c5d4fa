"""Pure functions of every method that learns from its own samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import advantages as adv
from rlhf_jax.config import OnlineConfig, bind
from rlhf_jax.losses import importance_weights
from rlhf_jax.models import Model
from rlhf_jax.models.experts import Routing, balanced
from rlhf_jax.tokens import Packed
from rlhf_jax.training.packing import Layout, Sharing, over_views, pack
from rlhf_jax.training.responses import response_scores
from rlhf_jax.training.state import Schedule, TrainState, in_float32
from rlhf_jax.types import Metrics, Params, PolicyLoss, Rollout

Scored = tuple[Any, Array, Metrics, dict[str, Array]]
"""What scoring returns: a method's experience, kl_coef of the next iteration, metrics, numbers per row by name."""

Score = Callable[..., Scored]
"""score(params, ref, reward, rollout, host rewards f32[B], kl_coef, temperature, teacher=None), not yet compiled.

ref, reward and teacher are None where there is none."""

Update = Callable[..., tuple[TrainState, Metrics]]
"""The program that `epochs.make_epochs` returns, not yet compiled."""

Training = tuple[Update, optax.GradientTransformationExtraArgs, Schedule]
"""The update program of a method, its optimiser, and the learning rate of the policy by iteration."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ScoredRows:
    """A scored rollout, as far as methods agree: int32, bool and float32. S = P + T.

    Attributes:
        tokens: prompt and response.
        segment_ids: 1 on real tokens, 0 on padding.
        mask: the response tokens that are trained on, the stop token included.
        kept: as in `Rollout`: log-probs are of these ids.
        experts: as in `Rollout`: response tokens go to these.
    """

    tokens: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    mask: Bool[Array, "B T"]
    old_logprobs: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    kept: Int[Array, "B T K"] | None = None
    experts: Int[Array, "B T L k"] | None = None


def of_rollout(rollout: Rollout, mask: Array, old_logprobs: Array, advantages: Array) -> dict[str, Any]:
    """The fields of `ScoredRows`."""
    scored = {"mask": mask, "old_logprobs": old_logprobs, "advantages": advantages}
    return {**full_sequence(rollout), **scored, "kept": rollout.kept, "experts": rollout.experts}


def response_logprobs(
    model: Model,
    params: Params,
    view: Packed,
    temperature: Array,
    num_tokens: int,
    kept: Int[Array, "B T K"] | None = None,
    experts: Int[Array, "B T L k"] | None = None,
    **kwargs: Any,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "M S D"], Routing | None]:
    """Log-probs and entropies of the response tokens of a view's rows, 0 elsewhere; and all hidden states and routing.

    They are of the law of the ids that the rows `kept` (`Rollout.kept`; None: of all). Response tokens go to the
    `experts` (`Rollout.experts`), if these are given.
    """
    hidden, routing = hidden_of(model, params, view, experts)
    if kept is not None:
        kwargs["kept"] = view.from_rows(kept)
    said = model.logprobs(params, hidden, view.targets, temperature, needed=view.predicts, **kwargs)
    logprobs, entropy = (view.to_rows(x, num_tokens) for x in said)
    return logprobs, entropy, hidden, routing


def hidden_of(
    model: Model, params: Params, view: Packed, experts: Int[Array, "B T L k"] | None = None
) -> tuple[Float[Array, "M S D"], Routing | None]:
    """Hidden states of a view, and what the routers did; response tokens go to the `experts` of the rows, if given."""
    given = {} if experts is None else {"experts": view.of_tokens(experts)}
    return model.forward(params, **view.inputs, **given)


def full_sequence(rollout: Rollout) -> dict[str, Array]:
    """Prompt and response of every row side by side: tokens and segment_ids (1 on tokens), int32[B, S]; S = P + T."""
    mask = jnp.concatenate([rollout.prompt_mask, rollout.mask], axis=1)
    tokens = jnp.concatenate([rollout.prompt, rollout.tokens], axis=1)
    return {"tokens": tokens, "segment_ids": mask.astype(jnp.int32)}


def packed(
    x: Any,
    config: OnlineConfig | None = None,
    *,
    most: int = 0,
    wanted: Bool[Array, " B"] | None = None,
    sharing: Sharing | None = None,
) -> Packed:
    """The rows of an experience or a rollout in microbatches of a config, of at most `most` sequences (0: any number).

    Without a config every row has a sequence of its own. Rows that are not `wanted` are left out.
    """
    if isinstance(x, Rollout):
        num_tokens, whole = x.tokens.shape[1], full_sequence(x)
    else:
        num_tokens, whole = x.mask.shape[1], {"tokens": x.tokens, "segment_ids": x.segment_ids}
    size = 0 if config is None else config.microbatch_tokens
    rows, length = whole["tokens"].shape
    layout = Layout.of(rows, length - num_tokens, num_tokens, tokens=size, most=most, sharing=sharing)
    return pack(whole["tokens"], whole["segment_ids"] > 0, num_tokens, layout, wanted)


def of_view(view: Packed, weights: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """The weights of the rows of a view, 0 elsewhere: losses of the views add up to that of the batch."""
    return jnp.where(view.rows[:, None], weights, 0.0)


def summed(
    rollout: Rollout,
    config: OnlineConfig,
    networks: Callable[[Packed], dict[str, Array]],
    sharing: Sharing | None = None,
) -> dict[str, Array]:
    """What networks say of the rows of a rollout, [B, ...] each, microbatch by microbatch."""
    views = packed(rollout, config, most=config.score_microbatch, sharing=sharing)
    return over_views(views, lambda view, _: networks(view))


def truncated(rollout: Rollout, stop_ids: tuple[int, ...], truncate_after: int) -> Rollout:
    """A full-length rollout cut after the first stop id at index >= truncate_after (Ziegler et al. 2019, appendix)."""
    index = jnp.arange(rollout.tokens.shape[1])[None, :]
    stop = jnp.isin(rollout.tokens, jnp.asarray(stop_ids, jnp.int32)) & (index >= truncate_after) & rollout.mask
    before = rollout.mask & (jnp.cumsum(stop, axis=1) - stop == 0)  # true up to and including the first stop
    return dataclasses.replace(
        rollout,
        tokens=jnp.where(before, rollout.tokens, 0),
        mask=before,
        logprobs=jnp.where(before, rollout.logprobs, 0.0),
        finished=stop.any(axis=1),
    )


def rewards_of(
    nets: Mapping[str, Array],
    old_logprobs: Float[Array, "B T"],
    host: Float[Array, " B"],
    rollout: Rollout,
    config: OnlineConfig,
    *,
    teacher_coef: float = 1.0,
    teacher_divergence: str = "reverse_kl",
    teacher_beta: float = 0.5,
    model_weight: float = 1.0,
    combine: str = "mean",
    combine_coef: float = 1.0,
) -> tuple[Float[Array, " B"], Float[Array, " B"], Float[Array, "B T"], Metrics, dict[str, Array]]:
    """(reward, what is paid for the whole, dense reward, metrics, numbers per row) of what networks and the host say.

    The reward is weight * score + host - how far a response is from a teacher (`taught`). Of `nets` it takes "score",
    a reward model's [B] or an ensemble's [B, M], and "teacher_logprobs" [B, T], if they are there. Where host is NaN,
    no answer of a judge, so are reward and what is paid for the whole. That is the reward without the dense one,
    clipped if asked, less the penalties of a missing end and of being too long. Rows have the reward as "reward", and
    the scores of an ensemble as "members" [B, M]; those of a single model too, [B, 1], if the first ones are to set
    its scale.
    """
    # The reward [B], and how far the members of an ensemble are apart about it: the mean of their standard deviation.
    rows, metrics, reward, answered = {}, dict[str, Array](), host, ~jnp.isnan(host)
    if (score := nets.get("score")) is not None:
        several = score.ndim == 2
        said = adv.combined(score, combine=combine, combine_coef=combine_coef) if several else score
        reward = model_weight * said + host
        if several:
            metrics["rollout/reward_disagreement"] = adv.disagreement(score).mean()
        if several or config.reward_standardize != "off":
            rows["members"] = score.reshape(len(host), -1)

    # What is paid [B].
    paid = reward
    if config.reward_clip:
        paid = jnp.clip(reward, -config.reward_clip, config.reward_clip)
        metrics["rollout/clipped_fraction"] = jnp.mean(paid != reward, dtype=jnp.float32, where=answered)
    paid = jnp.where(answered, bind(adv.missing_eos_penalty, config)(paid, rollout.finished), jnp.nan)
    if config.overlong_tokens:
        penalty = bind(adv.overlong_penalty, config)(rollout.mask.sum(axis=1), rollout.mask.shape[1])
        paid, metrics["rollout/overlong_penalty"] = paid + penalty, penalty.mean()

    # What is paid for each token [B, T].
    far = partial(adv.divergence, teacher_divergence=teacher_divergence, teacher_beta=teacher_beta)
    dense, apart, of_teacher = taught(nets, old_logprobs, rollout.mask, teacher_coef, far)
    rows["reward"] = reward - apart.sum(axis=1)
    return rows["reward"], paid, dense, {**metrics, **of_teacher}, rows


def taught(
    nets: Mapping[str, Array],
    old_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    teacher_coef: float,
    divergence: Callable[[Array], tuple[Array, Array]],
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Metrics]:
    """(what a teacher pays each token, how far the policy is from it, metrics): coef * `advantages.divergence`.

    Of `nets` it takes teacher_logprobs [B, T]; without them nothing is paid. In the mean over the policy's responses
    the second, summed over a response, is coef times the divergence. The metrics are of the reverse KL, in nats.
    """
    if "teacher_logprobs" not in nets:
        nothing = jnp.zeros_like(old_logprobs)
        return nothing, nothing, {}
    teacher_logprobs = jnp.where(mask, nets["teacher_logprobs"], 0.0)
    k1, k3 = adv.kl_k1(old_logprobs, teacher_logprobs), adv.kl_k3(old_logprobs, teacher_logprobs)
    metrics = {"rollout/teacher_kl": k1.sum(axis=1).mean(), "rollout/teacher_kl_k3": k3.sum(axis=1).mean()}
    paid, apart = divergence(-k1)
    return teacher_coef * paid, teacher_coef * apart, metrics


def rollout_metrics(
    rollout: Rollout,
    old_logprobs: Float[Array, "B T"],
    rewards: Float[Array, " B"],
    objective: Float[Array, " B"],
    answered: Bool[Array, " B"],
) -> Metrics:
    """The rewards of answered rows, and what they are paid less the price of the KL; how all rows ended, and how far
    the sampler's log-probs are from the ones used.
    """
    finished = rollout.finished.mean()
    real = rollout.mask.sum() + rollout.prompt_mask.sum()
    gap = jnp.where(rollout.mask, jnp.abs(old_logprobs - rollout.logprobs), 0.0)
    return {
        "rollout/reward": rewards.mean(where=answered),
        "rollout/reward_std": rewards.std(where=answered),
        "rollout/objective": objective.mean(where=answered),
        "rollout/eos_fraction": finished,
        "rollout/truncated_fraction": 1.0 - finished,
        "rollout/response_length": rollout.mask.sum(axis=1).mean(dtype=jnp.float32),
        "data/filled": real / (rollout.mask.size + rollout.prompt_mask.size),
        "rollout/logprob_gap": gap.sum() / jnp.maximum(rollout.mask.sum(), 1),
        "rollout/logprob_gap_max": gap.max(),
    }


def corrected(
    advantages: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    rollout: Rollout,
    config: OnlineConfig,
    importance: str,
) -> tuple[Float[Array, "B T"], Metrics]:
    """Advantages weighted by the trained law over the sampler's, and metrics; as they are with importance off.

    Weights in the advantages reach the policy's loss alone, which is w times itself where A is w times as large:
    the critic's returns, the KL, the entropy and every metric keep theirs.
    """
    if importance == "off":
        return advantages, {}
    weigh = bind(partial(importance_weights, importance=importance), config)
    weights, metrics = weigh(old_logprobs, rollout.logprobs, rollout.mask)
    return weights * advantages, metrics


def token_means(metrics: Metrics, weights: Float[Array, "B T"], config: OnlineConfig) -> Metrics:
    """What a loss says of its tokens as means over them, though weights need not sum to 1 (loss_reduction: fixed).

    Maxima and losses, which are what is minimised, stay. `weights` are the whole minibatch's.
    """
    if config.loss_reduction != "fixed":
        return metrics
    share = jnp.maximum(weights.sum(), jnp.finfo(weights.dtype).tiny)
    return {name: x if name.endswith(("_max", "/loss")) else x / share for name, x in metrics.items()}


def policy_objective(
    model: Model,
    config: OnlineConfig,
    policy_loss: PolicyLoss,
    further: Callable[[Params, Any, Array, Array, Array], tuple[Array, Metrics]],
) -> Callable[[Params, Any], tuple[Array, Metrics]]:
    """The loss of a view of a minibatch, {"experience", "packed", "weights", "temperature"}: policy + more - entropy.

    further(params, batch, log-probs, weights of the view, hidden states) -> (what is added, its metrics). Views of one
    minibatch add up.
    """

    def loss_fn(params: Params, batch: Any) -> tuple[Array, Metrics]:
        x, view = batch["experience"], batch["packed"]
        law = batch["temperature"], x.mask.shape[1], x.kept, x.experts
        logprobs, entropy, hidden, routing = response_logprobs(model, params["policy"], view, *law, with_entropy=True)
        weights = of_view(view, batch["weights"])
        # Off the mask and the view the ratio is set to 1, so that no padding token can produce an infinity.
        logprobs = jnp.where(x.mask & view.rows[:, None], logprobs, x.old_logprobs)
        loss, metrics = policy_loss(logprobs, x.old_logprobs, x.advantages, weights)
        entropy = jnp.sum(weights * entropy)
        metrics = token_means({"policy/loss": loss, **metrics, "policy/entropy": entropy}, batch["weights"], config)
        more, said = further(params, batch, logprobs, weights, hidden)
        loss, metrics = loss + more, {**metrics, **said}
        if config.entropy_coef:  # 0 * entropy would still be differentiated, a whole pass over the logits
            loss = loss - config.entropy_coef * entropy
        return balanced(model.balance_coef, loss, metrics, routing, weights.sum())

    return loss_fn


def judged(
    models: Any, reward: Params | None, teacher: Params | None, view: Packed, law: tuple[Any, ...]
) -> dict[str, Array]:
    """What reward model and teacher say of a view's rows, if there are any: score [B], of an ensemble [B, M], and
    teacher_logprobs [B, T]; `law` is as for `response_logprobs`, of the policy.
    """
    out = {}
    if models.reward is not None:
        out["score"] = response_scores(models.reward, reward, view)
    if models.teacher is not None:
        out["teacher_logprobs"] = response_logprobs(models.teacher, teacher, view, *law[:3])[0]
    return out


def ema(average: Params, params: Params, decay: float) -> Params:
    """decay * average + (1 - decay) * params, in float32 (InstructGPT keeps one with decay 0.992)."""
    return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, in_float32(params))
