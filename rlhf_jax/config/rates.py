"""Settings that a pretrained model needs otherwise than one of fresh weights: rates, warm-up, lengths.

A stage's class of settings calls `settle` where it is made, so what config.yaml, a resumed run, `plan` and Python see
is what holds.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

LENGTH, PRETRAINED_LENGTH = 512, 1024
"""Tokens of `data.max_length` 0: of fresh weights, and of a model by path, whose positions may be fewer."""


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


def settle(args: Any, rate: str, value_rate: str = "") -> None:
    """Fill in what a stage's settings leave open: `optim` by the name of its rate, `value_optim`, the lengths."""
    path, adapters = args.model.path, bool(args.lora.rank)
    for group, name in (("optim", rate), ("value_optim", value_rate)):
        if name and (optim := getattr(args, group)).learning_rate is None:
            found = RATES[name]
            peak = found.pretrained * (ADAPTERS if adapters else 1) if path else found.fresh
            warmup = found.warmup if path and not optim.warmup_steps else optim.warmup_ratio
            ratio = optim.warmup_ratio or warmup
            chosen = dataclasses.replace(optim, learning_rate=float(f"{peak:g}"), warmup_ratio=ratio)
            object.__setattr__(args, group, chosen)
    if not args.data.max_length:
        length = min(PRETRAINED_LENGTH, positions_of(path)) if path else LENGTH
        buckets = getattr(args, "sampling", None) and args.sampling.prompt_buckets
        prompt = args.data.max_prompt_length or (buckets[-1] if buckets else 0)
        object.__setattr__(args, "data", dataclasses.replace(args.data, max_length=length, max_prompt_length=prompt))


def positions_of(path: str) -> int:
    """Positions of a model directory, as its config.json says; what it does not say is seen when it is loaded."""
    try:
        config = json.loads(Path(path, "config.json").read_bytes())
        found = config.get("max_position_embeddings", config.get("n_positions"))
    except (OSError, ValueError, AttributeError, RecursionError):
        found = None
    return found if isinstance(found, int) and found > 1 else PRETRAINED_LENGTH
