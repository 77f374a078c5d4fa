"""Reward models."""

from __future__ import annotations

from typing import Literal

from rlhf_jax.config.adapters import LoRAConfig, check_training
from rlhf_jax.config.parts import DataConfig, MeshConfig, ModelConfig, OptimConfig, RunConfig, StepsConfig
from rlhf_jax.config.rates import settle
from rlhf_jax.config.saving import CheckpointConfig, FaultConfig
from rlhf_jax.config.settings import settings
from rlhf_jax.errors import UserError


@settings
class RewardConfig(StepsConfig):
    """A reward model from comparisons, pairs or rankings, or from ratings.

    Args:
        epochs: passes over the comparisons when `steps` is 0.
        head_init: the scalar head at the start: fresh from N(0, 1/(D+1)) (normal; Stiennon et al. 2020), fresh zeros,
            or the trained one of the model directory, which must hold one.
        members: scalar heads on one trunk, each with initial values of its own: an ensemble, saved as one model
            (num_labels of its config.json), that costs one forward pass. 1 is a plain reward model.
        member_adapters: each of several members has low-rank adapters (lora.rank) of its own beside its head, on one
            frozen trunk that is held once; else all have those of the run, if there are any.
        bootstrap: each of several members learns from its own draw with replacement of the prompts, each with all its
            rows (prompts), or of the rows, where prompts are few (rows); or all from the same rows (off).
        comparisons: what a row of a batch is: pairs, rankings (all responses to a prompt, each run once; Ouyang et
            al. 2022), or ratings (one response and a number). auto: rankings if every row is one, ratings if every
            row has a "rating". Pairs of a ranking weigh as much together as one pair.
        aggregate: what becomes of several raters' verdicts on a prompt: votes (shares of them), or strengths fitted to
            them all by bradley_terry, plackett_luce or crowd_bt, which also finds how reliable each rater is.
        aggregate_prior: wins and losses that fitted strengths start with against one of strength 0.
        center_coef: weight of (s_chosen + s_rejected)^2, which keeps scores near zero (arXiv 2312.09244).
        normalize: shift (mean) or shift and scale (mean_std) the scores of the training responses to mean 0 and
            standard deviation 1 when training ends; saved within the head.
        loss: for pairs, a function (chosen, rejected, weights, margins, labels) -> (scalar, metrics), as
            "module:name".
        kwise_loss: for rankings, one (scores, ranks, mask, weights) -> (scalar, metrics); plackett_luce_reward_loss
            and best_of_n_reward_loss (Ziegler et al. 2019) are the others there are.
        rating_loss: for ratings, one (scores, ratings, weights) -> (scalar, metrics); ordinal_rating_loss is the other
            there is.
        rating_low: lowest rating there can be, as ordinal_rating_loss sees it, whose bins are whole ratings.
        rating_high: highest one.
    """

    head_init: Literal["normal", "zeros", "trained"] = "normal"
    members: int = 1
    member_adapters: bool = False
    bootstrap: Literal["prompts", "rows", "off"] = "prompts"
    comparisons: Literal["auto", "pairs", "rankings", "ratings"] = "auto"
    aggregate: Literal["votes", "bradley_terry", "plackett_luce", "crowd_bt"] = "votes"
    aggregate_prior: float = 0.5
    center_coef: float = 0.0
    normalize: Literal["off", "mean", "mean_std"] = "mean_std"
    loss: str = "rlhf_jax.losses:pairwise_reward_loss"
    kwise_loss: str = "rlhf_jax.losses:kwise_reward_loss"
    rating_loss: str = "rlhf_jax.losses:squared_rating_loss"
    rating_low: float = 1.0
    rating_high: float = 5.0

    def __post_init__(self) -> None:
        rules = {"above 0": "aggregate_prior", "between -1000000 and 1000000": "rating_low rating_high"}
        self.check("reward.", "center_coef", {**rules, "at least 1": "epochs accumulate members"})
        if self.member_adapters and self.members < 2:
            raise UserError("reward.member_adapters: there is one member; raise reward.members or leave it out")
        if self.of_whole_ratings and self.rating_high - self.rating_low < 1:
            raise UserError(
                f"reward.rating_low {self.rating_low:g} is not 1 or more below reward.rating_high "
                f"{self.rating_high:g}, and ordinal_rating_loss is of whole ratings; multiply those of a finer scale, "
                "or leave reward.rating_loss at squared_rating_loss, which needs no ends"
            )

    @property
    def of_whole_ratings(self) -> bool:
        """Whether the loss of ratings has a bin for each whole one from rating_low to rating_high."""
        return self.rating_loss.endswith(":ordinal_rating_loss")


@settings
class RewardArgs:
    """All of `rlhf-jax reward`."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    reward: RewardConfig = RewardConfig()
    lora: LoRAConfig = LoRAConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    run: RunConfig = RunConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultConfig = FaultConfig()

    def __post_init__(self) -> None:
        settle(self, "reward")
        if self.reward.member_adapters and not self.lora.rank:
            raise UserError("reward.member_adapters: lora.rank is 0, so there are none; set it")
        check_training("reward", self.reward, self.data, self.model, self.lora, self.optim)
