"""What somebody meant who wrote a name that is none of ours: of an option, a command, a model of the Hub."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from pathlib import Path

ALIASES: dict[str, str] = {
    "lr": "learning_rate", "peak_lr": "learning_rate", "lr_scheduler_type": "schedule", "wd": "weight_decay",
    "max_grad_norm": "clip_norm", "warmup": "warmup_steps", "adam_beta1": "b1", "adam_beta2": "b2",
    "adam_epsilon": "eps", "gradient_accumulation_steps": "accumulate", "num_train_epochs": "epochs",
    "num_epochs": "epochs", "num_ppo_epochs": "epochs", "num_iterations": "epochs", "max_steps": "steps iterations",
    "num_steps": "steps iterations", "total_episodes": "iterations", "num_mini_batches": "minibatches",
    "bs": "batch_size", "per_device_train_batch_size": "batch_size", "train_batch_size": "batch_size",
    "max_seq_length": "max_length", "max_seq_len": "max_length", "packing": "pack",
    "model_name_or_path": "model.path model", "model_name": "model.path model", "model_path": "model.path model",
    "dataset": "data.path data_path path", "dataset_name": "data.path data_path path",
    "data": "data.path data_path path", "train_file": "data.path data_path path",
    "eval_dataset": "eval_path", "validation_file": "eval_path", "tokenizer_name": "model.tokenizer tokenizer",
    "num_generations": "group_size num_samples", "max_completion_length": "max_new_tokens",
    "max_tokens": "max_new_tokens", "response_length": "max_new_tokens", "num_return_sequences": "num_samples",
    "beta": "beta kl_coef", "kl_penalty": "kl_coef", "init_kl_coef": "kl_coef", "kl": "kl_coef",
    "cliprange": "clip_ratio", "epsilon": "clip_ratio", "epsilon_high": "clip_ratio_high",
    "cliprange_value": "value_clip", "vf_coef": "value_coef", "lam": "gae_lambda", "lambda": "gae_lambda",
    "gamma": "discount", "missing_eos_penalty": "missing_eos_value", "reward_weights": "function_weights",
    "reward_funcs": "reward.functions", "reward_model_path": "reward.model", "reward_model": "reward.model",
    "loss_type": "loss", "lora_r": "lora.rank", "lora_alpha": "lora.alpha", "lora_target_modules": "lora.targets",
    "load_in_4bit": "quantize", "load_in_8bit": "quantize", "bf16": "compute_dtype", "torch_dtype": "compute_dtype",
    "gradient_checkpointing": "remat", "logging_steps": "log_every", "eval_steps": "eval_every",
    "save_steps": "checkpoint.every", "save_total_limit": "keep_last", "load_best_model_at_end": "keep_best",
    "report_to": "loggers", "tensorboard": "loggers", "overwrite_output_dir": "overwrite", "disable_tqdm": "progress",
    "train": "sft pretrain", "finetune": "sft", "generate": "sample", "chat": "sample", "rm": "reward",
    "reward_model_training": "reward", "rank": "label", "eval": "evaluate", "serve": "label",
}  # fmt: skip
"""What other libraries call an option or a command, above all TRL -> what we do, by the end of its dotted name; of
several the first that there is."""

SAME = (
    ("data.path", "data_path", "path"), ("run.output_dir", "output_dir", "output", "out"), ("run.seed", "seed"),
    ("run.overwrite", "overwrite"), ("run.progress", "progress"), ("data.batch_size", "batch_size"),
    ("data.fields", "fields"), ("data.eval_path", "eval_path"), ("data.max_prompt_length", "max_prompt_length"),
    ("data.max_length", "max_length"), ("data.too_long", "too_long"), ("model.tokenizer", "tokenizer"),
)  # fmt: skip
"""Options that mean one thing: what stages have in groups, and other commands by themselves."""

OWNERS = {
    "gpt2": "openai-community", "distilgpt2": "distilbert", "qwen": "Qwen", "llama": "meta-llama",
    "meta-llama": "meta-llama", "gemma": "google", "vaultgemma": "google", "mistral": "mistralai",
    "ministral": "mistralai", "phi": "microsoft", "olmo": "allenai", "pythia": "EleutherAI", "smollm": "HuggingFaceTB",
    "starcoder": "bigcode", "tinyllama": "TinyLlama", "granite": "ibm-granite", "falcon": "tiiuae",
}  # fmt: skip
"""How names of models of the Hub begin -> who published these."""


def nearest(word: str, known: Sequence[str], command: str) -> str:
    """ "; did you mean X?" or where to look. The last part of a dotted name may match on its own.

    A name of `ALIASES` comes first, then whatever of all that is known is most alike.
    """
    last = word.split(".")[-1]
    for end in ALIASES.get(last.replace("-", "_"), "").split():
        for name in known:
            if name != word and f".{name}".endswith(f".{end}"):
                return f"; did you mean {name}?"
    scores = {name: max(alike(word, name), alike(last, name.split(".")[-1])) for name in known}
    best = max(scores, key=scores.__getitem__, default="")
    if best and scores[best] >= 0.6:
        return f"; did you mean {best}?"
    return f"; `rlhf-jax {command}--help` lists all"


def alike(a: str, b: str) -> float:
    """How alike two words are, from 0 to 1."""
    return difflib.SequenceMatcher(None, b, a).ratio()


def same_idea(name: str, known: Collection[str]) -> str:
    """The one of the `known` options that means what `name` means elsewhere (`SAME`); `name` if there is none."""
    if name in known or name == "path":  # which may be that of a model
        return name
    others = next((names for names in SAME if name in names), ())
    return next((other for other in others if other in known), name)


def of_the_hub(path: str) -> str:
    """What to give instead of a path that is not there, if it may be the name of a model of the Hub; else empty."""
    owner, slash, name = path.rpartition("/")
    known = next((OWNERS[start] for start in OWNERS if name.lower().startswith(start)), "")
    if not slash and known:
        return f"did you mean hf://{known}/{name}?"
    if slash and "/" not in owner and owner not in (".", "..", "~") and name and not Path(owner or "/").is_dir():
        return f"did you mean hf://{path}?" if known else f"give a directory, or hf://{path} for a model of the Hub"
    return ""
