"""Settings that depend on the model: rates and warm-up of a pretrained one, lengths that its positions hold.

A class of settings calls `settle` or `settle_lengths` where it is made, so what config.yaml, a resumed run, `plan` and
Python see is what holds.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rlhf_jax.config.parts import ModelConfig, SamplingConfig

LENGTH, PRETRAINED_LENGTH = 512, 1024
"""Tokens of `data.max_length` 0: of fresh weights, and of a model by path; either's positions may be fewer."""

PROMPT, RESPONSE = 256, 64
"""Tokens of `max_prompt_length` 0 and of `sampling.max_new_tokens` 0, where the model's positions hold them."""

BATCH = 32
"""Rows of `data.batch_size` 0. Methods that train on rows take fewer where rows are few (`data.loading`)."""


class Rate(NamedTuple):
    """What `learning_rate` null becomes: `fresh` for weights of model.arch; for a model by path `pretrained`, of
    adapters ADAPTERS times that, after a warm-up over the share `warmup` of the run.
    """

    fresh: float
    pretrained: float
    warmup: float = 0.03


ADAPTERS = 10
"""Schulman et al. 2025, LoRA Without Regret: adapters want about ten times the rate of all weights; in SFT that is the
2e-4 of QLoRA (Dettmers et al. 2023, arXiv 2305.14314).
"""

RATES = {
    "sft": Rate(3e-4, 2e-5),  # Taori et al. 2023 (Alpaca); Ivison et al. 2023 (Tulu 2, arXiv 2311.10702)
    "reward": Rate(3e-4, 1e-5),  # TRL's guide to reward models; Touvron et al. 2023 (arXiv 2307.09288): 5e-6 to 1e-5
    "dpo": Rate(1e-6, 1e-6, 0.1),  # Rafailov et al. 2023 (arXiv 2305.18290), appendix B; Tunstall et al. 2023: a tenth
    "kto": Rate(1e-6, 1e-6, 0.1),  # TRL's default; Ethayarajh et al. 2024 (arXiv 2402.01306) take 5e-7 to 5e-6
    "rrhf": Rate(1e-6, 2e-5),  # Yuan et al. 2023 (arXiv 2304.05302), section 4
    "ppo": Rate(1e-5, 3e-6),  # Huang et al. 2024 (arXiv 2403.17031); warm-up: Ouyang et al. 2022, appendix C
    "value": Rate(1e-5, 1e-5),  # Ouyang et al. 2022 (arXiv 2203.02155), appendix C: 9e-6
    "grpo": Rate(1e-5, 1e-6),  # Shao et al. 2024 (GRPO, arXiv 2402.03300), section 4.2; TRL's GRPO and RLOO
}


def settle(args: Any, rate: str, value_rate: str = "", *, online: bool = False) -> None:
    """Fill in what a stage's settings leave open: `optim` by the name of its rate, `value_optim`, lengths and batch.

    `online` methods sample their batch, whose size is then known; others may find fewer rows.
    """
    path, adapters = args.model.path, bool(args.lora.rank)
    for group, name in (("optim", rate), ("value_optim", value_rate)):
        if name and (optim := getattr(args, group)).learning_rate is None:
            found = RATES[name]
            peak = found.pretrained * (ADAPTERS if adapters else 1) if path else found.fresh
            warmup = found.warmup if path and not optim.warmup_steps else optim.warmup_ratio
            ratio = optim.warmup_ratio or warmup
            chosen = dataclasses.replace(optim, learning_rate=float(f"{peak:g}"), warmup_ratio=ratio)
            object.__setattr__(args, group, chosen)
    data, sampling, positions = args.data, getattr(args, "sampling", None), positions_of(args.model)
    prompt, length = data.max_prompt_length, data.max_length
    if not length:
        length = min(PRETRAINED_LENGTH if path else LENGTH, positions)
    if sampling is not None:
        prompt, sampling = lengths_within(positions, prompt, sampling, prompts=max(length // 2, 1))
        object.__setattr__(args, "sampling", sampling)
    size = data.batch_size or BATCH * online
    more = {"max_length": length, "max_prompt_length": prompt, "batch_size": size}
    object.__setattr__(args, "data", dataclasses.replace(data, **more))


def settle_lengths(args: Any, *paths: str) -> None:
    """Fill in `max_prompt_length` and `sampling.max_new_tokens` of a command that samples from `model` and `paths`."""
    prompt, sampling = lengths_within(positions_of(args.model, *paths), args.max_prompt_length, args.sampling)
    object.__setattr__(args, "max_prompt_length", prompt)
    object.__setattr__(args, "sampling", sampling)


def lengths_within(
    positions: int, prompt: int, sampling: SamplingConfig, *, prompts: int = PROMPT, responses: int = RESPONSE
) -> tuple[int, SamplingConfig]:
    """Longest prompt, and `sampling` with its longest response: `prompts` and `responses` where they are 0, or fewer
    tokens where the model has no positions for both. What is given stays.
    """
    longest = max([prompt, *sampling.prompt_buckets])
    new = sampling.max_new_tokens or min(responses, positions - longest if longest else positions // 2)
    prompt = prompt or longest or min(prompts, positions - new)
    return max(prompt, 1), dataclasses.replace(sampling, max_new_tokens=max(new, 1))


def positions_of(model: ModelConfig, *paths: str) -> int:
    """The fewest positions of a model and of other directories, as far as their config.json says; what it does not say
    is seen when they are loaded.
    """
    told = [told_by(path) for path in (model.path, *paths) if path]
    return min(told + ([model.arch.max_positions] if model.arch is not None else []), default=PRETRAINED_LENGTH)


def told_by(path: str) -> int:
    """Positions of a model directory by its config.json, or else the longest default length."""
    try:
        config = json.loads(Path(path, "config.json").read_bytes())
        found = config.get("max_position_embeddings", config.get("n_positions"))
    except (OSError, ValueError, AttributeError, RecursionError):
        found = None
    return found if isinstance(found, int) and found > 1 else PRETRAINED_LENGTH
