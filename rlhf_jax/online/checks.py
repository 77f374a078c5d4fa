"""Settings of a method that contradict each other, or the mesh. `group` is the method's group of the config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rlhf_jax.config import OnlineArgs, OnlineConfig, SamplingConfig, bind
from rlhf_jax.config.checks import COLDEST
from rlhf_jax.errors import UserError
from rlhf_jax.online.law import hidden_filter
from rlhf_jax.sharding import Mesh, check_rows
from rlhf_jax.training.sums import check_sum


def check(config: OnlineArgs, settings: OnlineConfig, group: str) -> None:
    """Raise a UserError for settings that contradict each other."""
    sampling, size = config.sampling, config.data.batch_size
    trained = settings.train_temperature or sampling.temperature
    for name, value in (("sampling.temperature", sampling.temperature), (f"{group}.train_temperature", trained)):
        if value < COLDEST:
            raise UserError(
                f"{name} {value}: {group.upper()} learns from log-probs of random samples; make it at least {COLDEST}"
            )
    check_law(config, settings, group)
    if sampling.min_new_tokens and settings.stop == "truncate":
        raise UserError(
            f"sampling.min_new_tokens does nothing with {group}.stop truncate; set {group}.truncate_after instead"
        )
    if settings.truncate_after and settings.stop == "eos":
        raise UserError(
            f"{group}.truncate_after does nothing with {group}.stop eos; set {group}.stop truncate, or it to 0"
        )
    check_cut(sampling, settings, group)
    steps = settings.minibatches * settings.accumulate
    if size % steps:
        raise UserError(
            f"data.batch_size {size} is not divisible by {group}.minibatches * {group}.accumulate = {steps}; "
            "change one of them"
        )
    microbatches = {
        "sampling.microbatch": sampling.microbatch,
        f"{group}.score_microbatch": settings.score_microbatch,
    }
    for name, rows in microbatches.items():
        if rows and size % rows:
            raise UserError(f"data.batch_size {size} is not a multiple of {name} {rows}; choose a divisor, or 0")
    if settings.overlong_tokens > sampling.max_new_tokens:
        raise UserError(
            f"{group}.overlong_tokens {settings.overlong_tokens} is more than sampling.max_new_tokens "
            f"{sampling.max_new_tokens}; lower it"
        )
    if settings.reward_standardize != "off" and not config.reward.paths:
        raise UserError(f"{group}.reward_standardize is of reward models, and there is none; set it to off")
    held = getattr(settings, "reward_to_go", False) and getattr(settings, "discount", 1.0) == 0
    if config.reward.teacher_divergence != "reverse_kl" and not held:
        raise UserError(
            f"reward.teacher_divergence {config.reward.teacher_divergence} is lessened token by token, which "
            f"{group} does not do as it is set; take `rlhf-jax distill` with distill.discount 0, or reverse_kl"
        )
    if settings.missing_eos == "subtract" and settings.missing_eos_value < 0:
        value = settings.missing_eos_value
        raise UserError(f"{group}.missing_eos_value {value}, subtracted, is a reward; make it positive")


def check_cut(sampling: SamplingConfig, settings: OnlineConfig, group: str) -> None:
    """Raise a UserError for what does not go with rows that go on in the next iteration."""
    buckets = sampling.prompt_buckets
    others = {
        f"{group}.stop truncate, of rows of one length": settings.stop == "truncate",
        f"sampling.prompt_buckets {buckets}, since rows of several iterations have one shape": len(buckets) > 1,
        f"{group}.replay_routing, since earlier tokens are read again": settings.replay_routing,
        f"{group}.redraws {getattr(settings, 'redraws', 0)}, of whole groups": getattr(settings, "redraws", 0) > 0,
    }
    for what, there in others.items():
        if sampling.cut and there:
            raise UserError(f"sampling.budget {sampling.budget} does not go with {what}; leave one of them out")


def check_law(config: OnlineArgs, settings: OnlineConfig, group: str) -> None:
    """Raise a UserError where log-probs of two laws would be compared, or weighted in vain."""
    hidden, weighted = hidden_filter(config.sampling), settings.importance in ("token", "sequence")
    if settings.old_logprobs == "sampler":
        if hidden:
            raise UserError(
                f"{group}.old_logprobs sampler with sampling.{hidden} would compare a filtered law with an unfiltered "
                f"one; set {group}.old_logprobs to recompute, or sampling.top_k, whose ids are carried along"
            )
        if settings.train_temperature not in (0, config.sampling.temperature):
            raise UserError(
                f"{group}.train_temperature {settings.train_temperature:g} is not that of {group}.old_logprobs "
                f"sampler, {config.sampling.temperature:g}; set {group}.old_logprobs to recompute"
            )
        if weighted:
            raise UserError(
                f"{group}.importance {settings.importance} does nothing with {group}.old_logprobs sampler, whose law "
                f"is then the trained one; set {group}.old_logprobs to recompute"
            )
    if weighted and hidden:
        raise UserError(
            f"{group}.importance {settings.importance} cannot bring back what sampling.{hidden} left out; set "
            f"sampling.top_k, whose ids are carried along, or {group}.importance off"
        )


def check_batches(config: OnlineArgs, settings: OnlineConfig, group: str, mesh: Mesh) -> None:
    """Raise a UserError unless every batch and microbatch divides over the mesh."""
    size, steps = config.data.batch_size, settings.minibatches * settings.accumulate
    check_rows(mesh, size, "data.batch_size")
    check_rows(mesh, size // steps, f"data.batch_size / ({group}.minibatches * {group}.accumulate) =")
    check_rows(mesh, config.sampling.microbatch, "sampling.microbatch")
    check_rows(mesh, settings.score_microbatch, f"{group}.score_microbatch")


def check_unanswered(advantage: Callable[..., Any], group_size: int, name: str) -> None:
    """Raise a UserError unless advantages of scores are numbers where a judge said nothing of another one (NaN)."""
    scores = np.arange(2 * group_size, dtype=np.float32)
    scores[0] = np.nan
    found = np.asarray(advantage(scores))
    if not np.isfinite(found[1:]).all():
        raise UserError(
            f"{name} makes {found.tolist()} of {scores.tolist()}; reward.judge may say nothing of a response, whose "
            "score is then NaN: leave it out of what the others are compared with, as jnp.nanmean does"
        )


def check_losses(settings: OnlineConfig, group: str, **losses: str | Callable[..., Any]) -> None:
    """Raise a UserError unless losses, by their names in the config, are sums over rows where rows come in parts."""
    if settings.microbatch_tokens or settings.accumulate > 1:
        for name, loss in losses.items():
            cure = f"set {group}.microbatch_tokens 0 and {group}.accumulate 1"
            check_sum(bind(loss, settings), f"{group}.{name}", cure)
