"""PPO."""

from __future__ import annotations

from typing import Literal

from rlhf_jax.config.adapters import LoRAConfig, check_frozen
from rlhf_jax.config.checks import check
from rlhf_jax.config.online import PPO_OPTIM, OnlineConfig, RewardSourceConfig
from rlhf_jax.config.parts import DataConfig, MeshConfig, ModelConfig, OptimConfig, RunConfig, SamplingConfig
from rlhf_jax.config.rates import settle
from rlhf_jax.config.saving import CheckpointConfig, FaultConfig
from rlhf_jax.config.settings import PathText, settings
from rlhf_jax.errors import UserError


@settings
class PPOConfig(OnlineConfig):
    """Proximal policy optimisation against a reward with a KL leash; docs/algorithms.md gives every formula.

    Args:
        score_at: the score is paid at the last response token or in the slot after it.
        kl_estimator: per-token KL in the reward: k1 (log-ratio) or k3 (Schulman 2020), both logged.
        kl_controller: adaptive moves kl_coef towards kl_target, fixed leaves it.
        kl_target: nats per response that the adaptive controller steers to.
        kl_horizon: rows over which it reacts.
        whiten_rewards: scale the shaped rewards to unit variance, keeping their mean.
        whiten_advantages: mean 0 and variance 1 over the valid tokens of the whole rollout.
        whiten_variance: biased divides by n, bessel by n - 1 (TRL).
        advantage: a function (rewards, values) -> advantages, as "module:name".
        discount: gamma.
        gae_lambda: lambda.
        value_loss: a function (values, old_values, returns, weights) -> (scalar, metrics), as "module:name".
        value_clip: clip of the value's move; 0 is off.
        value_coef: weight of the value loss.
        trainable_layers: train so many top layers, the final norm and the heads, and share the frozen rest with the
            reference and the critic (trlX's hydra); 0 trains the whole model.
        shared_trunk: the value head sits on the policy's trunk instead of a model of its own.
        value_init: the critic starts as the reward model or as the policy with a zero head; auto takes the reward
            model if there is one.
        critic_warmup: iterations in which only the critic learns.
        ptx_coef: weight of the pretraining loss on `ptx_path` (InstructGPT's PPO-ptx); 0 is off.
        ptx_path: text or demonstrations for `ptx_coef`.
        ptx_batch_size: sequences of `ptx_path` in every optimiser step.
        save_value_model: write the critic to output_dir/value_model.
    """

    score_at: Literal["last", "after_eos"] = "last"
    kl_estimator: Literal["k1", "k3"] = "k1"
    kl_controller: Literal["adaptive", "fixed"] = "adaptive"
    kl_target: float = 6.0
    kl_horizon: float = 10000.0
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    whiten_variance: Literal["biased", "bessel"] = "biased"
    advantage: str = "rlhf_jax.advantages:gae"
    discount: float = 1.0
    gae_lambda: float = 0.95
    value_loss: str = "rlhf_jax.losses:clipped_value_loss"
    value_clip: float = 0.2
    value_coef: float = 0.1
    trainable_layers: int = 0
    shared_trunk: bool = False
    value_init: Literal["auto", "reward_model", "zeros"] = "auto"
    critic_warmup: int = 0
    ptx_coef: float = 0.0
    ptx_path: PathText = ""
    ptx_batch_size: int = 8
    save_value_model: bool = False

    def __post_init__(self) -> None:
        self.check_rounds("ppo.")
        rules = {
            "at least 1": "ptx_batch_size",
            "at least 0": "kl_target value_clip value_coef trainable_layers critic_warmup ptx_coef",
            "above 0": "kl_horizon",
            "between 0 and 1": "discount gae_lambda",
        }
        check(self, "ppo.", rules)
        if self.ptx_path and not self.ptx_coef:
            raise UserError(
                f"ppo.ptx_path {self.ptx_path} does nothing with ppo.ptx_coef 0; raise it, or leave it out"
            )


@settings
class PPOArgs:
    """All of `rlhf-jax ppo`; `optim` moves the policy, `value_optim` the critic."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    reward: RewardSourceConfig = RewardSourceConfig()
    sampling: SamplingConfig = SamplingConfig()
    ppo: PPOConfig = PPOConfig()
    lora: LoRAConfig = LoRAConfig()
    optim: OptimConfig = PPO_OPTIM
    value_optim: OptimConfig = PPO_OPTIM
    mesh: MeshConfig = MeshConfig()
    run: RunConfig = RunConfig(eval_every=20)
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultConfig = FaultConfig()

    def __post_init__(self) -> None:
        settle(self, "ppo", "value", online=True)
        self.optim.check("optim.")
        check_frozen(self.model, self.lora)
        self.value_optim.check("value_optim.")
        self.sampling.check_buckets("data.max_prompt_length", self.data.max_prompt_length)
        self.ppo.check_truncation("ppo", self.sampling.max_new_tokens)
        least = 0.2 * self.data.batch_size  # the controller's largest error times the rows
        if self.ppo.kl_controller == "adaptive" and self.ppo.kl_horizon <= least:
            raise UserError(
                f"ppo.kl_horizon {self.ppo.kl_horizon:g} lets one batch of {self.data.batch_size} rows bring kl_coef "
                f"to 0 or below; raise it above {least:g}, or set ppo.kl_controller fixed"
            )
