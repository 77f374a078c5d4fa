"""Every setting, as frozen dataclasses; YAML files and dotted overrides fill them (`rlhf_jax.cli`).

Imports nothing of jax, so that `rlhf-jax --help` answers at once. Notebooks build the same classes by hand and pass
them to `sft.run`, `reward.run` and `ppo.run`. Counts are in the unit that the name says; lengths are in tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_jax.errors import UserError


@dataclass(frozen=True)
class ArchConfig:
    """The shape of a decoder, for a model that starts from random weights; a Hugging Face directory brings its own.

    Args:
        vocab_size: V, rows of the embedding.
        width: D, width of the residual stream.
        num_layers: L.
        num_heads: H, query heads.
        num_kv_heads: K, key-value heads; H must be a multiple.
        head_dim: N, width of a head.
        ffn_width: hidden width of the MLP.
        max_positions: longest sequence the positions allow.
        norm: rms (RMSNorm) or layer (LayerNorm with bias).
        norm_eps: added to the variance.
        positions: rotary or learned.
        rope_theta: base of the rotary frequencies.
        activation: the MLP's nonlinearity.
        gated_mlp: down(act(gate(x)) * up(x)) instead of down(act(up(x))).
        qkv_bias: biases on the query, key and value projections.
        out_bias: bias on the attention's output projection.
        mlp_bias: biases on the MLP's projections.
        tied_head: use the embedding as the vocabulary projection.
        init_std: standard deviation of fresh weights.
    """

    vocab_size: int = 512
    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 32
    ffn_width: int = 352
    max_positions: int = 512
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    positions: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 10000.0
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied_head: bool = True
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; change one of them"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd, which rotary positions cannot split; make it even")


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it computes.

    Args:
        path: a Hugging Face directory (config.json, model.safetensors, tokenizer files); empty starts from `arch`.
        arch: shape of a model with random weights, used when `path` is empty.
        tokenizer: a tokenizer directory; empty means the one in `path`.
        eos_ids: ids that end a response; empty means the ids that the model directory or the tokenizer names.
        compute_dtype: dtype of activations; auto is bfloat16 on TPU and GPU, float32 on CPU. Weights stay float32.
        remat: what the backward pass recomputes: nothing, all but matrix products (dots), or whole layers (full).
        logprob_chunk: positions whose logits are alive at once; longer sequences run in checkpointed chunks.
    """

    path: str = ""
    arch: ArchConfig | None = None
    tokenizer: str = ""
    eos_ids: list[int] = field(default_factory=list)
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: Literal["none", "dots", "full"] = "none"
    logprob_chunk: int = 256


@dataclass(frozen=True)
class MeshConfig:
    """Devices as a (data, fsdp, tensor) mesh; one axis may be -1 for "the rest".

    Args:
        data: replicas of the model.
        fsdp: shards of every weight, gathered layer by layer.
        tensor: shards of heads and MLP columns.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, a clip and a schedule.

    Args:
        learning_rate: peak value.
        schedule: constant, linear to `end_fraction`, or cosine to `end_fraction`.
        warmup_steps: optimiser steps (PPO: iterations) of linear warm-up from zero.
        end_fraction: learning rate at the end, as a fraction of the peak.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: Adam's epsilon.
        eps_form: standard adds eps to the bias-corrected root; tensorflow to the uncorrected one, so early updates
            are smaller (Huang et al. 2024, arXiv 2403.17031).
        weight_decay: decoupled decay of matrices; norms, biases and scalar heads are never decayed.
        clip_norm: largest global gradient norm; 0 is off.
    """

    learning_rate: float = 3e-4
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = 0
    end_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    eps_form: Literal["standard", "tensorflow"] = "standard"
    weight_decay: float = 0.0
    clip_norm: float = 1.0


@dataclass(frozen=True)
class DataConfig:
    """Rows to train on, and how they become batches.

    Args:
        path: a .jsonl, .jsonl.gz, .txt or .txt.gz file.
        eval_path: held-out rows; empty holds out `eval_fraction` of `path`, split by prompt.
        eval_fraction: share of the prompts held out when `eval_path` is empty.
        batch_size: rows of one optimiser batch, over all devices (for packed text: sequences).
        max_prompt_length: longest prompt, in tokens.
        max_length: longest prompt and response together, in tokens; also the length of a packed sequence.
        too_long: what happens to longer rows: drop (counted and said), truncate (prompts lose their start, responses
            their end), or error.
        eval_batches: batches of one evaluation; 0 takes all held-out rows.
    """

    path: str = ""
    eval_path: str = ""
    eval_fraction: float = 0.05
    batch_size: int = 32
    max_prompt_length: int = 256
    max_length: int = 512
    too_long: Literal["drop", "truncate", "error"] = "drop"
    eval_batches: int = 8


