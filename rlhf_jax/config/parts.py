"""What several commands share: the model, the mesh, the optimiser, the data, the run directory, sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Literal

from rlhf_jax.config.arch import ArchConfig
from rlhf_jax.config.checks import SEEDS, check, check_list, fits
from rlhf_jax.config.rules import parse_rules
from rlhf_jax.config.settings import PathText, settings
from rlhf_jax.errors import UserError, shown


@settings
class ModelConfig:
    """Which model, and how it computes.

    Args:
        path: a Hugging Face directory (config.json, safetensors, tokenizer files), or hf://owner/name[@revision] to
            download one; empty starts from `arch`.
        arch: shape of a model with random weights, used when `path` is empty.
        tokenizer: a tokenizer directory or hf:// name; empty means the one in `path`.
        eos_ids: ids that end a response; empty means the ids that the model directory or the tokenizer names.
        compute_dtype: dtype of activations; auto is bfloat16 on TPU and GPU, float32 on CPU.
        param_dtype: dtype of the weights at rest; bfloat16 halves a frozen model, rounds one that lies in float32, and
            loses small updates of a trained one. Scalar heads are float32, and so are gradients and what the
            optimiser keeps.
        attention: of whole texts; flash is the splash kernel on TPU and cuDNN's on GPU, plain forms all scores; auto
            is flash where there is one, else by blocks, without those in which nothing is seen.
        quantize: the kernels of a frozen model at rest: one scale for each output (int8), or 4-bit normal floats with
            one for every 64 inputs (nf4, QLoRA). Adapters (lora.rank) are trained on such a model.
        remat: what the backward pass recomputes: nothing, all but matrix products (dots), or whole layers (full).
        logprob_chunk: positions of a device whose logits are alive at once; more run in checkpointed chunks.
        balance_coef: weight of the experts' load-balancing loss in all that is trained; 0 is off.
    """

    path: PathText = ""
    arch: ArchConfig | None = None
    tokenizer: PathText = ""
    eos_ids: list[int] = field(default_factory=list)
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["auto", "plain", "flash"] = "auto"
    quantize: Literal["none", "int8", "nf4"] = "none"
    remat: Literal["none", "dots", "full"] = "dots"
    logprob_chunk: int = 512
    balance_coef: float = 0.0

    def __post_init__(self) -> None:
        check(self, "model.", {"at least 1": "logprob_chunk", "at least 0": "balance_coef"})
        check_list(self, "eos_ids", "model.", "at least 0")


@settings
class MeshConfig:
    """Devices as a (data, fsdp, tensor) mesh, perhaps with an axis expert; one axis may be -1 for "the rest".

    Args:
        data: replicas of the model.
        fsdp: shards of every weight, gathered layer by layer.
        tensor: shards of heads and MLP columns.
        expert: shards of the experts of every layer. Rows are shared out over this axis too, and tokens go to where
            their experts are and back (all-to-all).
        rollout_tensor: `tensor` while PPO samples, where it should differ; 0 for `tensor`. Every group of that many
            devices then holds all weights in the compute dtype, and rows go over the groups.
        slices: TPU slices (or groups of hosts) that only a slower network joins. `data` is split over them first and
            counts them: slices 2, data 2 keeps all that fsdp and tensor send within a slice.
        rules: changes of the table that says over which mesh axes parameters are split, one a line: "K=-" for a letter
            of it, "embed/tokens=-,fsdp" for the dimensions of one parameter (docs/tpu.md).
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    rollout_tensor: int = 0
    slices: int = 1
    rules: list[str] = field(default_factory=list)
    expert: int = 1

    def __post_init__(self) -> None:
        sizes = {"finite": "data fsdp tensor expert"}  # `sharding.mesh_sizes` knows how many devices there are
        check(self, "mesh.", {"at least 1": "slices", "at least 0": "rollout_tensor", **sizes})
        parse_rules(self.rules, expert=self.expert != 1)
        if self.expert != 1 and self.rollout_tensor:
            raise UserError(
                f"mesh.rollout_tensor {self.rollout_tensor} regroups fsdp and tensor, between which the experts lie "
                f"with mesh.expert {self.expert}; leave it out"
            )


