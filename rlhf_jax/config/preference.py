"""The settings of what learns from preferences without a reward model: DPO and kin, KTO, RRHF."""

from __future__ import annotations

import dataclasses

from rlhf_jax.config.adapters import LoRAConfig, check_training
from rlhf_jax.config.parts import DataConfig, MeshConfig, ModelConfig, OptimConfig, RunConfig, StepsConfig
from rlhf_jax.config.rates import settle
from rlhf_jax.config.saving import CheckpointConfig, FaultConfig
from rlhf_jax.config.settings import settings
from rlhf_jax.errors import UserError

POLICY_OPTIM = OptimConfig(schedule="linear")


@settings
class DPOConfig(StepsConfig):
    """A policy from pairs, by a loss of log-probs alone; docs/algorithms.md lists the losses.

    Args:
        loss: a function of the columns of a batch that it names, among logprobs, ref_logprobs, lengths, labels,
            margins, weights and token_weights -> (scalar, metrics), as "module:name". Others there are: ipo_loss,
            hinge_loss, robust_dpo_loss, exo_loss, nca_loss, bco_loss, sppo_loss, apo_zero_loss, apo_down_loss,
            discopop_loss, length_normalised_dpo_loss; simpo_loss, cpo_loss and orpo_loss need no reference.
        beta: nats to reward: how close to the reference the policy stays. In IPO the paper's tau; in SimPO the scale
            of the reward per token (2 to 10 there); in ORPO the weight of the odds ratio.
        label_smoothing: chance that a label is wrong, as dpo_loss, cpo_loss, robust_dpo_loss and exo_loss see it.
        target_margin: SimPO's gamma.
        discopop_tau: DiscoPOP's tau.
        sft_coef: weight of the mean NLL of the chosen responses' tokens, added to the loss.
    """

    loss: str = "rlhf_jax.losses:dpo_loss"
    beta: float = 0.1
    label_smoothing: float = 0.0
    target_margin: float = 0.5
    discopop_tau: float = 0.05
    sft_coef: float = 0.0

    def __post_init__(self) -> None:
        more = {"above 0": "beta discopop_tau", "at least 0 and below 1/2": "label_smoothing"}
        self.check("dpo.", "target_margin sft_coef", more)


@settings
class KTOConfig(StepsConfig):
    """A policy from responses that are each labelled good or bad (Ethayarajh et al. 2024, arXiv 2402.01306).

    Args:
        accumulate: microbatches whose gradients are added up to one step; each estimates the KL by itself.
        loss: as dpo.loss, without margins; apo_zero_unpaired_loss is the other there is.
        beta: nats to reward: how close to the reference the policy stays.
        desirable_weight: of good responses. The paper has this times their number within 1 to 4/3 of the other
            weight times the number of bad ones.
        undesirable_weight: of bad ones.
        sft_coef: weight of the mean NLL of the good responses' tokens, added to the loss.
    """

    loss: str = "rlhf_jax.losses:kto_loss"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    sft_coef: float = 0.0

    def __post_init__(self) -> None:
        self.check("kto.", "desirable_weight undesirable_weight sft_coef", {"above 0": "beta"})
        if not (self.desirable_weight or self.undesirable_weight):
            raise UserError("kto.desirable_weight and kto.undesirable_weight are both 0; raise one of them")


@settings
class RRHFConfig(StepsConfig):
    """A policy whose log-probs rank responses as the raters do (Yuan et al. 2023, arXiv 2304.05302).

    Args:
        loss: a function of the columns of a batch that it names, among logprobs, ref_logprobs, lengths, ranks, mask,
            weights and token_weights -> (scalar, metrics), as "module:name".
        length_penalty: lambda: a response scores its log-prob / length^lambda.
        sft_coef: weight of the mean NLL of the best responses' tokens, added to the loss.
    """

    loss: str = "rlhf_jax.losses:rrhf_ranking_loss"
    length_penalty: float = 1.0
    sft_coef: float = 1.0

    def __post_init__(self) -> None:
        self.check("rrhf.", "length_penalty sft_coef")


@settings
class PreferenceArgs:
    """What dpo, kto and rrhf have in common."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    lora: LoRAConfig = LoRAConfig()
    optim: OptimConfig = POLICY_OPTIM
    mesh: MeshConfig = MeshConfig()
    run: RunConfig = RunConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultConfig = FaultConfig()

    def __post_init__(self) -> None:
        group = dataclasses.fields(self)[-1].name  # the settings of the method
        settle(self, group)
        check_training(group, getattr(self, group), self.data, self.model, self.lora, self.optim)


@settings
class DPOArgs(PreferenceArgs):
    """All of `rlhf-jax dpo`."""

    dpo: DPOConfig = DPOConfig()


@settings
class KTOArgs(PreferenceArgs):
    """All of `rlhf-jax kto`."""

    kto: KTOConfig = KTOConfig()


@settings
class RRHFArgs(PreferenceArgs):
    """All of `rlhf-jax rrhf`."""

    rrhf: RRHFConfig = RRHFConfig()
