"""The settings of each algorithm, and all of each command."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from rlhf_jax.config.adapters import LoRAConfig, check_frozen
from rlhf_jax.config.checks import LARGEST, SEEDS, check
from rlhf_jax.config.online import OnlineConfig
from rlhf_jax.config.parts import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SamplingConfig,
)
from rlhf_jax.config.saving import CheckpointConfig, FaultConfig
from rlhf_jax.config.settings import PathText, settings
from rlhf_jax.errors import UserError, shown


@settings
class SFTConfig:
    """Next-token training on demonstrations or plain text.

    Args:
        steps: optimiser steps; 0 means `epochs` over the rows.
        epochs: passes over the rows when `steps` is 0.
        accumulate: microbatches whose gradients are added up to one step.
        loss_on: the response only, all assistant turns, or all tokens.
        loss_reduction: token (mean over the batch's tokens) or sequence (mean over rows of their means).
        pack: several documents in one sequence, not attending to each other.
        loss: a function (logprobs, weights) -> (scalar, metrics), as "module:name".
        num_samples: continuations written to samples.jsonl after each evaluation.
    """

    steps: int = 0
    epochs: int = 1
    accumulate: int = 1
    loss_on: Literal["response", "assistant", "all"] = "response"
    loss_reduction: Literal["token", "sequence"] = "token"
    pack: bool = False
    loss: str = "rlhf_jax.losses:next_token_loss"
    num_samples: int = 4

    def __post_init__(self) -> None:
        check(self, "sft.", {"at least 0": "steps num_samples", "at least 1": "epochs accumulate"})


@settings
class RewardConfig:
    """A reward model from comparisons, pairs or rankings, or from ratings.

    Args:
        steps: optimiser steps; 0 means `epochs` over the rows.
        epochs: passes over the comparisons when `steps` is 0.
        accumulate: microbatches whose gradients are added up to one step.
        head_init: the scalar head at the start: fresh from N(0, 1/(D+1)) (normal; Stiennon et al. 2020), fresh zeros,
            or the trained one of the model directory, which must hold one.
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
        rating_low: lowest rating there can be, as ordinal_rating_loss sees it.
        rating_high: highest one.
    """

    steps: int = 0
    epochs: int = 1
    accumulate: int = 1
    head_init: Literal["normal", "zeros", "trained"] = "normal"
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
        rules = {
            "at least 0": "steps center_coef",
            "at least 1": "epochs accumulate",
            "above 0": "aggregate_prior",
            "finite": "rating_low rating_high",
        }
        check(self, "reward.", rules)
        if self.rating_low >= self.rating_high:
            raise UserError(
                f"reward.rating_low {self.rating_low:g} is not below reward.rating_high {self.rating_high:g}; give "
                "the ends of the scale"
            )


@settings
class RewardSourceConfig:
    """What PPO maximises: weight * reward model + sum of weights * Python functions.

    Args:
        model: directory of a reward model, as `rlhf-jax reward` writes it; empty means none.
        model_weight: factor of its score.
        functions: Python functions fn(prompts, responses, **columns) -> list of floats, as "module:name".
        function_weights: a factor for each function; empty means 1 for all.
        gold: a function of the same form that is only logged, as rollout/gold; training never sees it.
        timeout: seconds after which a call of a function has failed; 0 waits for ever and calls it in the main thread.
        retries: further calls after one that raised or ran out of time.
        on_failure: when these fail too, stop the run (saved first) or skip the batch, counted in rollout/skipped.
    """

    model: PathText = ""
    model_weight: float = 1.0
    functions: list[str] = field(default_factory=list)
    function_weights: list[float] = field(default_factory=list)
    gold: str = ""
    timeout: float = 600.0
    retries: int = 2
    on_failure: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        check(self, "reward.", {"finite and not 0": "model_weight", "at least 0": "timeout retries"})
        if any(not (weight and abs(weight) <= LARGEST) for weight in self.function_weights):
            raise UserError(
                f"reward.function_weights {shown(self.function_weights)} are not all finite and other than 0; leave "
                "out a function that should not count, or make it reward.gold"
            )
        if any(not name.strip() for name in self.functions):
            raise UserError(f"reward.functions {shown(self.functions)} has an empty text; name module:function")


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
        discount: gamma.
        gae_lambda: lambda.
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
    discount: float = 1.0
    gae_lambda: float = 0.95
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


def check_divides(batch_size: int, name: str, parts: int) -> None:
    """Raise a UserError unless data.batch_size makes equal microbatches."""
    if batch_size % parts:
        raise UserError(f"data.batch_size {batch_size} is not divisible by {name} {parts}; change one of them")


def check_buckets(sampling: SamplingConfig, name: str, longest: int) -> None:
    """Raise a UserError unless the last prompt bucket holds prompts of the longest length, the option `name`."""
    if sampling.prompt_buckets and sampling.prompt_buckets[-1] < longest:
        raise UserError(
            f"sampling.prompt_buckets {sampling.prompt_buckets} ends below {name} {longest}; "
            f"append {longest} to it or lower {name}"
        )


@settings
class SFTRun:
    """All of `rlhf-jax sft`."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    sft: SFTConfig = SFTConfig()
    lora: LoRAConfig = LoRAConfig()
    optim: OptimConfig = OptimConfig()
    sampling: SamplingConfig = SamplingConfig()
    mesh: MeshConfig = MeshConfig()
    run: RunConfig = RunConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultConfig = FaultConfig()

    def __post_init__(self) -> None:
        self.optim.check("optim.")
        check_frozen(self.model, self.lora)
        check_divides(self.data.batch_size, "sft.accumulate", self.sft.accumulate)
        check_buckets(self.sampling, "data.max_prompt_length", self.data.max_prompt_length)


@settings
class PretrainRun(SFTRun):
    """All of `rlhf-jax pretrain`: SFT with packing and the loss on all tokens."""

    sft: SFTConfig = SFTConfig(pack=True, loss_on="all")


@settings
class RewardRun:
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
        self.optim.check("optim.")
        check_frozen(self.model, self.lora)
        check_divides(self.data.batch_size, "reward.accumulate", self.reward.accumulate)


PPO_OPTIM = OptimConfig(learning_rate=1e-5, schedule="linear", eps=1e-5)


@settings
class PPORun:
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
        self.optim.check("optim.")
        check_frozen(self.model, self.lora)
        self.value_optim.check("value_optim.")
        check_buckets(self.sampling, "data.max_prompt_length", self.data.max_prompt_length)
        self.ppo.check_truncation("ppo", self.sampling.max_new_tokens)


@settings
class SampleRun:
    """All of `rlhf-jax sample`: responses of a model to prompts.

    Args:
        model: which model.
        prompts: prompts as text.
        data_path: a file of prompt rows, instead of or besides `prompts`.
        num_samples: responses to each prompt.
        sampling: how responses are drawn.
        max_prompt_length: longest prompt, in tokens; longer ones lose their start.
        batch_size: prompts decoded at once.
        seed: of the noise.
        output: a .jsonl file to write {prompt, response, finished} rows to; finished: it ended by itself and was
            not cut off. Empty prints them.
        overwrite: replace `output`.
        mesh: the devices.
    """

    model: ModelConfig = ModelConfig()
    prompts: list[str] = field(default_factory=list)
    data_path: PathText = ""
    num_samples: int = 1
    sampling: SamplingConfig = SamplingConfig()
    max_prompt_length: int = 256
    batch_size: int = 64
    seed: int = 0
    output: PathText = ""
    overwrite: bool = False
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        check(self, "", {"at least 1": "num_samples max_prompt_length batch_size", SEEDS: "seed"})
        check_buckets(self.sampling, "max_prompt_length", self.max_prompt_length)


@settings
class ScoreRun:
    """All of `rlhf-jax score`: a reward model's scores of {prompt, response} rows.

    Args:
        model: a reward model's directory.
        data_path: rows {prompt, response}, as `rlhf-jax sample --output` writes them.
        max_prompt_length: longest prompt, in tokens.
        max_length: longest prompt and response together, in tokens; longer rows are cut.
        batch_size: rows scored at once.
        output: a .jsonl file to write the rows with "score" added to; empty prints them.
        overwrite: replace `output`.
        mesh: the devices.
    """

    model: ModelConfig = ModelConfig()
    data_path: PathText = ""
    max_prompt_length: int = 256
    max_length: int = 512
    batch_size: int = 64
    output: PathText = ""
    overwrite: bool = False
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        check(self, "", {"at least 1": "max_prompt_length max_length batch_size"})
        if self.max_prompt_length >= self.max_length:
            raise UserError(
                f"max_prompt_length {self.max_prompt_length} is not below max_length {self.max_length}, so a response "
                "has no room; lower it or raise max_length"
            )


@settings
class QuickstartConfig:
    """`rlhf-jax quickstart`: SFT, reward model and PPO on random walks, made on the fly.

    Args:
        output_dir: where the stages and the report go.
        seed: of the graph, the data and the training.
        overwrite: replace an earlier quickstart in `output_dir`.
        progress: show progress bars.
        rounds: rounds of comparisons, reward model and PPO.
        comparisons: pairs of sampled walks that the simulated rater sees in a round; ties are left out.
        rater_noise: probability that the rater errs.
        iterations: PPO iterations of a round.
    """

    output_dir: PathText = "runs/quickstart"
    seed: int = 0
    overwrite: bool = False
    progress: bool = True
    rounds: int = 2
    comparisons: int = 6000
    rater_noise: float = 0.1
    iterations: int = 70

    def __post_init__(self) -> None:
        check(
            self, "", {"at least 1": "rounds comparisons iterations", "between 0 and 1": "rater_noise", SEEDS: "seed"}
        )
