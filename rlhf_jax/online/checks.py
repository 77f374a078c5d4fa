"""Settings of a method that contradict each other, or the mesh. `group` is the method's group of the config."""

from __future__ import annotations

from rlhf_jax.config import OnlineArgs, OnlineConfig, SamplingConfig
from rlhf_jax.errors import UserError
from rlhf_jax.sharding import Mesh, check_rows


def filters(sampling: SamplingConfig) -> bool:
    """Whether tokens are drawn from another law than softmax(logits / temperature)."""
    return sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_new_tokens > 0


def check(config: OnlineArgs, settings: OnlineConfig, group: str) -> None:
    """Raise a UserError for settings that contradict each other."""
    sampling, size = config.sampling, config.data.batch_size
    if sampling.temperature <= 0:
        name = group.upper()
        raise UserError(
            f"sampling.temperature {sampling.temperature}: {name} learns from random samples; set it above 0"
        )
    if filters(sampling) and settings.old_logprobs == "sampler":
        raise UserError(
            f"{group}.old_logprobs sampler with top_k, top_p or min_new_tokens would compare a filtered law with an "
            f"unfiltered one; set {group}.old_logprobs to recompute, or sampling.top_k 0, top_p 1 and min_new_tokens 0"
        )
    if sampling.min_new_tokens and settings.stop == "truncate":
        raise UserError(
            f"sampling.min_new_tokens does nothing with {group}.stop truncate; set {group}.truncate_after instead"
        )
    if settings.truncate_after and settings.stop == "eos":
        raise UserError(
            f"{group}.truncate_after does nothing with {group}.stop eos; set {group}.stop truncate, or it to 0"
        )
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
    if settings.missing_eos == "subtract" and settings.missing_eos_value < 0:
        value = settings.missing_eos_value
        raise UserError(f"{group}.missing_eos_value {value}, subtracted, is a reward; make it positive")


def check_batches(config: OnlineArgs, settings: OnlineConfig, group: str, mesh: Mesh) -> None:
    """Raise a UserError unless every batch and microbatch divides over the mesh."""
    size, steps = config.data.batch_size, settings.minibatches * settings.accumulate
    check_rows(mesh, size, "data.batch_size")
    check_rows(mesh, size // steps, f"data.batch_size / ({group}.minibatches * {group}.accumulate) =")
    check_rows(mesh, config.sampling.microbatch, "sampling.microbatch")
    check_rows(mesh, settings.score_microbatch, f"{group}.score_microbatch")