@settings
class OptimConfig:
    """AdamW, a clip and a schedule.

    Args:
        learning_rate: peak value. null chooses one for the method and for all weights, adapters (lora.rank) or fresh
            weights (model.arch), and for a pretrained model a warm-up unless one is given: docs/algorithms.md.
        schedule: constant, linear to `end_fraction`, or cosine to `end_fraction`.
        warmup_steps: optimiser steps (PPO: iterations) of linear warm-up from zero.
        warmup_ratio: the same as a share of all steps, where `warmup_steps` is 0.
        end_fraction: learning rate at the end, as a fraction of the peak.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: Adam's epsilon.
        eps_form: standard adds eps to the bias-corrected root; tensorflow to the uncorrected one, so early updates
            are smaller (Huang et al. 2024, arXiv 2403.17031).
        weight_decay: decoupled decay of matrices; norms, biases and scalar heads are never decayed.
        clip_norm: largest global gradient norm; 0 is off.
    """

    learning_rate: float | None = None
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    end_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    eps_form: Literal["standard", "tensorflow"] = "standard"
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def check(self, group: str) -> None:
        """Raise a UserError unless all is in range; PPO has two of these, so the owner says which `group` it is."""
        rules = {
            "at least 0": "learning_rate warmup_steps weight_decay clip_norm",
            "between 0 and 1": "end_fraction warmup_ratio",
            "at least 0 and at most 0.9999999": "b1 b2",
            "above 0": "eps",
        }
        check(self, group, rules)
        if self.warmup_steps and self.warmup_ratio:
            raise UserError(
                f"{group}warmup_steps {self.warmup_steps} and {group}warmup_ratio {self.warmup_ratio:g} say both how "
                "long the warm-up is; give one of them"
            )
        if self.schedule == "constant" and self.end_fraction:
            raise UserError(
                f"{group}end_fraction {self.end_fraction:g} does nothing with {group}schedule constant; set it to 0 "
                "or another schedule"
            )


@settings
class StepsConfig:
    """What the settings of every method on rows have.

    Args:
        steps: optimiser steps; 0 means `epochs` over the rows.
        epochs: passes over the rows when `steps` is 0.
        accumulate: microbatches whose gradients are added up to one step.
    """

    steps: int = 0
    epochs: int = 1
    accumulate: int = 1

    def check(self, group: str, at_least_0: str, more: Mapping[str, str] | None = None) -> None:
        """Raise a UserError unless all is in range: what stands here, the fields `at_least_0` and the rules `more`."""
        check(self, group, {"at least 0": f"steps {at_least_0}", "at least 1": "epochs accumulate", **(more or {})})