@dataclass(frozen=True)
class RunConfig:
    """The run directory and what is written to it.

    Args:
        output_dir: holds config.yaml, metrics.jsonl, samples.jsonl, summary.json and model/.
        overwrite: replace an earlier run in `output_dir`.
        seed: every random number of the run comes from it.
        log_every: steps between lines of metrics.jsonl.
        eval_every: steps between evaluations on the held-out rows; 0 evaluates at the end only.
        keep_best: end with the weights of the best evaluation instead of the last ones.
        tensorboard: write TensorBoard events to output_dir/tensorboard.
        progress: show a progress bar.
    """

    output_dir: str = ""
    overwrite: bool = False
    seed: int = 0
    log_every: int = 1
    eval_every: int = 100
    keep_best: bool = True
    tensorboard: bool = False
    progress: bool = True


@dataclass(frozen=True)
class SFTConfig:
    """Next-token training on demonstrations or plain text.

    Args:
        steps: optimiser steps; 0 means `epochs` over the rows.
        epochs: passes over the rows when `steps` is 0.
        accumulate: microbatches whose gradients are added up to one step.
        loss_on: response only, or all tokens.
        loss_reduction: token (mean over the batch's tokens) or sequence (mean over rows of their means).
        pack: several documents in one sequence, not attending to each other.
        loss: a function (logprobs, weights) -> (scalar, metrics), as "module:name".
        num_samples: continuations written to samples.jsonl after each evaluation.
    """

    steps: int = 0
    epochs: int = 1
    accumulate: int = 1
    loss_on: Literal["response", "all"] = "response"
    loss_reduction: Literal["token", "sequence"] = "token"
    pack: bool = False
    loss: str = "rlhf_jax.losses:next_token_loss"
    num_samples: int = 4


@dataclass(frozen=True)
class RewardConfig:
    """A reward model from pairwise comparisons.

    Args:
        steps: optimiser steps; 0 means `epochs` over the rows.
        epochs: passes over the comparisons when `steps` is 0.
        accumulate: microbatches whose gradients are added up to one step.
        head_init: the scalar head at the start: fresh from N(0, 1/(D+1)) (normal; Stiennon et al. 2020), fresh zeros,
            or the trained one of the model directory, which must hold one.
        center_coef: weight of (s_chosen + s_rejected)^2, which keeps scores near zero (arXiv 2312.09244).
        normalize: shift (mean) or shift and scale (mean_std) the scores of the training responses to mean 0 and
            standard deviation 1 when training ends; saved within the head.
        loss: a function (chosen, rejected, weights, margins, labels) -> (scalar, metrics), as "module:name".
    """

    steps: int = 0
    epochs: int = 1
    accumulate: int = 1
    head_init: Literal["normal", "zeros", "trained"] = "normal"
    center_coef: float = 0.0
    normalize: Literal["off", "mean", "mean_std"] = "mean_std"
    loss: str = "rlhf_jax.losses:pairwise_reward_loss"


@dataclass(frozen=True)
class RewardSourceConfig:
    """What PPO maximises: weight * reward model + sum of weights * Python functions.

    Args:
        model: directory of a reward model, as `rlhf-jax reward` writes it; empty means none.
        model_weight: factor of its score.
        functions: Python functions fn(prompts, responses, **columns) -> list of floats, as "module:name".
        function_weights: a factor for each function; empty means 1 for all.
        gold: a function of the same form that is only logged, as rollout/gold; training never sees it.
    """

    model: str = ""
    model_weight: float = 1.0
    functions: list[str] = field(default_factory=list)
    function_weights: list[float] = field(default_factory=list)
    gold: str = ""


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn.

    Args:
        max_new_tokens: T, longest response.
        min_new_tokens: stop ids cannot be drawn before this many tokens.
        temperature: logits are divided by it; 0 is greedy.
        top_k: keep the k most likely tokens (ties kept); 0 keeps all.
        top_p: keep the smallest set of likely tokens whose mass reaches p; 1 keeps all.
        chunk: decoding looks whether all rows are done after every so many tokens.
        prompt_buckets: lengths that prompts are padded to, ascending; each is one compilation. Empty means one
            bucket, data.max_prompt_length.
        microbatch: rows decoded at once; 0 means all.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    chunk: int = 32
    prompt_buckets: list[int] = field(default_factory=list)
    microbatch: int = 0


