"""Settings of the methods that compare responses to one prompt with one another, without a critic."""

from __future__ import annotations

from typing import Literal

from rlhf_jax.config.adapters import LoRAConfig, check_frozen
from rlhf_jax.config.checks import check
from rlhf_jax.config.online import PPO_OPTIM, OnlineConfig, RewardSourceConfig
from rlhf_jax.config.parts import DataConfig, MeshConfig, ModelConfig, OptimConfig, RunConfig, SamplingConfig
from rlhf_jax.config.rates import settle
from rlhf_jax.config.saving import CheckpointConfig, FaultConfig
from rlhf_jax.config.settings import settings
from rlhf_jax.errors import UserError


@settings
class GroupConfig(OnlineConfig):
    """Policy gradients with a baseline from other responses to the same prompt; docs/algorithms.md has every formula.

    Args:
        epochs: passes over a rollout, each in a fresh order; 1 (with one minibatch) is on-policy.
        group_size: responses to each prompt; data.batch_size / group_size prompts make an iteration.
        advantage: a function (scores of all rows) -> their advantages, as "module:name".
        baseline: what a score is compared with: the mean of its group (group), of the others in it (leave_one_out), or
            nothing (none).
        scale_rewards: advantages are divided by the standard deviation of the scores in the group, or in the batch, or
            not at all (none; Dr. GRPO).
        whiten_advantages: mean 0 and variance 1 over the valid tokens of the whole rollout.
        kl_in: the leash is a term of the loss (k3 per token) or of the reward (k1). With kl_coef 0 there is neither,
            and no reference is loaded (but with adapters, whose frozen model is one).
        reward_to_go: with kl_in reward: a token answers for the KL, and for what a teacher pays, from itself on, not
            for those of the whole response.
        discount: with reward_to_go: what is k tokens later counts discount^k; 0 lets a token answer for itself alone.
        redraws: dynamic sampling (DAPO, arXiv 2503.14476): rounds of an iteration in which prompts whose responses are
            all paid the same (clip and penalties included), which teach nothing, are drawn again. Other prompts wait;
            what is still equal then stays.
        mask_truncated: rows that were cut off give no gradient (DAPO); they count in the baseline.
    """

    epochs: int = 1
    group_size: int = 8
    advantage: str = "rlhf_jax.advantages:group_advantages"
    baseline: Literal["group", "leave_one_out", "none"] = "group"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    whiten_advantages: bool = False
    kl_coef: float = 0.04
    kl_in: Literal["loss", "reward"] = "loss"
    reward_to_go: bool = False
    discount: float = 1.0
    redraws: int = 0
    mask_truncated: bool = False

    def check(self, name: str) -> None:
        """Raise a UserError unless the settings are in range and agree; `name` is their group of the config."""
        self.check_rounds(f"{name}.")
        check(self, f"{name}.", {"at least 1": "group_size", "at least 0": "redraws", "between 0 and 1": "discount"})
        if self.redraws and self.group_size == 1:
            raise UserError(
                f"{name}.redraws {self.redraws} is of groups whose rewards are equal, but {name}.group_size is 1; "
                f"raise it, or set {name}.redraws 0"
            )
        needs_others = {"baseline": self.baseline != "none", "scale_rewards": self.scale_rewards == "group"}
        for field, needed in needs_others.items():
            if needed and self.group_size == 1:
                raise UserError(
                    f"{name}.{field} {getattr(self, field)} compares responses to one prompt, but {name}.group_size "
                    f"is 1; raise it, or set {name}.{field} none"
                )
        if self.baseline == "none" and self.scale_rewards != "none":
            raise UserError(
                f"{name}.scale_rewards {self.scale_rewards} would divide scores that have no baseline by their "
                f"deviation, which may be 0; set {name}.scale_rewards none, and {name}.whiten_advantages true instead"
            )
        if self.reward_to_go and self.kl_in != "reward":
            raise UserError(f"{name}.reward_to_go is of the KL in the reward; set {name}.kl_in reward, or it to false")
        if self.discount != 1 and not self.reward_to_go:
            raise UserError(
                f"{name}.discount {self.discount:g} does nothing without {name}.reward_to_go; set that, or 1"
            )


RLOO = GroupConfig(
    group_size=4,
    baseline="leave_one_out",
    scale_rewards="none",
    kl_coef=0.05,
    kl_in="reward",
    loss_reduction="sequence",
    policy_loss="rlhf_jax.losses:sequence_policy_loss",
)
REINFORCE_PP = GroupConfig(
    group_size=1,
    baseline="none",
    scale_rewards="none",
    whiten_advantages=True,
    kl_coef=0.05,
    kl_in="reward",
    reward_to_go=True,
)
DISTILL = GroupConfig(
    group_size=1,
    baseline="none",
    scale_rewards="none",
    kl_coef=0.0,
    kl_in="reward",
    reward_to_go=True,
    discount=0.0,
)


@settings
class GroupArgs:
    """What grpo, rloo, reinforce_pp and distill have in common."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    reward: RewardSourceConfig = RewardSourceConfig()
    sampling: SamplingConfig = SamplingConfig()
    lora: LoRAConfig = LoRAConfig()
    optim: OptimConfig = PPO_OPTIM
    mesh: MeshConfig = MeshConfig()
    run: RunConfig = RunConfig(eval_every=20)
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultConfig = FaultConfig()

    def __post_init__(self) -> None:
        settle(self, "grpo", online=True)
        for name, group in vars(self).items():
            if isinstance(group, GroupConfig):  # the method's own
                group.check(name)
                check_frozen(self.model, self.lora)
                group.check_truncation(name, self.sampling.max_new_tokens)
        self.optim.check("optim.")
        self.sampling.check_buckets("data.max_prompt_length", self.data.max_prompt_length)


@settings
class GRPOArgs(GroupArgs):
    """All of `rlhf-jax grpo`."""

    grpo: GroupConfig = GroupConfig()


@settings
class RLOOArgs(GroupArgs):
    """All of `rlhf-jax rloo`."""

    rloo: GroupConfig = RLOO


@settings
class ReinforcePPArgs(GroupArgs):
    """All of `rlhf-jax reinforce_pp`."""

    reinforce_pp: GroupConfig = REINFORCE_PP


@settings
class DistillArgs(GroupArgs):
    """All of `rlhf-jax distill`: the student is `model`, and the teacher `reward.teacher`."""

    distill: GroupConfig = DISTILL
