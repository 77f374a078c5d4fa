"""Settings of PPO that contradict each other, or the mesh."""

from __future__ import annotations

from jax.sharding import Mesh

from rlhf_jax.config import PPORun, SamplingConfig
from rlhf_jax.errors import UserError
from rlhf_jax.sharding import check_rows


def filters(sampling: SamplingConfig) -> bool:
    """Whether tokens are drawn from another law than softmax(logits / temperature)."""
    return sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_new_tokens > 0


def check(config: PPORun) -> None:
    """Raise a UserError for settings that contradict each other."""
    ppo, sampling, size = config.ppo, config.sampling, config.data.batch_size
    if sampling.temperature <= 0:
        raise UserError(f"sampling.temperature {sampling.temperature}: PPO learns from random samples; set it above 0")
    if filters(sampling) and ppo.old_logprobs == "sampler":
        raise UserError(
            "ppo.old_logprobs sampler with top_k, top_p or min_new_tokens would compare a filtered law with an "
            "unfiltered one; set ppo.old_logprobs to recompute, or sampling.top_k 0, top_p 1 and min_new_tokens 0"
        )
    if sampling.min_new_tokens and ppo.stop == "truncate":
        raise UserError("sampling.min_new_tokens does nothing with ppo.stop truncate; set ppo.truncate_after instead")
    if ppo.truncate_after and ppo.stop == "eos":
        raise UserError("ppo.truncate_after does nothing with ppo.stop eos; set ppo.stop truncate, or it to 0")
    if size % (ppo.minibatches * ppo.accumulate):
        raise UserError(
            f"data.batch_size {size} is not divisible by ppo.minibatches * ppo.accumulate = "
            f"{ppo.minibatches * ppo.accumulate}; change one of them"
        )
    for name, rows in (("sampling.microbatch", sampling.microbatch), ("ppo.score_microbatch", ppo.score_microbatch)):
        if rows and size % rows:
            raise UserError(f"data.batch_size {size} is not a multiple of {name} {rows}; choose a divisor, or 0")
    if ppo.kl_controller == "adaptive" and ppo.kl_target <= 0:
        raise UserError(f"ppo.kl_target {ppo.kl_target} must be positive; or set ppo.kl_controller fixed")
    if ppo.missing_eos == "subtract" and ppo.missing_eos_value < 0:
        raise UserError(f"ppo.missing_eos_value {ppo.missing_eos_value}, subtracted, is a reward; make it positive")
    if ppo.ptx_coef and not ppo.ptx_path:
        raise UserError(f"ppo.ptx_coef {ppo.ptx_coef} needs text; set ppo.ptx_path")
    if ppo.value_init == "reward_model" and (not config.reward.model or ppo.shared_trunk):
        raise UserError("ppo.value_init reward_model needs reward.model, and ppo.shared_trunk false")


def check_batches(config: PPORun, mesh: Mesh) -> None:
    """Raise a UserError unless every batch and microbatch divides over the mesh."""
    ppo, size = config.ppo, config.data.batch_size
    if ppo.ptx_coef and ppo.ptx_batch_size % ppo.accumulate:
        raise UserError(
            f"ppo.ptx_batch_size {ppo.ptx_batch_size} is not divisible by ppo.accumulate {ppo.accumulate}; "
            "change one of them"
        )
    steps = ppo.minibatches * ppo.accumulate
    check_rows(mesh, size, "data.batch_size")
    check_rows(mesh, size // steps, "data.batch_size / (ppo.minibatches * ppo.accumulate) =")
    check_rows(mesh, config.sampling.microbatch, "sampling.microbatch")
    check_rows(mesh, ppo.score_microbatch, "ppo.score_microbatch")
    if ppo.ptx_coef:
        check_rows(mesh, ppo.ptx_batch_size // ppo.accumulate, "ppo.ptx_batch_size / ppo.accumulate =")