@dataclass(frozen=True)
class PPOConfig:
    """Proximal policy optimisation against a reward with a KL leash; docs/algorithms.md gives every formula.

    Args:
        iterations: rollout-score-update rounds.
        epochs: passes over a rollout, each in a fresh order.
        minibatches: optimiser steps of one pass.
        accumulate: microbatches of one optimiser step.
        score_microbatch: rows scored at once; 0 means all.
        stop: eos ends a row at a stop id; truncate samples the full length and cuts at the first stop id at or after
            `truncate_after` (Ziegler et al. 2019).
        truncate_after: tokens before which `stop: truncate` ignores stop ids.
        missing_eos: rows that never stopped: off, replace their score by `missing_eos_value`, or subtract it.
        missing_eos_value: the constant of `missing_eos`.
        score_at: the score is paid at the last response token or in the slot after it.
        kl_estimator: per-token KL in the reward: k1 (log-ratio) or k3 (Schulman 2020), both logged.
        kl_controller: adaptive moves kl_coef towards kl_target, fixed leaves it.
        kl_coef: (initial) price of one nat.
        kl_target: nats per response that the adaptive controller steers to.
        kl_horizon: rows over which it reacts.
        whiten_rewards: scale the shaped rewards to unit variance, keeping their mean.
        whiten_advantages: mean 0 and variance 1 over the valid tokens of the whole rollout.
        whiten_variance: biased divides by n, bessel by n - 1 (TRL).
        discount: gamma.
        gae_lambda: lambda.
        clip_ratio: epsilon of the policy's clip.
        dual_clip: lower bound c * A for negative advantages (arXiv 1912.09729); 0 is off.
        max_log_ratio: the log-ratio is clamped to +- this before exp.
        value_clip: clip of the value's move; 0 is off.
        value_coef: weight of the value loss.
        entropy_coef: weight of the entropy bonus.
        loss_reduction: token, sequence, or fixed (every token weighs 1/(B T), whatever the lengths).
        old_logprobs: from the sampler, recomputed by a forward pass, or auto: the sampler's in float32 without top-k
            and top-p, else recomputed.
        shared_trunk: the value head sits on the policy's trunk instead of a model of its own.
        value_init: the critic starts as the reward model or as the policy with a zero head; auto takes the reward model
            if there is one.
        critic_warmup: iterations in which only the critic learns.
        ptx_coef: weight of the pretraining loss on `ptx_path` (InstructGPT's PPO-ptx); 0 is off.
        ptx_path: text or demonstrations for `ptx_coef`.
        ptx_batch_size: sequences of `ptx_path` in every optimiser step.
        target_kl: no more updates in this iteration once approx KL exceeds it; 0 is off.
        ema_decay: decay per iteration of an averaged policy, which is then evaluated and saved; 0 is off.
        policy_loss: a function (logprobs, old_logprobs, advantages, weights) -> (scalar, metrics), as "module:name".
        num_samples: rows of each logged sample table.
        sample_every: iterations between sample tables.
        save_value_model: write the critic to output_dir/value_model.
    """

    iterations: int = 100
    epochs: int = 4
    minibatches: int = 1
    accumulate: int = 1
    score_microbatch: int = 0
    stop: Literal["eos", "truncate"] = "eos"
    truncate_after: int = 0
    missing_eos: Literal["off", "replace", "subtract"] = "off"
    missing_eos_value: float = -1.0
    score_at: Literal["last", "after_eos"] = "last"
    kl_estimator: Literal["k1", "k3"] = "k1"
    kl_controller: Literal["adaptive", "fixed"] = "adaptive"
    kl_coef: float = 0.05
    kl_target: float = 6.0
    kl_horizon: float = 10000.0
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    whiten_variance: Literal["biased", "bessel"] = "biased"
    discount: float = 1.0
    gae_lambda: float = 0.95
    clip_ratio: float = 0.2
    dual_clip: float = 0.0
    max_log_ratio: float = 20.0
    value_clip: float = 0.2
    value_coef: float = 0.1
    entropy_coef: float = 0.0
    loss_reduction: Literal["token", "sequence", "fixed"] = "token"
    old_logprobs: Literal["auto", "sampler", "recompute"] = "auto"
    shared_trunk: bool = False
    value_init: Literal["auto", "reward_model", "zeros"] = "auto"
    critic_warmup: int = 0
    ptx_coef: float = 0.0
    ptx_path: str = ""
    ptx_batch_size: int = 8
    target_kl: float = 0.0
    ema_decay: float = 0.0
    policy_loss: str = "rlhf_jax.losses:clipped_policy_loss"
    num_samples: int = 4
    sample_every: int = 10
    save_value_model: bool = False