@settings
class DataConfig:
    """Rows to train on, and how they become batches.

    Args:
        path: a .jsonl, .jsonl.gz, .txt, .txt.gz or .parquet file; DIR@SPLIT, a prepared TFDS directory; or
            tfds:NAME@SPLIT, a TFDS builder; or hf://datasets/OWNER/NAME@SPLIT of the Hugging Face Hub. The split is
            train unless it is named, and of TFDS may be a slice: train[:10%].
        mixture: more such sources, mixed with `path` by `mixture_weights`.
        mixture_weights: shares of an epoch that come from `path` and from each of `mixture`, in any unit: rows are
            repeated, none is left out. Empty takes every row of all of them once.
        fields: maps the fields of the rows to those a stage takes: "prompt={question}", with text around fields as you
            like. Empty takes rows as they are, and those of sets in our catalogue (UltraFeedback, GSM8K ...) by it.
        eval_path: held-out rows; empty holds out `eval_fraction` of `path` (and mixture), split by prompt.
        eval_fraction: share of the prompts held out when `eval_path` is empty, at least one of them; 0 evaluates
            nothing, and the last weights are kept.
        batch_size: rows of one optimiser batch, over all devices (for packed text: sequences). 0 takes 32, of methods
            on rows fewer where the training examples do not fill that, or as many as the mesh needs.
        max_prompt_length: longest prompt, in tokens; 0: the last of sampling.prompt_buckets, or half of max_length,
            fewer where the model's positions leave no more beside a response.
        max_length: longest prompt and response together, in tokens; also the length of a packed sequence. 0 takes 512,
            for a model by path 1024, or as many as the model's positions allow.
        length_buckets: lengths below max_length that a training batch may be padded to instead; rows of similar length
            then share a batch, and each length is one compilation. Empty pads all to max_length.
        too_long: what happens to longer rows: drop (counted and said), truncate (prompts lose their start, responses
            their end), or error.
        strict: stop at the first row that would be dropped, instead of counting it.
        eval_batches: batches of one evaluation; 0 takes all held-out rows.
        pack: for reward, dpo, kto and rrhf: the responses of a batch side by side in sequences of max_length, a prompt
            once before its responses, in as many microbatches as their tokens need. The loss is the same. auto: where
            that leaves out a tenth of what would be computed (sft has sft.pack).
        microbatch_tokens: tokens of a packed microbatch on each device.
    """

    path: PathText = ""
    mixture: list[PathText] = field(default_factory=list)
    mixture_weights: list[float] = field(default_factory=list)
    fields: list[str] = field(default_factory=list)
    eval_path: PathText = ""
    eval_fraction: float = 0.05
    batch_size: int = 0
    max_prompt_length: int = 0
    max_length: int = 0
    length_buckets: list[int] = field(default_factory=list)
    too_long: Literal["drop", "truncate", "error"] = "drop"
    strict: bool = False
    eval_batches: int = 8
    pack: Literal["auto", "on", "off"] = "auto"
    microbatch_tokens: int = 1024

    def __post_init__(self) -> None:
        rules = {
            "at least 1": "microbatch_tokens",
            "at least 0 and below 1": "eval_fraction",
            "at least 0": "batch_size eval_batches max_prompt_length max_length",
        }
        check(self, "data.", rules)
        if self.max_length and not self.max_prompt_length:
            object.__setattr__(self, "max_prompt_length", max(self.max_length // 2, 1))
        check_list(self, "length_buckets", "data.", ascending=True)
        buckets = self.length_buckets if self.max_length else []
        if buckets and not 0 < min(buckets) <= max(buckets) < self.max_length:
            raise UserError(
                f"data.length_buckets {self.length_buckets} are not between 0 and data.max_length {self.max_length}, "
                "which is always the last bucket; leave it out and lower the others"
            )
        if self.length_buckets and self.pack == "on":
            raise UserError("data.pack on makes sequences of data.max_length; leave out data.length_buckets")
        sources = 1 + len(self.mixture)
        weights = self.mixture_weights
        positive = all(weight > 0 and fits(weight) for weight in weights)
        if weights and (len(weights) != sources or sources == 1 or not positive):
            raise UserError(
                f"data.mixture_weights {shown(weights)} are not {sources} positive numbers; give one for "
                "data.path and one for each of data.mixture"
            )


LOGGERS = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
"""What `run.loggers` may name -> the module that it needs."""


@settings
class RunConfig:
    """The run directory and what is written to it.

    Args:
        output_dir: holds config.yaml, metrics.jsonl, samples.jsonl, summary.json, checkpoints/ and model/. The same
            config with the same directory continues a run that was stopped or killed.
        overwrite: replace an earlier run in `output_dir` instead, and start anew.
        seed: every random number of the run comes from it.
        log_every: steps between lines of metrics.jsonl; a method that samples has one at each evaluation as well.
        eval_every: steps between evaluations on the held-out rows; 0 evaluates at the end only.
        keep_best: end with the weights of the best evaluation instead of the last ones.
        loggers: where metrics go beside metrics.jsonl: tensorboard, wandb, mlflow, trackio, or functions of
            (step, metrics) as "module:function". They stay on this machine, unless WANDB_MODE or
            MLFLOW_TRACKING_URI says otherwise.
        profile: [first, last] steps of which JAX's profiler writes a trace to output_dir/profile, for xprof and
            Perfetto; empty is none.
        calibrate: at the end compile the programs once more, and write to summary.json what each took on these devices
            over what `rlhf-jax plan` says of it, for plan's `calibration`.
        push_to_hub: OWNER/NAME of a model of the Hugging Face Hub, made private if it is not there, to which model/
            goes when the run has finished, with a card of what it is and with which figures. Empty is none.
        exit_code_when_stopped: exit code, 0 to 255, after a signal stopped the run and all was saved, for queues that
            start anew what did not end with 0 (75 is the usual one).
        progress: show a progress bar, if standard error is a terminal, or in a notebook. Without one a plain line says
            every half minute how far the run is.
        report: write report.html at the end: curves, samples, and what went wrong in words (`rlhf-jax report`).
    """

    output_dir: PathText = ""
    overwrite: bool = False
    seed: int = 0
    log_every: int = 1
    eval_every: int = 100
    keep_best: bool = True
    loggers: list[str] = field(default_factory=list)
    profile: list[int] = field(default_factory=list)
    calibrate: bool = False
    push_to_hub: str = ""
    exit_code_when_stopped: int = 0
    progress: bool = True
    report: bool = True

    def __post_init__(self) -> None:
        check(self, "run.", {"at least 1": "log_every", "at least 0": "eval_every", SEEDS: "seed"})
        if unknown := [name for name in self.loggers if name not in LOGGERS and not name.partition(":")[2]]:
            raise UserError(
                f"run.loggers has {shown(unknown[0])}; give some of {', '.join(LOGGERS)}, or module:function"
            )
        if not 0 <= self.exit_code_when_stopped <= 255:
            raise UserError(f"run.exit_code_when_stopped {self.exit_code_when_stopped} is not from 0 to 255; give 75")
        if self.profile and not (len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1]):
            raise UserError(f"run.profile {self.profile} is not a first and a last step; give two such as [10, 12]")


@settings
class SamplingConfig:
    """How responses are drawn.

    Args:
        max_new_tokens: T, longest response. 0 takes 64 (chat 256), or what the model's positions leave a response.
        min_new_tokens: stop ids cannot be drawn before this many tokens.
        temperature: logits are divided by it; 0 is greedy. Methods that learn from their samples need 0.01.
        top_k: keep the k most likely tokens (ties kept); 0 keeps all. Methods that learn from their samples carry the
            ids along (without ties): their log-probs are of what top_k and top_p kept, renormalised.
        top_p: keep the smallest set of likely tokens whose mass reaches p; 1 keeps all.
        chunk: decoding looks which rows are done after every so many tokens, and begins others in their place.
        prompt_buckets: lengths that prompts are padded to, ascending; each is one compilation. Empty means one
            bucket, data.max_prompt_length.
        slots: rows decoded at once, over all devices; the others wait until one of these has ended. 0 chooses: all
            rows where they are few or none can end early, else as many as keep the cache no larger than the weights.
        microbatch: rows of a rollout of their own, one rollout after another; 0 means all. `slots` are of each.
        budget: partial rollouts of the methods that learn from their samples: a row that a rollout has given so many
            tokens, a multiple of `chunk`, is cut and goes on in the next iteration. Twice data.batch_size rows are
            under way; an iteration trains on the oldest data.batch_size that have ended, after more than one rollout
            if need be. 0, or max_new_tokens and more, cuts none.
    """

    max_new_tokens: int = 0
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    chunk: int = 32
    prompt_buckets: list[int] = field(default_factory=list)
    slots: int = 0
    microbatch: int = 0
    budget: int = 0

    def __post_init__(self) -> None:
        rules = {
            "at least 1": "chunk",
            "at least 0": "max_new_tokens min_new_tokens temperature top_k slots microbatch budget",
            "above 0 and at most 1": "top_p",
        }
        check(self, "sampling.", rules)
        if self.max_new_tokens and self.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"sampling.min_new_tokens {self.min_new_tokens} is more than sampling.max_new_tokens "
                f"{self.max_new_tokens}; lower it"
            )
        check_list(self, "prompt_buckets", "sampling.", "at least 1", ascending=True)
        if self.cut % self.chunk:
            raise UserError(
                f"sampling.budget {self.budget} is not a multiple of sampling.chunk {self.chunk}; change one of them"
            )

    @property
    def cut(self) -> int:
        """Tokens of a rollout after which rows are cut, and go on in the next; 0 if none are."""
        return self.budget if self.budget < self.max_new_tokens else 0

    def check_whole(self) -> None:
        """Raise a UserError if rows would be cut where there is no next iteration."""
        if self.cut:
            raise UserError(
                f"sampling.budget {self.budget} is of ppo, grpo, rloo and reinforce_pp, whose rows go on in the next "
                "iteration; set it to 0"
            )

    def check_buckets(self, name: str, longest: int) -> None:
        """Raise a UserError unless the last prompt bucket holds prompts of the longest length, the option `name`."""
        if self.prompt_buckets and self.prompt_buckets[-1] < longest:
            raise UserError(
                f"sampling.prompt_buckets {self.prompt_buckets} ends below {name} {longest}; "
                f"append {longest} to it or lower {name}"
            )
