"""What the methods that learn from their own samples have in common: PPO, GRPO, RLOO."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from rlhf_jax.config.checks import SECONDS, check, fits
from rlhf_jax.config.judge import RewardJudgeConfig
from rlhf_jax.config.parts import OptimConfig
from rlhf_jax.config.settings import PathText, settings
from rlhf_jax.errors import UserError, shown


@settings
class RewardSourceConfig:
    """What PPO maximises: weight * reward model + sum of weights * Python functions + weight * judge +
    coef * teacher.

    Args:
        model: directory of a reward model, as `rlhf-jax reward` writes it; empty means none. One with several heads
            (reward.members of that stage) is an ensemble.
        models: directories of several reward models instead, an ensemble.
        combine: what an ensemble says: the mean of its members, the least of their scores (min), or mean -
            combine_coef * their standard deviation (lower_bound; Coste et al. 2023, arXiv 2310.02743).
        combine_coef: standard deviations that lower_bound takes off.
        model_weight: factor of the model's or the ensemble's score.
        functions: Python functions fn(prompts, responses, **columns) -> list of floats, as "module:name".
        function_weights: a factor for each function; empty means 1 for all.
        judge: our own model, an endpoint or, of pairs, a Python function whose opinion of responses is paid.
        teacher: directory of a language model with the policy's tokenizer, which pays each token of a response what it
            finds it likelier, log p_teacher - log p: minus the reverse KL to it (Agarwal et al. 2023, arXiv
            2306.13649).
        teacher_coef: price of one such nat.
        teacher_divergence: what that lessens: the reverse KL, KL(p, p_teacher); the forward one, KL(p_teacher, p); or
            jsd, the Jensen-Shannon divergence of teacher_beta. The latter two with distill.discount 0 alone.
        teacher_beta: weight of the teacher in the mixture from which jsd measures both.
        gold: a function of the same form that is only logged, as rollout/gold; training never sees it.
        timeout: seconds after which a call of a function has failed; 0 waits for ever and calls it in the main thread.
        retries: further calls after one that raised or ran out of time.
        on_failure: when these fail too, stop the run (saved first) or skip the batch, counted in rollout/skipped.
    """

    model: PathText = ""
    models: list[PathText] = field(default_factory=list)
    combine: Literal["mean", "min", "lower_bound"] = "mean"
    combine_coef: float = 1.0
    model_weight: float = 1.0
    functions: list[str] = field(default_factory=list)
    function_weights: list[float] = field(default_factory=list)
    judge: RewardJudgeConfig = RewardJudgeConfig()
    teacher: PathText = ""
    teacher_coef: float = 1.0
    teacher_divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    teacher_beta: float = 0.5
    gold: str = ""
    timeout: float = 600.0
    retries: int = 2
    on_failure: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        check(self, "reward.", {"finite and not 0": "model_weight", "at least 0": "retries combine_coef"})
        check(self, "reward.", {"above 0": "teacher_coef", "above 0 and below 1": "teacher_beta", SECONDS: "timeout"})
        check_paths("reward.", self.model, self.models)
        if self.model_weight < 0 and self.combine != "mean":
            raise UserError(
                f"reward.model_weight {self.model_weight:g} makes the least score of an ensemble the largest; set "
                "reward.combine mean"
            )
        if any(not (weight and fits(weight)) for weight in self.function_weights):
            raise UserError(
                f"reward.function_weights {shown(self.function_weights)} are not all finite and other than 0; leave "
                "out a function that should not count, or make it reward.gold"
            )
        if any(not name.strip() for name in self.functions):
            raise UserError(f"reward.functions {shown(self.functions)} has an empty text; name module:function")

    @property
    def paths(self) -> list[str]:
        """The directories of the reward models."""
        return [self.model] if self.model else self.models

    def named(self) -> bool:
        """Whether anything is to score."""
        return bool(self.paths or self.functions or self.judge.named())


def check_paths(group: str, model: str, models: list[str]) -> None:
    """Raise a UserError for a reward model and a list of them, or one that is empty or named twice."""
    if model and models:
        raise UserError(f"{group}model and {group}models are both given; name one reward model, or a list")
    if any(not path.strip() for path in models) or len(set(models)) < len(models):
        raise UserError(f"{group}models {shown(models)} are not different directories; name each member once")


PPO_OPTIM = OptimConfig(schedule="linear", eps=1e-5)


@settings
class OnlineConfig:
    """Rounds of rollout, score and update.

    Args:
        iterations: rollout-score-update rounds.
        epochs: passes over a rollout, each in a fresh order.
        minibatches: optimiser steps of one pass.
        microbatch_tokens: tokens of a microbatch on each device: rows lie side by side in sequences, and a step costs
            what its tokens cost; groups stand behind one copy of their prompt as far as it holds them. At least one
            sequence of the longest row; 0 gives every row a sequence of its own.
        accumulate: a microbatch of an optimiser step holds at most the minibatch / accumulate full rows.
        score_microbatch: a microbatch of scoring holds at most so many full rows; 0 sets no bound.
        stop: eos ends a row at a stop id; truncate samples the full length and cuts at the first stop id at or after
            `truncate_after` (Ziegler et al. 2019).
        truncate_after: tokens before which `stop: truncate` ignores stop ids.
        missing_eos: rows that never stopped: off, replace their score by `missing_eos_value`, or subtract it.
        missing_eos_value: the constant of `missing_eos`.
        reward_standardize: the first policy's own responses to the held-out prompts set the zero (mean), or zero and
            unit (mean_std), of the reward model's score, of each member's before an ensemble is combined.
        reward_clip: rewards beyond +- this count as that; 0 is off.
        overlong_tokens: the last so many tokens before sampling.max_new_tokens in which a response loses reward, from
            nothing to overlong_coef at its end (DAPO's soft overlong punishment); 0 is off.
        overlong_coef: what a response of sampling.max_new_tokens loses.
        kl_budget: nats per response; an evaluation whose KL is above ends the run and is not the best. 0 is off.
        disagreement_budget: an evaluation ends the run and is not the best where the members of the reward ensemble
            disagree by more than this times what they did before training; 0 is off.
        kl_coef: (initial) price of one nat.
        clip_ratio: epsilon of the policy's clip.
        clip_ratio_high: another epsilon above 1 (DAPO takes 0.28); 0 takes clip_ratio.
        dual_clip: lower bound c * A for negative advantages (arXiv 1912.09729); 0 is off.
        max_log_ratio: the log-ratio is clamped to +- this before exp.
        entropy_coef: weight of the entropy bonus.
        loss_reduction: token, sequence, or fixed (every token weighs 1/(B T), whatever the lengths).
        old_logprobs: from the sampler, recomputed by a forward pass, or auto: the sampler's where they are of the same
            law, in float32; else recomputed.
        train_temperature: log-probs, old, new and of the reference, are of softmax(logits / this); 0 takes the
            sampler's.
        importance: advantages are multiplied by the probability of what was drawn under the trained law over that
            under the sampler's: of each token (token), or of the whole response (sequence), which is unbiased. auto:
            sequence where old log-probs are recomputed and the laws differ (bfloat16, another temperature), else off.
        importance_cap: the largest such weight; 0 is none.
        importance_beyond: what is above becomes 0 (mask) or the cap (clip).
        replay_routing: response tokens go to the experts that they had when they were sampled, in scoring and updates
            (routing replay, arXiv 2510.11370); for models with experts.
        target_kl: no more updates in this iteration once approx KL exceeds it; 0 is off.
        ema_decay: decay per iteration of an averaged policy, which is then evaluated and saved; 0 is off.
        policy_loss: a function (logprobs, old_logprobs, advantages, weights) -> (scalar, metrics), as "module:name".
        num_samples: rows of each logged sample table.
        sample_every: iterations between sample tables.
    """

    iterations: int = 100
    epochs: int = 4
    minibatches: int = 1
    microbatch_tokens: int = 1024
    accumulate: int = 1
    score_microbatch: int = 0
    stop: Literal["eos", "truncate"] = "eos"
    truncate_after: int = 0
    missing_eos: Literal["off", "replace", "subtract"] = "off"
    missing_eos_value: float = -1.0
    reward_standardize: Literal["off", "mean", "mean_std"] = "off"
    reward_clip: float = 0.0
    overlong_tokens: int = 0
    overlong_coef: float = 1.0
    kl_budget: float = 0.0
    disagreement_budget: float = 0.0
    kl_coef: float = 0.05
    clip_ratio: float = 0.2
    clip_ratio_high: float = 0.0
    dual_clip: float = 0.0
    max_log_ratio: float = 20.0
    entropy_coef: float = 0.0
    loss_reduction: Literal["token", "sequence", "fixed"] = "token"
    old_logprobs: Literal["auto", "sampler", "recompute"] = "auto"
    train_temperature: float = 0.0
    importance: Literal["auto", "off", "token", "sequence"] = "auto"
    importance_cap: float = 3.0
    importance_beyond: Literal["mask", "clip"] = "mask"
    replay_routing: bool = False
    target_kl: float = 0.0
    ema_decay: float = 0.0
    policy_loss: str = "rlhf_jax.losses:clipped_policy_loss"
    num_samples: int = 4
    sample_every: int = 10

    def check_rounds(self, group: str) -> None:
        """Raise a UserError unless these settings are in range; `group` is their dotted prefix."""
        rules = {
            "at least 1": "iterations epochs minibatches accumulate sample_every",
            "at least 0": "microbatch_tokens score_microbatch truncate_after kl_coef entropy_coef train_temperature "
            "target_kl num_samples importance_cap reward_clip overlong_tokens kl_budget",
            "above 0": "max_log_ratio overlong_coef",
            "at least 0.000001": "clip_ratio",
            "0, or at least 0.000001": "clip_ratio_high",
            "at least 0 and at most 0.9999999": "ema_decay",
            "0, or at least 1.000001": "dual_clip disagreement_budget",
            "finite": "missing_eos_value",
        }
        check(self, group, rules)

    def check_truncation(self, group: str, max_new_tokens: int) -> None:
        """Raise a UserError if no row would ever stop."""
        if self.stop == "truncate" and self.truncate_after >= max_new_tokens:
            raise UserError(
                f"{group}.truncate_after {self.truncate_after} is not below sampling.max_new_tokens {max_new_tokens}, "
                "so no row would ever stop; lower it"
            )