PPO_OPTIM = OptimConfig(learning_rate=1e-5, schedule="linear", eps=1e-5)


@dataclass(frozen=True)
class SFTRun:
    """All of `rlhf-jax sft`."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    sft: SFTConfig = SFTConfig()
    optim: OptimConfig = OptimConfig()
    sampling: SamplingConfig = SamplingConfig()
    mesh: MeshConfig = MeshConfig()
    run: RunConfig = RunConfig()


@dataclass(frozen=True)
class PretrainRun(SFTRun):
    """All of `rlhf-jax pretrain`: SFT with packing and the loss on all tokens."""

    sft: SFTConfig = SFTConfig(pack=True, loss_on="all")


@dataclass(frozen=True)
class RewardRun:
    """All of `rlhf-jax reward`."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    reward: RewardConfig = RewardConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    run: RunConfig = RunConfig()


@dataclass(frozen=True)
class PPORun:
    """All of `rlhf-jax ppo`; `optim` moves the policy, `value_optim` the critic."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    reward: RewardSourceConfig = RewardSourceConfig()
    sampling: SamplingConfig = SamplingConfig()
    ppo: PPOConfig = PPOConfig()
    optim: OptimConfig = PPO_OPTIM
    value_optim: OptimConfig = PPO_OPTIM
    mesh: MeshConfig = MeshConfig()
    run: RunConfig = RunConfig(eval_every=20)


@dataclass(frozen=True)
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
        output: a .jsonl file to write {prompt, response} rows to; empty prints them.
        overwrite: replace `output`.
        mesh: the devices.
    """

    model: ModelConfig = ModelConfig()
    prompts: list[str] = field(default_factory=list)
    data_path: str = ""
    num_samples: int = 1
    sampling: SamplingConfig = SamplingConfig()
    max_prompt_length: int = 256
    batch_size: int = 64
    seed: int = 0
    output: str = ""
    overwrite: bool = False
    mesh: MeshConfig = MeshConfig()


@dataclass(frozen=True)
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
    data_path: str = ""
    max_prompt_length: int = 256
    max_length: int = 512
    batch_size: int = 64
    output: str = ""
    overwrite: bool = False
    mesh: MeshConfig = MeshConfig()


@dataclass(frozen=True)
class QuickstartConfig:
    """`rlhf-jax quickstart`: SFT, reward model and PPO on random walks, made on the fly.

    Args:
        output_dir: where the stages and the report go.
        seed: of the graph, the data and the training.
        overwrite: replace an earlier quickstart in `output_dir`.
        progress: show progress bars.
        comparisons: pairs of sampled walks that the simulated rater labels.
        rater_noise: probability that the rater errs.
        iterations: PPO iterations.
    """

    output_dir: str = "runs/quickstart"
    seed: int = 0
    overwrite: bool = False
    progress: bool = True
    comparisons: int = 4000
    rater_noise: float = 0.1
    iterations: int = 120


def resolve(name: str) -> Callable[..., Any]:
    """The function that "package.module:name" points to; the working directory is searched too.

    Raises:
        UserError: the text has no colon, the module does not import, or it has no such callable.
    """
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        raise UserError(f'{name!r} names no function; write it as "package.module:function"')
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"{name!r}: {error}; check the spelling or run where the module lies") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise UserError(f"{name!r}: module {module_name} has no function {attribute!r}; check the spelling")
    return found


def bind(function: str | Callable[..., Any], config: Any) -> Callable[..., Any]:
    """A loss by name or as it is, its keyword-only arguments filled from the config fields of the same name.

    Raises:
        UserError: a keyword-only argument without default that the config has no field for.
    """
    function = resolve(function) if isinstance(function, str) else function
    known = {f.name for f in dataclasses.fields(config)}
    filled = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        if name in known:
            filled[name] = getattr(config, name)
        elif parameter.default is parameter.empty:
            raise UserError(
                f"{getattr(function, '__name__', function)} asks for {name!r}, which {type(config).__name__} does not have; "
                "give it a default or a field"
            )
    return functools.partial(function, **filled)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested plain dicts, every field present; `config.yaml` of a run is this."""
    return dataclasses.asdict(config)
